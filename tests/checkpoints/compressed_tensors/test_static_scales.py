# SPDX-License-Identifier: Apache-2.0
"""Static input scales in files: written, read back to the bit, and refused where they make no sense."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from qjax import Method, Recipe, calibrate, quantize_model, quantize_sequentially
from qjax.nnx_layers import quantized_layers
from qjax_checkpoints import streaming
from qjax_checkpoints.directory import DESCRIPTION_FILE
from qjax_checkpoints.load import load, open_plain
from qjax_checkpoints.parameters import abstract_plain
from qjax_checkpoints.save import save
from qjax_models import Decoder, blockwise, join_projections, stack_experts

TOKENS = np.random.default_rng(0).integers(0, 97, (6, 16)).astype(np.int32)
Q_PROJ = "model.layers.0.self_attn.q_proj"
forward = nnx.jit(Decoder.__call__)


@pytest.fixture
def write(quantizable_llama, tmp_path):
    """Calibrates, quantizes and writes the tiny Llama; returns the model and the directory."""

    def write(recipe, format="compressed-tensors"):
        observed = calibrate(quantizable_llama.model, [TOKENS], hessians=False)
        model, report = quantize_model(quantizable_llama.model, recipe, observed)
        save(model, quantizable_llama, tmp_path / "out", format, report.as_json())
        return model, tmp_path / "out"

    return write


def tensors(path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(path / "model.safetensors")


def changed(path, **others) -> None:
    now = tensors(path) | others
    kept = {name: tensor for name, tensor in now.items() if tensor is not None}
    safetensors.numpy.save_file(kept, path / "model.safetensors", {"format": "pt"})


def changed_group(path, **arguments) -> None:
    config = json.loads((path / "config.json").read_text())
    (group,) = config["quantization_config"]["config_groups"].values()
    group["input_activations"] |= arguments
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("scheme", "format"),
    [
        ("fp8-static", "compressed-tensors"),
        ("fp8-static-tensor", "orbax"),
        ("w8a8-static", "compressed-tensors"),
        ("w4a8-g16-static", "orbax"),
        ("w4afp8-g16-static", "compressed-tensors"),
    ],
)
def test_round_trip(write, assert_same_model, format, scheme):
    model, path = write(scheme, format)
    loaded = load(path)
    assert loaded.notes == ()
    assert_same_model(model, loaded.model)
    held = quantized_layers(loaded.model)
    assert {q.scheme.name for q in held.values()} == {scheme} and len(held) == 14
    np.testing.assert_array_equal(forward(loaded.model, TOKENS), forward(model, TOKENS))
    report = json.loads((path / "qjax_report.json").read_text())
    told = {layer["path"]: layer["input_scale"] for layer in report["layers"]}
    assert {layer: float(q.input_scale) for layer, q in held.items()} == {p: told[p] for p in held}


def test_what_the_file_says(write):
    model, path = write("w8a8-static")
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    assert config["format"] == "int-quantized"
    assert config["config_groups"]["group_0"]["input_activations"] == {
        "num_bits": 8, "type": "int", "symmetric": True, "dynamic": False, "strategy": "tensor",
    }  # fmt: skip
    scale = tensors(path)[f"{Q_PROJ}.input_scale"]
    assert scale.dtype == np.float32 and scale.shape == (1,)
    assert scale[0] == model.model.layers[0].self_attn.q_proj.kernel[...].input_scale


def test_scales_as_others_write_them(write, assert_same_model):
    """Of no axes, in the model's 16 bits, and under a configuration that leaves defaults out."""
    model, path = write("w8a8-static")
    scale = np.float16(tensors(path)[f"{Q_PROJ}.input_scale"][0])
    changed(path, **{f"{Q_PROJ}.input_scale": np.asarray(scale)})
    changed_group(path, dynamic=None, strategy=None)
    q = model.model.layers[0].self_attn.q_proj.kernel
    q.set_value(q.get_value().replaced(input_scale=jnp.float32(scale)))
    assert_same_model(model, load(path).model)


@pytest.mark.parametrize("strategy", ["tensor", "channel"])
def test_what_is_static_in_another_way_is_read_as_dynamic_and_noted(write, strategy):
    _, path = write("w8a8-static")
    changed_group(path, strategy=strategy)
    if strategy == "tensor":
        changed(path, **{f"{Q_PROJ}.input_scale": None})
    loaded = load(path)
    count = 1 if strategy == "tensor" else 14
    assert loaded.notes == (
        f"{count} layers are said to have static input scales, but there is not one for all inputs: "
        "their inputs are quantized from their own values",
    )
    q = loaded.model.model.layers[0].self_attn.q_proj.kernel[...]
    assert q.input_scale is None and q.scheme.name == "w8a8"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros(1, np.float32), r"input_scale must be a positive number, it is \[0.0\]"),
        (np.full(1, np.inf, np.float32), r"input_scale must be a positive number, it is \[inf\]"),
        (np.full(1, np.nan, np.float32), r"input_scale must be a positive number, it is \[nan\]"),
        (np.ones(3, np.float32), r"input_scale has shape \[3\], .* needs \[1\]"),
    ],
)
def test_broken_scales_are_named(write, value, message):
    _, path = write("w8a8-static")
    changed(path, **{f"{Q_PROJ}.input_scale": value})
    with pytest.raises(ValueError, match=f"layer {Q_PROJ}: {message}$"):
        load(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda activations: activations.pop("static"),
        lambda activations: activations.update(static=1),
        lambda activations: activations.update(group_size=16),
    ],
)
def test_broken_descriptions(write, change):
    _, path = write("fp8-static", "orbax")
    description = json.loads((path / DESCRIPTION_FILE).read_text())
    change(description["parameters"]["model/layers/0/self_attn/q_proj/kernel"]["activations"])
    (path / DESCRIPTION_FILE).write_text(json.dumps(description))
    with pytest.raises(ValueError, match="its description is broken"):
        load(path)


def test_scales_that_are_none_are_not_read_or_written(quantizable_llama, write, tmp_path):
    model, _ = write("w8a8-static", "orbax")
    layer = model.model.layers[0].self_attn.q_proj.kernel
    layer.set_value(layer.get_value().replaced(input_scale=jnp.float32(-1)))
    save(model, quantizable_llama, tmp_path / "negative", "orbax")
    with pytest.raises(ValueError, match="q_proj/kernel: the static input scale must be positive"):
        load(tmp_path / "negative")
    layer.set_value(layer.get_value().replaced(input_scale=None))
    with pytest.raises(
        ValueError, match=f"^layer {Q_PROJ}: .* needs the input scale that calibration"
    ):
        save(model, quantizable_llama, tmp_path / "other", "compressed-tensors")


@pytest.mark.one_version
def test_part_by_part_it_is_the_same_bytes(tiny_llama, tmp_path):
    source, _ = tiny_llama(intermediate_size=64)
    (source / "tokenizer.json").write_text("{}")
    recipe = Recipe.from_json([[".*down_proj", "w4a8-static"], [".*", "w8a8-static"]])
    checkpoint, directory = load(source), open_plain(source)
    model, report = quantize_sequentially(checkpoint.model, blockwise, TOKENS, recipe, method="rtn")
    save(model, checkpoint, tmp_path / "whole", "compressed-tensors")
    plain = abstract_plain(directory)
    method = Method.parse("rtn")
    identity = streaming.identify(directory, recipe, method, TOKENS, experts="routed")
    with streaming.streamed_output(
        directory, plain, recipe, tmp_path / "parts", identity, resume=False
    ) as storage:
        _, streamed = quantize_sequentially(
            plain, blockwise, TOKENS, recipe, method=method, storage=storage
        )
        storage.complete(streamed.as_json())
    ours, theirs = tensors(tmp_path / "parts"), tensors(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)
    assert [layer.input_scale for layer in streamed.layers] == [
        x.input_scale for x in report.layers
    ]


@pytest.mark.parametrize("experts", ["all", "routed"])
def test_experts(tiny_mixtral, tmp_path, experts):
    source = load(tiny_mixtral)
    model, report = quantize_sequentially(
        source.model, blockwise, TOKENS, "w8a8-static", method="rtn", experts=experts
    )
    scales = {layer.path: layer.input_scale for layer in report.quantized}
    of_inputs = [
        s for path, s in scales.items() if "layers/0/" in path and path.endswith(("w1", "w3"))
    ]
    # 96 tokens, and 16 for each of 32 inputs would be enough: all are filled up with the others.
    assert len(of_inputs) == 8 and len(set(of_inputs)) == 1
    assert (
        len({s for path, s in scales.items() if "layers/0/" in path and path.endswith("w2")}) == 4
    )
    save(model, source, tmp_path / "out", "compressed-tensors")
    loaded = load(tmp_path / "out").model
    apart = forward(loaded, TOKENS)
    np.testing.assert_array_equal(apart, forward(model, TOKENS))
    stack_experts(loaded)
    stack = loaded.model.layers[0].sparse.stack.w2.kernel[...]
    assert stack.input_scale.shape == (4,) and stack.scheme.name == "w8a8-static"
    np.testing.assert_allclose(forward(loaded, TOKENS), apart, atol=1e-5)


def test_layers_of_one_input_are_joined_while_they_have_one_scale(write):
    model, path = write("w8a8-static")
    loaded = load(path).model
    up = loaded.model.layers[1].mlp.up_proj.kernel
    up.set_value(up.get_value().replaced(input_scale=up.get_value().input_scale * 1.5))
    expected = forward(loaded, TOKENS)
    join_projections(loaded)
    first, second = loaded.model.layers
    assert first.mlp.fused and first.self_attn.fused and second.self_attn.fused
    assert not second.mlp.fused
    joined = first.mlp.gate_up_proj.kernel[...]
    assert joined.input_scale == model.model.layers[0].mlp.gate_proj.kernel[...].input_scale
    np.testing.assert_allclose(forward(loaded, TOKENS), expected, atol=1e-5)
