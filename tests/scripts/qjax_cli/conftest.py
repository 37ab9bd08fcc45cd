# SPDX-License-Identifier: Apache-2.0
"""A tiny model directory with a byte-level tokenizer, and the command run in this process."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from qjax_cli.main import main

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "eos_token_id": 259,
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model directory as Hugging Face lays it out."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    write_weights(path, random_weights())
    write_tokenizer(path)
    return path


def random_weights() -> dict[str, np.ndarray]:
    """Weights by Hugging Face name."""
    rng = np.random.default_rng(0)
    width, mlp, kv = 64, 128, 32
    shapes = {"model.embed_tokens.weight": (260, width), "model.norm.weight": (width,)}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}self_attn.q_proj.weight": (width, width),
            f"{prefix}self_attn.k_proj.weight": (kv, width),
            f"{prefix}self_attn.v_proj.weight": (kv, width),
            f"{prefix}self_attn.o_proj.weight": (width, width),
            f"{prefix}mlp.gate_proj.weight": (mlp, width),
            f"{prefix}mlp.up_proj.weight": (mlp, width),
            f"{prefix}mlp.down_proj.weight": (width, mlp),
            f"{prefix}input_layernorm.weight": (width,),
            f"{prefix}post_attention_layernorm.weight": (width,),
        }
    return {
        name: (rng.standard_normal(shape) * 0.2).astype(ml_dtypes.bfloat16)
        for name, shape in shapes.items()
    }


def write_weights(path: Path, weights: dict[str, np.ndarray]) -> None:
    safetensors.numpy.save_file(weights, path / "model.safetensors", {"format": "pt"})


def write_tokenizer(path: Path, words: int = 0) -> None:
    """A byte-level tokenizer of 256 entries, `words` more, and an end token."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {f"<word{i}>": 256 + i for i in range(words)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(path / "tokenizer.json"))


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Stdout, which must be one JSON object and nothing else."""
        return json.loads(self.out)


@pytest.fixture
def qjax(capsys) -> Callable[..., Outcome]:
    """Runs the command with arguments and captures what it says."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        try:
            status = main([str(a) for a in arguments])
        except SystemExit as exit_:
            assert isinstance(exit_.code, int)
            status = exit_.code
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    return run
