# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints, written with numpy alone."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from qjax import quantize_model
from qjax_checkpoints.checkpoint import Checkpoint
from qjax_checkpoints.load import load
from qjax_checkpoints.parameters import stored_values
from qjax_checkpoints.save import save
from qjax_models import Decoder

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "eos_token_id": 1,
}


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of a Llama."""
    width, mlp = config["hidden_size"], config["intermediate_size"]
    query = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    table = (config["vocab_size"], width)
    result = {"model.embed_tokens.weight": table, "model.norm.weight": (width,)}
    if not config["tie_word_embeddings"]:
        result["lm_head.weight"] = table
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        result |= {
            f"{prefix}self_attn.q_proj.weight": (query, width),
            f"{prefix}self_attn.k_proj.weight": (kv, width),
            f"{prefix}self_attn.v_proj.weight": (kv, width),
            f"{prefix}self_attn.o_proj.weight": (width, query),
            f"{prefix}mlp.gate_proj.weight": (mlp, width),
            f"{prefix}mlp.up_proj.weight": (mlp, width),
            f"{prefix}mlp.down_proj.weight": (width, mlp),
            f"{prefix}input_layernorm.weight": (width,),
            f"{prefix}post_attention_layernorm.weight": (width,),
        }
    return result


@pytest.fixture
def tiny_llama(tmp_path: Path) -> Callable[..., tuple[Path, dict[str, np.ndarray]]]:
    """Writes a tiny random Llama; returns its directory and its tensors."""

    def write(dtype: type = np.float32, **changes) -> tuple[Path, dict[str, np.ndarray]]:
        config = CONFIG | {"torch_dtype": np.dtype(dtype).name} | changes
        rng = np.random.default_rng(0)
        tensors = {
            name: (rng.standard_normal(shape) * 0.2).astype(np.float32).astype(dtype)
            for name, shape in shapes(config).items()
        }
        path = tmp_path / "llama"
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config))
        safetensors.numpy.save_file(tensors, path / "model.safetensors", {"format": "pt"})
        return path, tensors

    return write


@pytest.fixture
def tiny_mixtral(tmp_path: Path) -> Path:
    """Writes a tiny random Mixtral of four experts a layer."""
    config = CONFIG | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }
    width, mlp = config["hidden_size"], config["intermediate_size"]
    dense = {name: shape for name, shape in shapes(config).items() if ".mlp." not in name}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.block_sparse_moe."
        dense[f"{prefix}gate.weight"] = (4, width)
        for expert in range(4):
            for name, shape in (("w1", (mlp, width)), ("w2", (width, mlp)), ("w3", (mlp, width))):
                dense[f"{prefix}experts.{expert}.{name}.weight"] = shape
    rng = np.random.default_rng(0)
    tensors = {n: (rng.standard_normal(s) * 0.2).astype(np.float32) for n, s in dense.items()}
    path = tmp_path / "mixtral"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer.json").write_text("{}")
    safetensors.numpy.save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.fixture
def quantizable_llama(tiny_llama) -> Checkpoint:
    """A tiny Llama, loaded, whose layers have whole groups of 16 and 32 inputs."""
    path, _ = tiny_llama(intermediate_size=64)
    (path / "tokenizer.json").write_text('{"tokenizer": true}')
    (path / "tokenizer_config.json").write_text("{}")
    (path / "generation_config.json").write_text("{}")
    (path / "LICENSE").write_text("free")
    (path / "training.log").write_text("noise")
    return load(path)


@pytest.fixture
def write_quantized(quantizable_llama, tmp_path) -> Callable[..., tuple[Decoder, Path]]:
    """Quantizes the tiny Llama and writes it; returns the model and the directory."""

    def write(recipe, format: str) -> tuple[Decoder, Path]:
        model, _ = quantize_model(quantizable_llama.model, recipe)
        save(model, quantizable_llama, tmp_path / "out", format)
        return model, tmp_path / "out"

    return write


@pytest.fixture
def assert_same_model() -> Callable[[Decoder, Decoder], None]:
    """Says that two models hold the same bits in the same structure."""

    def check(a: Decoder, b: Decoder) -> None:
        pairs = zip(stored_values(a), stored_values(b), strict=True)
        for (name, _, x), (other, _, y) in pairs:
            assert name == other and jax.tree.structure(x) == jax.tree.structure(y), name
            for p, q in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
                assert p.dtype == q.dtype and np.asarray(p).tobytes() == np.asarray(q).tobytes()

    return check
