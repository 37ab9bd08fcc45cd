# SPDX-License-Identifier: Apache-2.0
"""qjax's own directory holds every scheme, bit for bit, and says what it cannot read."""

import functools
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qjax import (
    Method,
    Recipe,
    calibrate,
    dequantize,
    nnx_layers,
    quantize_model,
    quantize_sequentially,
)
from qjax.algorithms import gptq, llm_int8
from qjax.nnx_layers import quantized_layers
from qjax_checkpoints.load import load
from qjax_checkpoints.save import check_format, save
from qjax_models import Decoder, blockwise, rotatable

forward = nnx.jit(Decoder.__call__)
SCHEMES = [
    "w4a16-g16",
    "w3a16-g16-asym",
    "w2a16-channel",
    "nf4-g16",
    "w8a8",
    "w4afp8-g16",
    "fp8-dynamic",
    "fp8-block",
    "fp8-e5m2",
    "mxfp8-a8",
    "nvfp4",
]


@pytest.fixture
def write(write_quantized):
    return functools.partial(write_quantized, format="orbax")


def message(path) -> str:
    with pytest.raises(ValueError) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_round_trip(write, scheme, assert_same_model):
    model, path = write(scheme)
    checkpoint = load(path)
    assert checkpoint.kind == "qjax"
    assert_same_model(model, checkpoint.model)


def test_a_model_that_turns_inputs_at_run_time(quantizable_llama, tmp_path, assert_same_model):
    recipe = Recipe.uniform("w4a4-g16")
    form = rotatable(quantizable_llama.model, recipe)
    model, _ = quantize_sequentially(
        form, blockwise, np.zeros((0, 1), np.int32), recipe, method="rotation"
    )
    for format in ("compressed-tensors", "dense"):
        with pytest.raises(ValueError, match="turns the inputs of down_proj .*orbax"):
            save(model, quantizable_llama, tmp_path / "refused", format)
    with pytest.raises(ValueError, match="turns the inputs"):  # before the work, too
        check_format(form, recipe, "compressed-tensors")
    assert not (tmp_path / "refused").exists()
    save(model, quantizable_llama, tmp_path / "out", "orbax")
    loaded = load(tmp_path / "out").model
    assert loaded.config == model.config and loaded.config.online_hadamard
    assert_same_model(model, loaded)
    description = json.loads((tmp_path / "out" / "qjax.json").read_text())
    (tmp_path / "out" / "qjax.json").write_text(json.dumps(description | {"online_hadamard": 1}))
    assert "online_hadamard must be true or false" in message(tmp_path / "out")


def test_a_quantized_embedding(write, assert_same_model):
    rules = [[".*embed_tokens", "w8a16-channel"], ["lm_head", "w8a16-channel"], [".*", "w4a16-g16"]]
    model, path = write(Recipe.from_json(rules))
    loaded = load(path).model
    assert_same_model(model, loaded)
    assert "model/embed_tokens" in quantized_layers(loaded)
    tokens = jnp.arange(9)[None]
    np.testing.assert_array_equal(forward(model, tokens), forward(loaded, tokens))


@pytest.fixture
def with_outliers(quantizable_llama) -> Decoder:
    """Some inputs of some layers are held as they are."""
    model = quantizable_llama.model
    tokens = np.random.default_rng(0).integers(0, 97, (4, 32), dtype=np.int32)
    observed = calibrate(model, [tokens], hessians=False)
    method = Method(outliers=llm_int8.Options(threshold=1.5))
    quantized, report = quantize_model(model, "w8a8", observed, method=method)
    kept = {layer.outliers for layer in report.quantized}
    assert 0 in kept and max(kept) > 0
    return quantized


def test_inputs_with_outliers(with_outliers, quantizable_llama, tmp_path, assert_same_model):
    save(with_outliers, quantizable_llama, tmp_path / "out", "orbax")
    loaded = load(tmp_path / "out").model
    assert_same_model(with_outliers, loaded)
    tokens = jnp.arange(9)[None]
    np.testing.assert_array_equal(forward(with_outliers, tokens), forward(loaded, tokens))

    path = tmp_path / "out" / "qjax.json"
    description = json.loads(path.read_text())
    entries = description["parameters"].items()
    name, entry = next((n, e) for n, e in entries if "outliers" in e.get("leaves", {}))
    columns = entry["leaves"].pop("columns")
    path.write_text(json.dumps(description))
    assert message(tmp_path / "out") == (
        f"{path}: parameter {name}: its description is broken or incomplete"
    )
    entry["leaves"]["columns"] = columns | {"dtype": "float32"}
    path.write_text(json.dumps(description))
    assert f"{path}: parameter {name}: columns of outliers must be int32" in message(path.parent)


def test_no_other_format_has_a_place_for_outliers(with_outliers, quantizable_llama, tmp_path):
    with pytest.raises(ValueError) as caught:
        save(with_outliers, quantizable_llama, tmp_path / "out", "compressed-tensors")
    assert str(caught.value).startswith("layer model.layers.")
    assert "outliers" in str(caught.value) and "--format orbax" in str(caught.value)
    save(with_outliers, quantizable_llama, tmp_path / "dense", "dense")
    (name, q), *_ = [(n, q) for n, q in quantized_layers(with_outliers).items() if q.outliers is not None]  # fmt: skip
    layer = dict(nnx_layers.quantizable_layers(load(tmp_path / "dense").model))[name]
    np.testing.assert_array_equal(nnx_layers.weight_of(layer), dequantize(q))


@pytest.fixture
def regrouped(quantizable_llama) -> Decoder:
    """Groups are runs of the order in which GPTQ took the inputs."""
    tokens = np.random.default_rng(0).integers(0, 97, (4, 32), dtype=np.int32)
    method = Method(rounding=gptq.Options(order="regrouped", grids="updated"))
    model, report = quantize_sequentially(
        quantizable_llama.model, blockwise, tokens, "w4a16-g16-asym", method=method
    )
    assert {layer.method for layer in report.quantized if "layers" in layer.path} == {"gptq"}
    return model


def test_inputs_in_an_order_of_their_own(regrouped, quantizable_llama, tmp_path, assert_same_model):
    save(regrouped, quantizable_llama, tmp_path / "out", "orbax")
    loaded = load(tmp_path / "out").model
    assert_same_model(regrouped, loaded)
    orders = [q.order is not None for q in quantized_layers(loaded).values()]
    assert sum(orders) >= 14
    tokens = jnp.arange(9)[None]
    np.testing.assert_array_equal(forward(regrouped, tokens), forward(loaded, tokens))

    path = tmp_path / "out" / "qjax.json"
    description = json.loads(path.read_text())
    entries = description["parameters"].items()
    name, entry = next((n, e) for n, e in entries if "order" in e.get("leaves", {}))
    entry["leaves"]["order"]["dtype"] = "float32"
    path.write_text(json.dumps(description))
    inputs = entry["shape"][0]
    assert f"{path}: parameter {name}: the order of inputs must be int32 [{inputs}]" in message(
        path.parent
    )
    with pytest.raises(ValueError, match="layer model.* its inputs are regrouped .*--format orbax"):
        save(regrouped, quantizable_llama, tmp_path / "other", "compressed-tensors")
    assert not (tmp_path / "other").exists()


def test_a_plain_model(quantizable_llama, tmp_path, assert_same_model):
    save(quantizable_llama.model, quantizable_llama, tmp_path / "out", "orbax")
    assert_same_model(quantizable_llama.model, load(tmp_path / "out").model)


def test_asked_dtype(write, quantizable_llama):
    model, path = write("w4a16-g16")
    loaded = load(path, jnp.bfloat16).model
    table = quantizable_llama.model.model.embed_tokens.embedding[...]
    np.testing.assert_array_equal(
        loaded.model.embed_tokens.embedding[...], table.astype(jnp.bfloat16)
    )
    a = quantized_layers(model)["model/layers/0/mlp/up_proj"]
    b = quantized_layers(loaded)["model/layers/0/mlp/up_proj"]
    assert b.dtype == jnp.bfloat16 and b.scale.dtype == jnp.float32
    np.testing.assert_array_equal(a.codes, b.codes)


def test_newer_versions_are_refused(write):
    _, path = write("w4a16-g16")
    description = json.loads((path / "qjax.json").read_text())
    (path / "qjax.json").write_text(json.dumps(description | {"version": 2}))
    assert message(path) == (
        f"{path}/qjax.json: version 2 of the format, this qjax reads up to 1; update qjax"
    )


@pytest.mark.parametrize("description", [{}, {"format": "other", "version": 1}, {"version": "1"}])
def test_not_a_description(write, description):
    _, path = write("w4a16-g16")
    (path / "qjax.json").write_text(json.dumps(description))
    assert message(path) == f"{path}/qjax.json: not the description of a qjax directory"


def test_incomplete_description(write):
    _, path = write("w4a16-g16")
    (path / "qjax.json").write_text(json.dumps({"format": "qjax", "version": 1}))
    assert message(path) == f"{path}/qjax.json: needs dtype and parameters"


def test_missing_arrays(write):
    _, path = write("w4a16-g16")
    shutil.rmtree(path / "arrays")
    assert message(path).startswith(f"{path}/arrays: the Orbax arrays cannot be restored")


def test_broken_arrays(write):
    _, path = write("w4a16-g16")
    for file in (path / "arrays").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(b"broken")
    assert message(path).startswith(f"{path}/arrays: the Orbax arrays cannot be restored")


def test_another_configuration(write):
    _, path = write("w4a16-g16")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"vocab_size": 98}))
    assert "has shape [32, 97], config.json asks for [32, 98]" in message(path)
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    assert "does not fit config.json: 9 parameters are only in one of them" in message(path)
