# SPDX-License-Identifier: Apache-2.0
"""Scales of keys and values in files: out, in, from others, streamed, and what cannot hold them."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from qjax import kv_cache, quantize_model, quantize_sequentially
from qjax.method import Method
from qjax.scheme import Recipe
from qjax_checkpoints import streaming
from qjax_checkpoints.load import load, open_plain
from qjax_checkpoints.parameters import abstract_plain
from qjax_checkpoints.save import save
from qjax_checkpoints.streaming import StreamedStorage
from qjax_models import Decoder, blockwise

pytestmark = pytest.mark.one_version

TOKENS = np.random.default_rng(0).integers(0, 97, (6, 16)).astype(np.int32)
KV = "kv-fp8-static"
K_SCALE = "model.layers.0.self_attn.k_scale"


@pytest.fixture
def waiting(quantizable_llama) -> Decoder:
    return quantizable_llama.model.with_kv_cache(KV)


@pytest.fixture
def write(quantizable_llama, waiting, tmp_path):
    def write(format: str, scheme: str = "w8a16-channel") -> tuple[Decoder, Path]:
        model, _ = quantize_sequentially(waiting, blockwise, TOKENS, scheme, method="rtn")
        save(model, quantizable_llama, tmp_path / "out", format)
        return model, tmp_path / "out"

    return write


def scales(model: Decoder) -> dict[str, jax.Array]:
    return {path: scale.get_value() for path, scale in kv_cache.scales_of(model).items()}


def assert_same_scales(ours: Decoder, theirs: Decoder) -> None:
    assert ours.config == theirs.config and ours.config.kv_cache == KV
    expected = scales(theirs)
    assert len(expected) == 2 * theirs.config.num_layers
    for path, scale in scales(ours).items():
        assert scale.dtype == jnp.float32 and scale.shape == (1,)
        assert float(scale[0]) == float(expected[path][0])


@pytest.mark.parametrize("format", ["compressed-tensors", "orbax"])
@pytest.mark.parametrize("scheme", ["w8a16-channel", "fp8-static"])
def test_round_trip(write, format, scheme, assert_same_model):
    model, path = write(format, scheme)
    checkpoint = load(path)
    assert checkpoint.notes == ()
    assert_same_model(model, checkpoint.model)
    assert_same_scales(checkpoint.model, model)
    tokens = jnp.asarray(TOKENS)
    np.testing.assert_array_equal(checkpoint.model(tokens), model(tokens))
    assert_same_scales(load(path, jnp.bfloat16).model, model)  # never cast
    save(checkpoint.model, checkpoint, path.parent / "again", format)
    assert_same_model(model, load(path.parent / "again").model)


@pytest.mark.parametrize("scheme", kv_cache.DYNAMIC)
def test_a_scheme_without_scales_is_a_word_in_an_orbax_directory(
    quantizable_llama, tmp_path, scheme, assert_same_model
):
    model = quantizable_llama.model.with_kv_cache(scheme)
    model, _ = quantize_model(model, "w8a16-channel")
    save(model, quantizable_llama, tmp_path / "out", "orbax")
    loaded = load(tmp_path / "out").model
    assert loaded.config.kv_cache == scheme
    assert_same_model(model, loaded)
    tokens = jnp.asarray(TOKENS)
    np.testing.assert_array_equal(loaded(tokens), model(tokens))
    for format, why in {"compressed-tensors": "static scales alone", "dense": "cannot say"}.items():
        with pytest.raises(ValueError, match=f"as {scheme}.*{why}"):
            save(model, quantizable_llama, tmp_path / format, format)
        assert not (tmp_path / format).exists()


def test_what_the_file_says(write):
    model, path = write("compressed-tensors")
    config = json.loads((path / "config.json").read_text())
    assert config["quantization_config"]["kv_cache_scheme"] == {
        "num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False,
    }  # fmt: skip
    tensors = safetensors.numpy.load_file(path / "model.safetensors")
    for name, scale in scales(model).items():
        stored = tensors[name.replace("/", ".")]
        assert stored.dtype == np.float32 and stored.tolist() == scale.tolist()


def change(path: Path, cache: object = None, **tensors: np.ndarray | None) -> None:
    config = json.loads((path / "config.json").read_text())
    if cache is not None:
        config["quantization_config"]["kv_cache_scheme"] = cache
        (path / "config.json").write_text(json.dumps(config))
    kept = safetensors.numpy.load_file(path / "model.safetensors") | tensors
    kept = {name: tensor for name, tensor in kept.items() if tensor is not None}
    safetensors.numpy.save_file(kept, path / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_scales_of_others(write, shape):
    """In 16 bits and in another shape; keys that are null or not known here."""
    model, path = write("compressed-tensors")
    theirs = np.full(shape, 0.0125, jnp.bfloat16)
    change(path, {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False,
                  "symmetric": True, "group_size": None, "observer": "minmax"},
           **{K_SCALE: theirs})  # fmt: skip
    loaded = scales(load(path).model)[K_SCALE.replace(".", "/")]
    assert loaded.dtype == jnp.float32 and loaded.tolist() == [float(theirs.reshape(())[()])]


@pytest.mark.parametrize(
    "cache",
    [
        {"num_bits": 8, "type": "int"},
        {"num_bits": 8, "type": "float", "dynamic": True},
        {"num_bits": 8, "type": "float", "strategy": "attn_head"},
        {"num_bits": 8, "type": "float", "symmetric": False},
        {"num_bits": 4, "type": "float"},
    ],
)
def test_a_cache_of_another_kind_stays_as_it_is(write, cache):
    model, path = write("compressed-tensors")
    change(path, cache)
    checkpoint = load(path)
    assert checkpoint.model.config.kv_cache is None and scales(checkpoint.model) == {}
    assert checkpoint.notes == (
        "kv_cache_scheme is not used: the cache stays unquantized; only static e4m3 is read",
    )


def test_a_scheme_without_scales(write):
    model, path = write("compressed-tensors")
    change(path, **{name.replace("/", "."): None for name in scales(model)})
    checkpoint = load(path)
    assert checkpoint.model.config.kv_cache is None
    assert checkpoint.notes == (
        "kv_cache_scheme is not used, for there are no scales: the cache stays unquantized",
    )


def message(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_broken_scales_are_named(write):
    _, path = write("compressed-tensors")
    change(path, **{K_SCALE: np.array([-1.0], np.float32)})
    assert message(path) == f"{path}: tensor {K_SCALE}: must be a positive number, it is [-1.0]"
    change(path, **{K_SCALE: np.ones(2, np.float32)})
    assert K_SCALE in message(path) and "one number" in message(path)
    change(path, **{K_SCALE: None})
    assert K_SCALE in message(path) and "missing" in message(path)
    change(path, cache=[1], **{K_SCALE: np.ones(1, np.float32)})
    assert "kv_cache_scheme must be an object, not [1]" in message(path)


def test_broken_descriptions_are_named(write):
    _, path = write("orbax")
    description = json.loads((path / "qjax.json").read_text())
    assert description["kv_cache"] == KV
    (path / "qjax.json").write_text(json.dumps(description | {"kv_cache": "kv-int2"}))
    assert (
        "kv_cache must be null or one of kv-fp8-static, kv-fp8, kv-int8, kv-int4, not 'kv-int2'"
        in (message(path))
    )
    (path / "qjax.json").write_text(json.dumps(description | {"kv_cache": None}))
    assert "4 parameters are only in one of them" in message(path)


def test_refusals(waiting, quantizable_llama, tmp_path):
    model, _ = quantize_model(waiting, "w8a16-channel")
    for format in ("compressed-tensors", "orbax"):
        with pytest.raises(ValueError, match=r"k_scale: .*has not been found: qjax\.quantize_seq"):
            save(model, quantizable_llama, tmp_path / "out", format)
    with pytest.raises(ValueError, match="as kv-fp8-static, which a plain directory cannot say"):
        save(model, quantizable_llama, tmp_path / "out", "dense")
    assert not (tmp_path / "out").exists()


class Stopped(BaseException):
    """What ends a run here."""


def test_streamed_and_after_a_stop(tiny_llama, tmp_path, monkeypatch):
    source, _ = tiny_llama(intermediate_size=64)
    (source / "tokenizer.json").write_text("{}")
    checkpoint, recipe = load(source), Recipe.uniform("w4a16-g16")
    model, report = quantize_sequentially(
        checkpoint.model.with_kv_cache(KV), blockwise, TOKENS, recipe, method="gptq"
    )
    save(model, checkpoint, tmp_path / "whole", "compressed-tensors")

    def stream(out: str, resume: bool = False) -> None:
        directory, how = open_plain(source), Method.parse("gptq")
        identity = streaming.identify(directory, recipe, how, TOKENS, kv_cache=KV)
        assert identity != streaming.identify(directory, recipe, how, TOKENS)
        plain = abstract_plain(directory).with_kv_cache(KV)
        with streaming.streamed_output(
            directory, plain, recipe, tmp_path / out, identity, resume=resume
        ) as storage:
            _, report = quantize_sequentially(
                plain, blockwise, TOKENS, recipe, method=how, storage=storage
            )
            storage.complete(report.as_json() | {"run": identity})

    stream("streamed")
    release = StreamedStorage.release

    def stop(self, path, module):
        release(self, path, module)
        if path.endswith("layers/0"):
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(StreamedStorage, "release", stop)
        with pytest.raises(Stopped):
            stream("resumed")
    stream("resumed", resume=True)
    for out in ("streamed", "resumed"):
        for name in ("model.safetensors", "config.json"):
            ours, theirs = (tmp_path / folder / name for folder in (out, "whole"))
            assert ours.read_bytes() == theirs.read_bytes()
