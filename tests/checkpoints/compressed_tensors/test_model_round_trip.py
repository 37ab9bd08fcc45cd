# SPDX-License-Identifier: Apache-2.0
"""Whole models out and in again, and each way in which a directory can contradict itself."""

import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qjax import Recipe, dequantize, quantize_model
from qjax.nnx_layers import quantized_layers
from qjax.qtensor import unpacked
from qjax_checkpoints.load import load
from qjax_checkpoints.safetensors_file import open_safetensors
from qjax_checkpoints.save import save
from qjax_checkpoints.shards import pending_array, write_safetensors
from qjax_models import Decoder

forward = nnx.jit(Decoder.__call__)
Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def write(write_quantized):
    return functools.partial(write_quantized, format="compressed-tensors")


def config_of(path) -> dict:
    return json.loads((path / "config.json").read_text())["quantization_config"]


def change_config(path, **changes) -> None:
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] |= changes
    (path / "config.json").write_text(json.dumps(config))


def change_tensors(path, drop=(), **arrays) -> None:
    """Rewrites the weights; by our reader, because the safetensors package cannot read float8."""
    file = open_safetensors(path / "model.safetensors")
    tensors = {name: np.array(file.tensor(name)) for name in file.entries} | arrays
    kept = {name: pending_array(array) for name, array in tensors.items() if name not in drop}
    write_safetensors(path / "model.safetensors", kept)


def message(path) -> str:
    with pytest.raises(ValueError) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "scheme",
    ["w4a16-g16-asym", "w3a16-channel", "w8a8", "w4a8-g32", "w4afp8-g16", "fp8-dynamic", "mxfp4"],
)
def test_round_trip(write, scheme, assert_same_model):
    model, path = write(scheme)
    checkpoint = load(path)
    assert checkpoint.kind == "compressed-tensors" and checkpoint.notes == ()
    assert_same_model(model, checkpoint.model)


def test_blocks_larger_than_the_layers(write):
    """A group of activations that is a whole token is written as a token's."""
    model, path = write("fp8-block")
    assert config_of(path)["config_groups"]["group_0"]["weights"]["block_structure"] == [128, 128]
    loaded = load(path).model
    tokens = jnp.arange(12)[None]
    np.testing.assert_array_equal(forward(model, tokens), forward(loaded, tokens))
    for a, b in zip(
        quantized_layers(model).values(), quantized_layers(loaded).values(), strict=True
    ):
        assert b.activations is not None and b.activations.group_size is None
        assert a.tile == b.tile
        np.testing.assert_array_equal(dequantize(a), dequantize(b))


def test_nvfp4_round_trip(write):
    """The file holds the reciprocal of the tensor scale, which costs its last bit."""
    model, path = write("nvfp4")
    for (_, a), (_, b) in zip(
        quantized_layers(model).items(), quantized_layers(load(path).model).items(), strict=True
    ):
        np.testing.assert_array_equal(a.codes, b.codes)
        np.testing.assert_allclose(a.tensor_scale, b.tensor_scale, rtol=2**-23)


def test_minimal_configuration(write):
    _, path = write("w4a16-g16")
    assert config_of(path) == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": 16,
                    "dynamic": False,
                },
            }
        },
        "ignore": ["lm_head"],
    }


def test_input_activations(write):
    _, path = write("w4a8-channel")
    group = config_of(path)["config_groups"]["group_0"]
    assert group["format"] == "pack-quantized"  # else compressed-tensors guesses int-quantized
    assert group["input_activations"] == {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "dynamic": True,
        "strategy": "token",
    }


def test_float_activations_of_packed_integers(write):
    """What llm-compressor calls W4AFP8."""
    _, path = write("w4afp8-g16")
    config = config_of(path)
    group = config["config_groups"]["group_0"]
    assert config["format"] == group["format"] == "pack-quantized"  # vLLM reads no other
    assert group["weights"] == {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 16,
        "dynamic": False,
    }
    assert group["input_activations"] == {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "dynamic": True,
        "strategy": "token",
    }


def test_several_groups(write, assert_same_model):
    rules = [[".*down_proj", "w8a16-channel"], [".*q_proj", "fp8"], [".*o_proj", None]]
    model, path = write(Recipe.from_json([*rules, [".*", "w4a16-g16-asym"]]))
    config = config_of(path)
    assert config["format"] == "mixed-precision"
    formats = {}
    for group in config["config_groups"].values():
        formats |= dict.fromkeys(group["targets"], group["format"])
    assert formats["model.layers.1.mlp.down_proj"] == "pack-quantized"
    assert formats["model.layers.1.self_attn.q_proj"] == "float-quantized"
    assert sorted(config["ignore"]) == [
        "lm_head",
        *(f"model.layers.{i}.self_attn.o_proj" for i in range(2)),
    ]
    assert len(formats) + len(config["ignore"]) == 15  # every linear layer once
    loaded = load(path).model
    assert_same_model(model, loaded)
    # It computes with them too: the layers have their hooks.
    tokens = jnp.arange(12)[None]
    np.testing.assert_array_equal(forward(model, tokens), forward(loaded, tokens))


def test_a_tied_head_is_ignored(tiny_llama, tmp_path, assert_same_model):
    source = load(tiny_llama(tie_word_embeddings=True)[0])
    model, _ = quantize_model(source.model, "w4a16-g16")
    save(model, source, tmp_path / "out", "compressed-tensors")
    assert config_of(tmp_path / "out")["ignore"] == ["lm_head"]
    assert_same_model(model, load(tmp_path / "out").model)


def test_a_quantized_head(write, assert_same_model):
    model, path = write(Recipe.from_json([["lm_head", "w8a16-channel"], [".*", "w4a16-g16"]]))
    assert config_of(path)["ignore"] == []
    assert_same_model(model, load(path).model)


@pytest.mark.parametrize("asked", [jnp.float32, jnp.bfloat16])
def test_asked_dtype_leaves_codes_and_scales(write, asked):
    model, path = write("w4a16-g16")
    loaded = load(path, asked).model
    a = quantized_layers(model)["model/layers/0/mlp/up_proj"]
    b = quantized_layers(loaded)["model/layers/0/mlp/up_proj"]
    np.testing.assert_array_equal(a.codes, b.codes)
    assert b.dtype == asked and b.scale.dtype == jnp.float32
    assert loaded.model.embed_tokens.embedding[...].dtype == asked
    np.testing.assert_array_equal(dequantize(a).astype(asked), dequantize(b))


@pytest.mark.parametrize(
    ("scheme", "reason"), [("nf4-g16", "no format holds nf4"), ("fp8-e5m2", "no format holds e5m2")]
)
def test_refused_schemes_name_the_layer(write, tmp_path, scheme, reason):
    with pytest.raises(ValueError) as caught:
        write(scheme)
    assert str(caught.value) == (
        f"layer model.layers.0.mlp.down_proj: compressed-tensors: {reason}; "
        "--format orbax holds everything"
    )
    assert not (tmp_path / "out").exists()


def test_refused_embedding(write):
    rules = [[".*embed_tokens", "w8a16-channel"], [".*", "w4a16-g16"]]
    with pytest.raises(
        ValueError, match="layer model.embed_tokens: compressed-tensors: only linear"
    ):
        write(Recipe.from_json(rules))


def test_nothing_quantized(quantizable_llama, tmp_path):
    with pytest.raises(ValueError, match="no layer is quantized; --format dense writes a plain"):
        save(quantizable_llama.model, quantizable_llama, tmp_path / "out", "compressed-tensors")


# Reading what others write.


def group_with(path, targets):
    group = config_of(path)["config_groups"]["group_0"]
    return group | {"targets": targets}


@pytest.mark.parametrize(
    "targets",
    [
        ["Linear"],
        [r"re:.*_proj$"],
        [r"re:model\.layers\.\d+\.(self_attn|mlp)\..*"],
        ["re:.*mlp.*", "re:.*self_attn.*"],
    ],
)
def test_targets(write, targets, assert_same_model):
    model, path = write("w4a16-g16")
    change_config(path, config_groups={"any": group_with(path, targets)}, ignore=["re:.*lm_head"])
    assert_same_model(model, load(path).model)


def test_nulls_and_unknown_keys(write, assert_same_model):
    model, path = write("w4a16-g16")
    group = group_with(path, ["Linear"])
    group["weights"] |= {"observer": "minmax", "observer_kwargs": {}, "zp_dtype": None, "new": 1}
    group |= {"input_activations": None, "output_activations": None, "format": "pack-quantized"}
    change_config(
        path,
        config_groups={"group_0": group},
        version="0.99",
        kv_cache_scheme=None,
        sparsity_config={},
        global_compression_ratio=None,
        ignore=None,
    )
    assert_same_model(model, load(path).model)


def test_the_exact_name_wins(write):
    _, path = write("w4a16-g16")
    group = group_with(path, ["Linear"])
    wrong = group | {"weights": group["weights"] | {"num_bits": 8}}
    change_config(path, config_groups={"a": wrong, "b": group | {"targets": [r"re:.*_proj"]}})
    load(path)
    change_config(path, config_groups={"b": group | {"targets": [r"re:.*_proj"]}, "a": wrong})
    load(path)
    change_config(path, config_groups={"a": wrong})
    assert "weight_packed has shape" in message(path) and "int8 in tiles of" in message(path)


def test_a_targeted_layer_left_plain(write, quantizable_llama):
    """The tensors decide: a configuration may target more than was quantized."""
    _, path = write(Recipe.from_json([[".*o_proj", None], [".*", "w4a16-g16"]]))
    change_config(path, ignore=[])
    loaded = load(path).model
    np.testing.assert_array_equal(
        loaded.model.layers[0].self_attn.o_proj.kernel[...],
        quantizable_llama.model.model.layers[0].self_attn.o_proj.kernel[...],
    )


def test_static_scales_and_cache_scales_are_noted(write, assert_same_model):
    model, path = write("fp8")
    group = group_with(path, ["Linear"])
    static = {"num_bits": 8, "type": "float", "strategy": "channel", "dynamic": False}
    change_config(
        path,
        config_groups={"g": group | {"input_activations": static}},
        kv_cache_scheme={"num_bits": 8, "type": "float", "dynamic": True},
    )
    one = np.ones(1, np.float32)
    change_tensors(path, **{f"{Q_PROJ}.input_scale": one, "model.layers.0.self_attn.k_scale": one})
    checkpoint = load(path)
    assert checkpoint.notes == (
        "kv_cache_scheme is not used: the cache stays unquantized; only static e4m3 is read",
        "14 layers are said to have static input scales, but there is not one for all inputs: "
        "their inputs are quantized from their own values",
    )
    assert_same_model(model, checkpoint.model)


def test_other_methods_are_named(write):
    _, path = write("w4a16-g16")
    change_config(path, quant_method="gptq")
    assert message(path) == (
        f"{path}: quantized by 'gptq'; of quantized models only compressed-tensors can be read"
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"config_groups": {}}, "quantization_config has no config_groups"),
        ({"config_groups": {"g": {"weights": {}}}}, "g needs targets and weights"),
        ({"format": "marlin-24"}, "the compressed-tensors format 'marlin-24' cannot be read"),
        (
            {"config_groups": {"g": {"targets": ["Conv"], "weights": {"num_bits": 4}}}},
            "no entry of config_groups targets it",
        ),
        (
            {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 6}}}},
            "weights of type int with 6 bits cannot be read",
        ),
        (
            {"config_groups": {"g": {"targets": ["Linear"], "weights": {"strategy": "block"}}}},
            "weights with strategy 'block', size=None cannot be read",
        ),
    ],
)
def test_configurations_that_cannot_be_read(write, changes, expected):
    _, path = write("w4a16-g16")
    change_config(path, **changes)
    assert expected in message(path) and str(path) in message(path)


def test_missing_zero_points(write):
    _, path = write("w4a16-g16-asym")
    change_tensors(path, drop=[f"{Q_PROJ}.weight_zero_point"])
    assert (
        f"layer {Q_PROJ}: needs ['weight_packed', 'weight_scale', 'weight_zero_point']"
        in message(path)
    )


def test_missing_layer(write):
    _, path = write("w4a16-g16")
    change_tensors(path, drop=[f"{Q_PROJ}.weight_{s}" for s in ("packed", "scale", "shape")])
    assert f"1 tensors are missing: {Q_PROJ}.weight" in message(path)


def test_wrong_scale_shape(write):
    _, path = write("w4a16-g16")
    change_tensors(path, **{f"{Q_PROJ}.weight_scale": np.ones((32, 3), np.float32)})
    assert (
        f"layer {Q_PROJ}: weight_scale has shape [32, 3], int4 in tiles of [1, 16] needs [32, 2]"
    ) in message(path)


def test_transposed_scales(write):
    _, path = write("w4a16-g16")
    change_tensors(path, **{f"{Q_PROJ}.weight_scale": np.ones((2, 32), np.float32)})
    assert f"layer {Q_PROJ}: weight_scale has shape [2, 32], int4 in tiles of" in message(path)


def test_scales_of_fewer_axes(write, assert_same_model):
    model, path = write("w4a16-channel")
    scale = open_safetensors(path / "model.safetensors").tensor(f"{Q_PROJ}.weight_scale")
    change_tensors(path, **{f"{Q_PROJ}.weight_scale": scale[:, 0].copy()})
    assert_same_model(model, load(path).model)


def test_codes_of_another_dtype(write):
    """What a `frozen` checkpoint holds: scales beside weights that are floats still."""
    _, path = write("w8a8")
    change_tensors(path, **{f"{Q_PROJ}.weight": np.ones((32, 32), np.float32)})
    assert f"layer {Q_PROJ}: weight is float32, int8 needs int8" in message(path)


def test_wrong_weight_shape(write):
    _, path = write("w4a16-g16")
    change_tensors(path, **{f"{Q_PROJ}.weight_shape": np.array([32, 64])})
    assert "weight_shape is not the [32, 32] of config.json" in message(path)


def test_group_order(write, assert_same_model):
    model, path = write("w4a16-g16")
    order = np.arange(32, dtype=np.int32) // 16
    change_tensors(path, **{f"{Q_PROJ}.weight_g_idx": order})
    assert_same_model(model, load(path).model)
    change_tensors(path, **{f"{Q_PROJ}.weight_g_idx": np.full(32, -1, np.int32)})  # none was found
    assert_same_model(model, load(path).model)


@pytest.mark.parametrize("scheme", ["w4a16-g16", "w8a16-g8-asym", "w3a16-g16-asym"])
def test_groups_of_inputs_that_do_not_follow_each_other(write, scheme, tmp_path):
    """An old file of `actorder: group`: (q - z[g_idx]) s[g_idx], to the bit; and no new one is written."""
    model, path = write(scheme)
    before = quantized_layers(model)["model/layers/0/self_attn/q_proj"]
    size, config = before.tile[0], config_of(path)
    groups = np.random.default_rng(0).permutation(32).astype(np.int32) // size
    config["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    change_config(path, **config)
    change_tensors(path, **{f"{Q_PROJ}.weight_g_idx": groups})
    checkpoint = load(path)
    q = quantized_layers(checkpoint.model)["model/layers/0/self_attn/q_proj"]
    codes = np.asarray(unpacked(before), np.float32)
    zero = 0 if before.zero is None else np.asarray(before.zero, np.float32)[groups]
    expected = (codes - zero) * np.asarray(before.scale, np.float32)[groups]
    np.testing.assert_array_equal(dequantize(q), expected)
    np.testing.assert_array_equal(groups[q.order], np.arange(32) // size)
    assert q.scheme.name == scheme
    others = quantized_layers(checkpoint.model)
    assert [name for name, other in others.items() if other.order is not None] == [
        "model/layers/0/self_attn/q_proj"
    ]
    assert np.isfinite(forward(checkpoint.model, jnp.arange(9)[None])).all()
    with pytest.raises(ValueError) as caught:
        save(checkpoint.model, checkpoint, tmp_path / "again", "compressed-tensors")
    assert str(caught.value) == (
        f"layer {Q_PROJ}: compressed-tensors: its inputs are regrouped (weight_g_idx), which current "
        "releases and vLLM have taken out; --format orbax holds everything"
    )
    assert not (tmp_path / "again").exists()
    save(checkpoint.model, checkpoint, tmp_path / "dense", "dense")
    kernel = load(tmp_path / "dense").model.model.layers[0].self_attn.q_proj.kernel
    np.testing.assert_array_equal(kernel.get_value(), expected)
    save(checkpoint.model, checkpoint, tmp_path / "own", "orbax")
    again = quantized_layers(load(tmp_path / "own").model)["model/layers/0/self_attn/q_proj"]
    np.testing.assert_array_equal(again.order, q.order)
    np.testing.assert_array_equal(dequantize(again), expected)


@pytest.mark.parametrize(
    "groups, line",
    [
        (np.arange(32) // 8, "weight_g_idx: groups of 16 inputs must be numbered 0 to 1, the last alone"
                             " may be smaller; there are 4 numbers from 0 to 3, of 8 to 8 inputs"),
        (np.arange(32) // 31, "2 numbers from 0 to 1, of 1 to 31 inputs"),
        (np.where(np.arange(32) < 16, 0, -1), "2 numbers from -1 to 0"),
        (np.zeros(16), r"weight_g_idx must be integers [32], it is int32 [16]"),
        (np.zeros((32, 1)), r"weight_g_idx must be integers [32], it is int32 [32, 1]"),
    ],
)  # fmt: skip
def test_groups_that_are_none(write, groups, line):
    _, path = write("w4a16-g16")
    change_tensors(path, **{f"{Q_PROJ}.weight_g_idx": groups.astype(np.int32)})
    assert f"layer {Q_PROJ}: " in message(path) and line in message(path)
    change_tensors(path, **{f"{Q_PROJ}.weight_g_idx": np.zeros(32, np.float32)})
    assert "weight_g_idx must be integers [32], it is float32 [32]" in message(path)


def test_scales_of_an_unknown_layer(write):
    _, path = write("w4a16-g16")
    change_tensors(path, **{"model.visual.weight_scale": np.ones(1, np.float32)})
    assert "layer model.visual: has a weight_scale, but the model has no linear layer" in message(
        path
    )
