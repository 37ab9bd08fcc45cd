# SPDX-License-Identifier: Apache-2.0
"""Plain models: every weight in its place, every misfit in one line, one copy in memory."""

import json
import os
import subprocess
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from qjax_checkpoints.load import load
from qjax_models.names import hf_tensors


def parameters(model) -> dict[str, np.ndarray]:
    """Every parameter under its Hugging Face name and in its layout there."""
    flat = {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(model))}
    return {
        name: np.asarray(flat[path][...]).T if layout == "linear" else np.asarray(flat[path][...])
        for name, (path, layout) in hf_tensors(model).items()
    }


def rewrite(path, tensors) -> None:
    safetensors.numpy.save_file(tensors, path / "model.safetensors", {"format": "pt"})


def message(path) -> str:
    with pytest.raises(ValueError) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("asked", [None, jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_every_weight_in_its_place(tiny_llama, stored, asked, tied):
    path, tensors = tiny_llama(stored, tie_word_embeddings=tied)
    checkpoint = load(path, asked)
    loaded = parameters(checkpoint.model)
    assert set(loaded) == set(tensors)
    for name, array in tensors.items():
        expected = array if asked is None else np.asarray(jnp.asarray(array).astype(asked))
        assert loaded[name].dtype == expected.dtype
        assert np.ascontiguousarray(loaded[name]).tobytes() == expected.tobytes(), name
    logits = checkpoint.model(jnp.arange(12)[None])
    assert logits.shape == (1, 12, 97) and bool(jnp.all(jnp.isfinite(logits)))
    assert (checkpoint.kind, checkpoint.path, checkpoint.notes) == ("plain", path, ())
    assert checkpoint.config["model_type"] == "llama"


def test_mixed_dtypes_stay_mixed(tiny_llama):
    path, tensors = tiny_llama(ml_dtypes.bfloat16)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float32)
    rewrite(path, tensors)
    model = load(path).model
    assert model.model.norm.weight[...].dtype == jnp.float32
    assert model.model.embed_tokens.embedding[...].dtype == jnp.bfloat16


def test_loaded_weights_do_not_hang_on_the_file(tiny_llama):
    path, tensors = tiny_llama()
    model = load(path).model
    with (path / "model.safetensors").open("r+b") as file:
        file.write(b"\xff" * (path / "model.safetensors").stat().st_size)
    np.testing.assert_array_equal(
        model.model.embed_tokens.embedding[...], tensors["model.embed_tokens.weight"]
    )


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
def test_nan_is_refused_infinity_is_not(tiny_llama, name):
    path, tensors = tiny_llama()
    tensors[name].flat[7] = np.inf
    rewrite(path, tensors)
    load(path)
    tensors[name].flat[5] = np.nan
    rewrite(path, tensors)
    assert f"{path}: tensor {name}: NaN" in message(path)


def test_missing_tensors(tiny_llama):
    path, tensors = tiny_llama()
    for name in [name for name in tensors if "layers.1." in name]:
        del tensors[name]
    rewrite(path, tensors)
    assert "9 tensors are missing: model.layers.1." in message(path)
    assert message(path).endswith(" and 5 more")


def test_unexpected_tensor(tiny_llama):
    path, tensors = tiny_llama()
    rewrite(path, tensors | {"model.layers.0.self_attn.q_proj.bias": np.zeros(32, np.float32)})
    assert (
        "1 tensors are not part of the model that config.json describes: "
        "model.layers.0.self_attn.q_proj.bias"
    ) in message(path)


def test_shape_mismatch(tiny_llama):
    path, tensors = tiny_llama()
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(path, tensors | {name: np.zeros((48, 31), np.float32)})
    assert f"tensor {name} has shape [48, 31], config.json asks for [48, 32]" in message(path)


def test_a_tied_head_may_be_stored(tiny_llama):
    path, tensors = tiny_llama(tie_word_embeddings=True)
    head = tensors["model.embed_tokens.weight"].copy()
    rewrite(path, tensors | {"lm_head.weight": head})
    assert "lm_head.weight" not in parameters(load(path).model)
    head[0, 0] += 1
    rewrite(path, tensors | {"lm_head.weight": head})
    assert "but lm_head.weight differs from model.embed_tokens.weight" in message(path)


def test_old_rotary_buffers_are_passed_over(tiny_llama):
    path, tensors = tiny_llama()
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(path, tensors | {name: np.zeros(4, np.float32)})
    assert name not in parameters(load(path).model)


def test_unknown_architecture_names_the_directory(tiny_llama):
    path, _ = tiny_llama(model_type="gpt2", architectures=["GPT2LMHeadModel"])
    rewrite(path, {"wte.weight": np.zeros((97, 32), np.float32)})
    assert message(path).startswith(f"{path}: ") and "gpt2" in message(path)


@pytest.mark.parametrize("asked", [None, jnp.bfloat16])
def test_float64_is_held_in_float32(tiny_llama, asked):
    path, _ = tiny_llama(np.float64)
    dtype = load(path, asked).model.lm_head.kernel[...].dtype
    assert dtype == (jnp.float32 if asked is None else asked)


def test_sharded(tiny_llama):
    path, tensors = tiny_llama()
    (path / "model.safetensors").unlink()
    names = list(tensors)
    for shard, part in (("a.safetensors", names[:5]), ("b.safetensors", names[5:])):
        safetensors.numpy.save_file({name: tensors[name] for name in part}, path / shard)
    weight_map = {name: "a.safetensors" if name in names[:5] else "b.safetensors" for name in names}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name, array in parameters(load(path).model).items():
        np.testing.assert_array_equal(array, tensors[name])


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is counted as Linux does")
@pytest.mark.parametrize("asked", ["None", "jax.numpy.float32"])
def test_one_copy_in_memory(tiny_llama, asked):
    """Loading 136 MB of bfloat16 takes little more than what is loaded."""
    sizes = {"vocab_size": 32000, "hidden_size": 768, "intermediate_size": 3072}
    heads = {"num_attention_heads": 12, "num_key_value_heads": 12, "head_dim": 64}
    path, _ = tiny_llama(ml_dtypes.bfloat16, **sizes, **heads, num_hidden_layers=2)
    program = f"""
import resource, jax
from flax import nnx
from qjax_checkpoints.load import load
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
jax.numpy.zeros(3).astype("bfloat16").block_until_ready()
before = peak()
state = nnx.state(load({str(path)!r}, {asked}).model)
print(peak() - before, sum(array.nbytes for array in jax.tree.leaves(state)))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    taken, loaded = map(int, done.stdout.split())
    assert loaded > 100_000_000
    # The largest tensor, the token table, is there twice for a moment.
    assert taken < loaded * 1.3 + 60_000_000, (taken, loaded)


def test_casts_round_to_nearest(tiny_llama):
    path, tensors = tiny_llama()
    loaded = parameters(load(path, jnp.bfloat16).model)
    for name, array in tensors.items():
        expected = array.astype(ml_dtypes.bfloat16)
        assert np.array_equal(loaded[name].view(np.uint16), expected.view(np.uint16)), name
