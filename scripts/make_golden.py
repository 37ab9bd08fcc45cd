#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes tiny random checkpoints of every family with the logits that transformers computes.

Each case is chosen so that every feature of its family matters: windows are shorter than the
sequence, both kinds of layers occur, biases are not zero and norm weights not one.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import PreTrainedModel

VOCAB_SIZE = 64
BATCH, LENGTH = 2, 40


@dataclass(frozen=True)
class Case:
    """One tiny model: a transformers configuration class and what differs from `SIZES`."""

    config: str
    changes: Mapping[str, object]


SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

CASES = {
    "llama": Case(
        "LlamaConfig",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "llama_linear": Case(
        "LlamaConfig",
        {
            "tie_word_embeddings": True,
            "head_dim": 12,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        },
    ),
    "mistral": Case("MistralConfig", {"sliding_window": 7, "head_dim": 16}),
    "mixtral": Case(
        "MixtralConfig", {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 9}
    ),
    "qwen2": Case(
        "Qwen2Config",
        {
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 1,
        },
    ),
    "qwen3": Case("Qwen3Config", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3_moe": Case(
        "Qwen3MoeConfig",
        {
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "mlp_only_layers": [1],
        },
    ),
    "gemma2": Case(
        "Gemma2Config",
        {
            "tie_word_embeddings": True,
            "head_dim": 8,
            "query_pre_attn_scalar": 20,
            "sliding_window": 6,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": Case(
        "Gemma3TextConfig",
        {
            "tie_word_embeddings": True,
            "num_hidden_layers": 7,
            "head_dim": 8,
            "query_pre_attn_scalar": 20,
            "sliding_window": 6,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "phi3": Case("Phi3Config", {"sliding_window": 11}),
    "phi3_longrope": Case(
        "Phi3Config",
        {
            "original_max_position_embeddings": 16,
            "partial_rotary_factor": 0.5,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0, 1.5],
                "long_factor": [2.0, 5.0],
            },
        },
    ),
}


def random_model(case: Case, seed: int) -> PreTrainedModel:
    """The case's model in float32, with weights that leave no feature idle."""
    config = getattr(transformers, case.config)(**SIZES | dict(case.changes))
    config._attn_implementation = "eager"  # the only one that applies soft caps
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if "norm" in name:
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(0.2 * noise)
    return model


def random_tokens(seed: int, length: int = LENGTH) -> torch.Tensor:
    """Token ids, [BATCH, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB_SIZE, (BATCH, length), generator=generator)


def write_case(case: Case, folder: Path, seed: int) -> None:
    """Writes config.json, model.safetensors and expected.safetensors (tokens, logits)."""
    model = random_model(case, seed)
    tokens = random_tokens(seed)
    with torch.no_grad():
        logits = model(tokens).logits
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    expected = {"tokens": tokens.to(torch.int32), "logits": logits.contiguous()}
    save_file(expected, folder / "expected.safetensors")


def main() -> None:
    """Parses arguments and writes one folder per case."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="example: make_golden.py --out tests/golden"
    )
    parser.add_argument("--out", type=Path, required=True, help="one folder per case goes here")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for name, case in CASES.items():
        write_case(case, arguments.out / name, arguments.seed)
        print(arguments.out / name)


if __name__ == "__main__":
    main()
