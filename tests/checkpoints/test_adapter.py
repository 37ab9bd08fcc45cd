# SPDX-License-Identifier: Apache-2.0
"""Adapters as directories: what lies in them, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import qjax
from qjax.lora import adapters, add_lora, merge_lora, requantize_lora
from qjax_checkpoints.adapter import load_adapter, save_adapter
from qjax_checkpoints.load import load
from qjax_checkpoints.save import save
from qjax_models import Decoder, join_projections

TOKENS = jnp.arange(18).reshape(2, 9)
PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"
forward = nnx.jit(Decoder.__call__)


def corrected(model: Decoder) -> Decoder:
    """The same with corrections that are not zero."""
    for number, adapter in enumerate(adapters(model).values()):
        shape = adapter.lora_b.get_value().shape
        noise = 0.1 * jax.random.normal(jax.random.key(number), shape)
        adapter.lora_b.set_value(noise.astype(adapter.lora_b.get_value().dtype))
    return model


@pytest.fixture
def adapted(quantizable_llama) -> Decoder:
    base, _ = qjax.quantize_model(quantizable_llama.model, "nf4-g16")
    return corrected(add_lora(base, rank=4, alpha=8.0))


@pytest.fixture
def directory(adapted, tmp_path):
    save_adapter(adapted, tmp_path / "adapter", base="org/llama")
    return tmp_path / "adapter"


@pytest.fixture
def of_queries(quantizable_llama, tmp_path):
    """A directory with few tensors, made without quantizing anything."""
    model = corrected(add_lora(quantizable_llama.model, 4, 8.0, layers=".*q_proj"))
    save_adapter(model, tmp_path / "adapter", base="org/llama")
    return tmp_path / "adapter"


def test_the_layout(adapted, directory):
    assert {file.name for file in directory.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    config = json.loads((directory / "adapter_config.json").read_text())
    assert config | {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "org/llama", "r": 4,
        "lora_alpha": 8, "bias": "none", "fan_in_fan_out": False, "rank_pattern": {}, "alpha_pattern": {},
        "target_modules": [
            "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj",
        ],
    } == config  # fmt: skip
    tensors = safetensors.numpy.load_file(directory / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 7
    q_proj = adapters(adapted)["model/layers/0/self_attn/q_proj"]
    a, b = tensors[f"{PREFIX}.lora_A.weight"], tensors[f"{PREFIX}.lora_B.weight"]
    assert a.shape == (4, 32) and b.shape == (32, 4) and a.dtype == np.float32
    np.testing.assert_array_equal(a.T, q_proj.lora_a[...])
    np.testing.assert_array_equal(b.T, q_proj.lora_b[...])


def test_an_adapter_comes_back(adapted, directory, quantizable_llama):
    base, _ = qjax.quantize_model(quantizable_llama.model, "nf4-g16")
    loaded = load_adapter(base, directory)
    assert not adapters(base)
    assert jax.tree.structure(nnx.split(loaded)) == jax.tree.structure(nnx.split(adapted))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded), nnx.state(adapted))
    np.testing.assert_array_equal(forward(loaded, TOKENS), forward(adapted, TOKENS))


def test_ranks_and_alphas_of_layers_come_back(quantizable_llama, tmp_path):
    model = add_lora(quantizable_llama.model, 4, 8.0, layers=".*/(q|v)_proj")
    model = add_lora(model, 2, 8.0, layers="model/layers/1/self_attn/o_proj")
    model = add_lora(model, 4, 2.5, layers="lm_head", dtype=jnp.bfloat16)
    save_adapter(corrected(model), tmp_path / "adapter", base="llama", dtype=jnp.bfloat16)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    # Not "o_proj": that would mean the one of the other layer as well.
    assert (
        config["target_modules"] == sorted(name.replace("/", ".") for name in adapters(model))
        and len(config["target_modules"]) == 6
    )
    assert config["rank_pattern"] == {"model.layers.1.self_attn.o_proj": 2}
    assert config["alpha_pattern"] == {"lm_head": 2.5}
    loaded = adapters(load_adapter(quantizable_llama.model, tmp_path / "adapter"))
    for path, adapter in adapters(model).items():
        assert (loaded[path].rank, loaded[path].alpha) == (adapter.rank, adapter.alpha)
        for ours, theirs in zip(loaded[path].factors, adapter.factors, strict=True):
            np.testing.assert_array_equal(ours, theirs.astype(jnp.bfloat16))


def test_merged_models_are_plain_directories(adapted, quantizable_llama, tmp_path):
    merged = merge_lora(adapted)
    save(merged, quantizable_llama, tmp_path / "merged", "dense")
    loaded = load(tmp_path / "merged")
    assert loaded.kind == "plain"
    ours, expected = forward(loaded.model, TOKENS), forward(adapted, TOKENS)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    again, _ = requantize_lora(adapted, "w4a16-g16")
    save(again, quantizable_llama, tmp_path / "w4", "compressed-tensors")
    np.testing.assert_array_equal(
        forward(load(tmp_path / "w4").model, TOKENS), forward(again, TOKENS)
    )


def test_a_model_with_adapters_is_not_saved_as_if_it_had_none(quantizable_llama, tmp_path):
    model = add_lora(quantizable_llama.model, 4, layers=".*q_proj")
    for format in ("compressed-tensors", "orbax", "dense"):
        with pytest.raises(
            ValueError, match=r"^the model has adapters, .*merge_lora.*save_adapter\)$"
        ):
            save(model, quantizable_llama, tmp_path / "out", format)
    assert not (tmp_path / "out").exists()


def test_what_has_no_place_in_the_layout_is_refused(
    adapted, quantizable_llama, tiny_mixtral, tmp_path
):
    out = tmp_path / "out"

    def save_(model):
        save_adapter(model, out, base="base")

    with pytest.raises(ValueError, match="^the model has no adapters to be saved"):
        save_(quantizable_llama.model)
    mixtral = add_lora(load(tiny_mixtral).model, 2, layers=".*/experts/1/w1")
    with pytest.raises(
        ValueError, match="^model/layers/0/block_sparse_moe/experts/1/w1: PEFT's layout"
    ):
        save_(mixtral)
    joined, _ = qjax.quantize_model(quantizable_llama.model, "nf4-g16")
    join_projections(joined)
    with pytest.raises(ValueError, match="^the model's projections or experts are joined"):
        save_(add_lora(joined, 2))
    assert not out.exists()
    out.mkdir()
    with pytest.raises(ValueError, match="exists already"):
        save_(adapted)


def rewrite(directory, tensors=None, **config):
    """Changes a directory: configuration keys, and tensors (None: taken away)."""
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    path = directory / "adapter_model.safetensors"
    old = safetensors.numpy.load_file(path)
    new = {k: v for k, v in (old | (tensors or {})).items() if v is not None}
    safetensors.numpy.save_file(new, path)


A, B = f"{PREFIX}.lora_A.weight", f"{PREFIX}.lora_B.weight"
ABSENT = "base_model.model.model.layers.7.self_attn.q_proj"
FACTOR = np.zeros((4, 32), np.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensors": {f"{ABSENT}.lora_A.weight": FACTOR, f"{ABSENT}.lora_B.weight": FACTOR.T}},
         rf"tensor {ABSENT}.lora_A.weight: the model has no linear layer model/layers/7/self_attn/q_proj$"),
        ({"tensors": {A: None}}, rf"tensor {A} is missing, the other half"),
        ({"tensors": {A: FACTOR[:3]}}, rf"tensor {A} has shape \[3, 32\], .* ask for \[4, 32\]$"),
        ({"tensors": {A: FACTOR[:, :24]}}, rf"tensor {A} has shape \[4, 24\], .* ask for \[4, 32\]$"),
        ({"tensors": {B: FACTOR}}, rf"tensor {B} has shape \[4, 32\], .* ask for \[32, 4\]$"),
        ({"tensors": {A: FACTOR + np.float32(np.nan)}}, rf"tensor {A}: NaN among the values"),
        ({"tensors": {"lora_A.weight": FACTOR}}, "tensor lora_A.weight is no factor of a low-rank adapter"),
        ({"r": 8}, r"tensor .* ask for \[8, 32\]$"),
        ({"rank_pattern": {"q_proj": 2}}, rf"tensor {A} has shape \[4, 32\], .* ask for \[2, 32\]$"),
        ({"rank_pattern": {"(": 2}}, r"rank_pattern: '\(' is no regular expression"),
        ({"r": "four"}, "adapter_config.json: r must be a number, got 'four'$"),
        ({"lora_alpha": 0}, "alpha must be a number above 0, got 0.0$"),
        ({"peft_type": "IA3"}, "adapter_config.json: peft_type is 'IA3'; .* 'LORA' only$"),
        ({"use_dora": True}, "adapter_config.json: use_dora is True; adapters are read with False only$"),
        ({"bias": "all"}, "adapter_config.json: bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, r"adapter_config.json: modules_to_save is \['lm_head'\]"),
    ],
)  # fmt: skip
def test_an_adapter_that_does_not_fit_is_refused(of_queries, quantizable_llama, changes, message):
    rewrite(of_queries, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        load_adapter(quantizable_llama.model, of_queries)
    assert "\n" not in str(caught.value)


def test_adapters_are_not_put_over_each_other(adapted, directory):
    with pytest.raises(ValueError, match="^model/layers/0/.*: has an adapter already"):
        load_adapter(adapted, directory)


def test_a_directory_without_an_adapter(quantizable_llama, of_queries):
    with pytest.raises(ValueError, match="adapter_config.json: cannot be read: No such file"):
        load_adapter(quantizable_llama.model, quantizable_llama.path)
    rewrite(of_queries, dict.fromkeys(
        safetensors.numpy.load_file(of_queries / "adapter_model.safetensors")
    ))  # fmt: skip
    with pytest.raises(ValueError, match="adapter_model.safetensors: holds no tensors$"):
        load_adapter(quantizable_llama.model, of_queries)
