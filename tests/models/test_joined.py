# SPDX-License-Identifier: Apache-2.0
"""Joined projections hold bit for bit what the separate ones did, and compute the same.

XLA on a CPU orders float32 sums by the number of outputs, so results are compared to its rounding.
"""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax import QTensor, Recipe, dequantize, formats, kernel_layout, quantize_model
from qjax.algorithms import gptq, llm_int8
from qjax_models import Decoder, DecoderConfig, Generator, joined
from qjax_models.joined import is_joined, join_projections
from qjax_models.rope import rotation

forward = nnx.jit(Decoder.__call__)

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"]
# Plain, and each kind of codes, scales, zeros and tokens.
JOINED = [None, "w4a16-g8-asym", "w3a16-channel", "w8a8", "w4afp8-g8", "mxfp8-a8"]
OTHERS = ["w4a16-g8", "nf4-g8", "w4a8-g8", "fp8-dynamic", "mxfp4"]
APART = ["w4a16-tensor", "fp8-dynamic-tensor", "nvfp4", "fp8-block"]  # blocks of less than 128
PROMPTS = [[5, 9, 33, 2, 7, 7, 60], [11, 4]]


def quantized(model: Decoder, rules) -> Decoder:
    """By a scheme's name, or by rules; what joining does not touch stays plain."""
    if rules is None:
        return model
    rules = [[".*", rules]] if isinstance(rules, str) else rules
    recipe = Recipe.from_json([[".*(o|down)_proj", None], *rules])
    return quantize_model(model, recipe)[0]


def single_layer(golden) -> Decoder:
    slides = tuple(i for i in golden.config.sliding_layers if i == 0)
    return golden.model(replace(golden.config, num_layers=1, sliding_layers=slides))


def weights(block) -> dict[str, list[np.ndarray]]:
    """What attention and MLP multiply their inputs with, and add: side by side."""
    attention, mlp = block.self_attn, block.mlp
    parts = {
        "qkv": [attention.qkv_proj]
        if attention.fused
        else [attention.q_proj, attention.k_proj, attention.v_proj],
        "gate_up": [mlp.gate_up_proj] if mlp.fused else [mlp.gate_proj, mlp.up_proj],
    }
    result = {}
    for name, layers in parts.items():
        kernels = [layer.kernel.get_value() for layer in layers]
        dense = [dequantize(w, jnp.float32) if isinstance(w, QTensor) else w for w in kernels]
        biases = [layer.bias.get_value() for layer in layers if layer.bias is not None]
        sides = [np.concatenate([np.asarray(x) for x in xs], -1) for xs in (dense, biases) if xs]
        assert sides[0].shape[-1] == sum(layer.out_features for layer in layers)
        result[name] = sides
    return result


def schemes(block) -> set:
    """Names of the schemes of the joined layers."""
    kernels = block.self_attn.qkv_proj.kernel, block.mlp.gate_up_proj.kernel
    return {w.scheme.name if isinstance(w := k.get_value(), QTensor) else None for k in kernels}


@nnx.jit
def outputs(block, x, angles, positions):
    """Attention and MLP on the same input; in a whole layer a last bit of one may flip a code of the
    other's input."""
    mixed, kv = block.self_attn(x, angles, positions)
    return mixed, kv, block.mlp(x)


def assert_close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert np.linalg.norm(a - b) <= 2e-6 * np.linalg.norm(b)


@pytest.mark.one_version  # concatenation; with both, test_generation_is_the_same
@pytest.mark.parametrize(
    ("name", "scheme"), [*itertools.product(FAMILIES, JOINED), *(("qwen2", s) for s in OTHERS)]
)
def test_every_family_in_every_scheme(goldens, name, scheme):
    golden = goldens[name]
    model = quantized(single_layer(golden), scheme)
    (block,) = model.model.layers
    positions = jnp.arange(9)[None]
    angles = rotation(golden.config.rope, golden.config.head_size, positions, 9)
    x = jax.random.normal(jax.random.key(0), (2, 9, golden.config.hidden_size))
    separate, expected = weights(block), outputs(block, x, angles, positions)
    size = formats.device_bytes(nnx.state(model))

    join_projections(model)
    assert block.self_attn.fused and block.mlp.fused
    assert is_joined(model)
    assert schemes(block) == {scheme}
    jax.tree.map(np.testing.assert_array_equal, weights(block), separate)
    assert_close(outputs(block, x, angles, positions), expected)
    # Packed outputs may fill bytes better than those of the parts did.
    assert size - 64 <= formats.device_bytes(nnx.state(model)) <= size


@pytest.mark.parametrize("name", FAMILIES)
def test_the_result_is_laid_out_as_a_family_that_has_them_joined(goldens, name):
    model = goldens[name].model()
    join_projections(model)
    fused = Decoder.abstract(replace(goldens[name].config, fused_projections=True))

    def shapes(model):
        return {path: leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(model))}

    assert shapes(model) == shapes(fused)


def test_a_family_that_has_them_joined_stays_as_it_is(goldens):
    model = quantized(goldens["phi3"].model(), "w8a8")
    before = nnx.graphdef(model)
    join_projections(model)
    assert nnx.graphdef(model) == before and not is_joined(model)


@pytest.mark.parametrize("scheme", APART)
def test_what_shares_a_scale_over_all_outputs_stays_apart(goldens, scheme):
    model = quantized(goldens["llama"].model(), scheme)
    before = nnx.graphdef(model)
    join_projections(model)
    assert nnx.graphdef(model) == before and not is_joined(model)


def test_layers_that_hold_the_same_inputs_as_they_are(goldens):
    golden = goldens["qwen2"]
    model = single_layer(golden)
    observed = qjax.calibrate(model, [jnp.asarray(golden.tokens)], hessians=False)
    method = qjax.Method(outliers=llm_int8.Options(threshold=1.0, capacity=0.25))
    model, _ = quantize_model(model, "w8a8", observed, method=method)
    apart = nnx.clone(model)
    (block,) = model.model.layers
    positions = jnp.arange(9)[None]
    angles = rotation(golden.config.rope, golden.config.head_size, positions, 9)
    x = jax.random.normal(jax.random.key(0), (2, 9, golden.config.hidden_size))
    separate, expected = weights(block), outputs(block, x, angles, positions)
    join_projections(model)
    assert block.self_attn.fused and block.mlp.fused
    assert block.self_attn.qkv_proj.kernel.get_value().columns.size > 0
    jax.tree.map(np.testing.assert_array_equal, weights(block), separate)
    assert_close(outputs(block, x, angles, positions), expected)

    (block,) = apart.model.layers
    q = block.self_attn.k_proj.kernel.get_value()
    block.self_attn.k_proj.kernel.set_value(q.replaced(columns=q.columns.at[0].add(-1)))
    join_projections(apart)
    assert not block.self_attn.fused and block.mlp.fused


def test_layers_whose_inputs_are_regrouped_alike(goldens):
    golden = goldens["qwen2"]
    model = single_layer(golden)
    observed = qjax.calibrate(model, [jnp.asarray(golden.tokens)])
    method = qjax.Method(rounding=gptq.Options(order="regrouped", grids="updated"))
    model, _ = quantize_model(model, "w4a16-g8-asym", observed, method=method)
    apart = nnx.clone(model)
    (block,) = model.model.layers
    positions = jnp.arange(9)[None]
    angles = rotation(golden.config.rope, golden.config.head_size, positions, 9)
    x = jax.random.normal(jax.random.key(0), (2, 9, golden.config.hidden_size))
    order = block.self_attn.v_proj.kernel.get_value().order
    separate, expected = weights(block), outputs(block, x, angles, positions)
    join_projections(model)
    assert block.self_attn.fused and block.mlp.fused
    np.testing.assert_array_equal(block.self_attn.qkv_proj.kernel.get_value().order, order)
    jax.tree.map(np.testing.assert_array_equal, weights(block), separate)
    assert_close(outputs(block, x, angles, positions), expected)

    (block,) = apart.model.layers
    q = block.self_attn.k_proj.kernel.get_value()
    block.self_attn.k_proj.kernel.set_value(q.replaced(order=q.order[::-1]))
    q = block.mlp.up_proj.kernel.get_value()
    block.mlp.up_proj.kernel.set_value(q.replaced(order=None))
    join_projections(apart)
    assert not block.self_attn.fused and not block.mlp.fused


def test_every_layer_is_decided_on_by_itself(goldens):
    rules = [
        [".*/0/.*q_proj", "w8a16-channel"],
        [".*/1/.*v_proj", None],
        [".*/1/.*gate_proj", "w4a16-g16"],
        [".*/2/mlp/.*", "w4a16-tensor"],
        [".*", "w4a16-g8"],
    ]
    model = quantized(goldens["qwen2"].model(), rules)
    tokens = jnp.asarray(goldens["qwen2"].tokens)
    expected = forward(model, tokens)
    join_projections(model)
    assert is_joined(model)
    fused = [(block.self_attn.fused, block.mlp.fused) for block in model.model.layers]
    assert fused == [(False, True), (False, False), (True, False)]
    found = forward(model, tokens)
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)


def of_another_dtype(attention):
    attention.k_proj.kernel.set_value(attention.k_proj.kernel.get_value().astype(jnp.bfloat16))


def without_a_bias(attention):
    attention.k_proj.bias = None


def with_a_bias_of_another_dtype(attention):
    attention.v_proj.bias.set_value(attention.v_proj.bias.get_value().astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("way", "value"),
    [
        ("dtype", jnp.bfloat16),
        ("precision", jax.lax.Precision.HIGHEST),
        ("preferred_element_type", jnp.float32),
        ("dot_general", jax.lax.dot_general),
        ("promote_dtype", lambda arguments, **_: arguments),
    ],
)
def test_layers_that_compute_in_different_ways_stay_apart(goldens, way, value):
    model = goldens["qwen2"].model()
    blocks = model.model.layers
    assert getattr(blocks[1].mlp.up_proj, way) != value
    setattr(blocks[1].mlp.up_proj, way, value)
    for part in (blocks[0].mlp.gate_proj, blocks[0].mlp.up_proj):
        setattr(part, way, value)
    join_projections(model)
    assert [block.mlp.fused for block in blocks] == [True, False, True]
    assert getattr(blocks[0].mlp.gate_up_proj, way) == value
    assert all(block.self_attn.fused for block in blocks)


@pytest.mark.parametrize("change", [of_another_dtype, without_a_bias, with_a_bias_of_another_dtype])
def test_plain_layers_that_differ_stay_apart(goldens, change):
    model = goldens["qwen2"].model()
    change(model.model.layers[1].self_attn)
    join_projections(model)
    assert [block.self_attn.fused for block in model.model.layers] == [True, False, True]
    assert all(block.mlp.fused for block in model.model.layers)


@pytest.mark.parametrize(
    ("name", "scheme"),
    [("llama", "w4a16-g8"), ("qwen2", None), ("gemma2", "w8a8")],
)
def test_generation_is_the_same(goldens, name, scheme):
    model = quantized(goldens[name].model(), scheme)
    expected = Generator(model, capacity=32).generate(PROMPTS, 12)
    join_projections(model)
    found = Generator(model, capacity=32).generate(PROMPTS, 12)
    assert found.tokens == expected.tokens


def test_evaluation_is_the_same(goldens):
    golden = goldens["llama"]
    model = quantized(golden.model(), "w4a16-g8")
    apart = quantized(golden.model(), "w4a16-g8")
    join_projections(model)
    judged = qjax.evaluate(model, golden.tokens, baseline=apart)
    assert judged.kl is not None
    assert judged.top1_agreement == 1 and abs(judged.kl) < 1e-6
    assert judged.nll == pytest.approx(qjax.evaluate(apart, golden.tokens).nll, rel=1e-6)


def wide_decoder(**changes) -> Decoder:
    """Sizes that kernels and blocks of 128 take."""
    sizes = {
        "vocab_size": 64, "hidden_size": 128, "mlp_size": 256, "num_layers": 1, "num_heads": 4,
        "num_kv_heads": 2, "head_size": 64, "max_positions": 64,
    }  # fmt: skip
    return Decoder(DecoderConfig(**sizes | changes), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("scheme", ["w4a16-g64-asym", "w8a16-channel", "w8a8", "fp8-block"])
def test_a_kernel_takes_the_joined_weight_where_it_took_the_parts(scheme):
    model = quantized(wide_decoder(mlp_size=384, hidden_size=256), scheme)
    (block,) = model.model.layers
    separate = weights(block)
    assert kernel_layout.why_no_kernel(block.self_attn.k_proj.kernel.get_value()) is None
    join_projections(model)
    for layer in (block.self_attn.qkv_proj, block.mlp.gate_up_proj):
        q = layer.kernel.get_value()
        assert q.scheme.name == scheme and kernel_layout.why_no_kernel(q) is None
    jax.tree.map(np.testing.assert_array_equal, weights(block), separate)


def test_outputs_that_fill_no_block_stay_apart():
    model = quantized(wide_decoder(num_kv_heads=1), "fp8-block")
    join_projections(model)
    (block,) = model.model.layers
    assert (block.self_attn.fused, block.mlp.fused) == (False, True)


def test_weights_arranged_for_a_kernel_stay_apart():
    model = quantized(wide_decoder(), "w4a16-g64")
    (block,) = model.model.layers
    for layer in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
        layer.kernel.set_value(kernel_layout.for_kernel(layer.kernel.get_value()))
    join_projections(model)
    assert (block.self_attn.fused, block.mlp.fused) == (False, True)


def test_one_layer_at_a_time_is_held_twice(monkeypatch):
    model = wide_decoder(num_layers=5)
    of_a_layer = 2 * 128 * 2 * 256  # gate and up, or queries, keys and values; bfloat16
    before = formats.device_bytes(jax.live_arrays())
    held = []

    def watched(parts, side_by_side=joined._side_by_side):
        result = side_by_side(parts)
        held.append(formats.device_bytes(jax.live_arrays()))
        return result

    monkeypatch.setattr(joined, "_side_by_side", watched)
    join_projections(model)
    assert len(held) == 10
    assert max(held) <= before + of_a_layer
    assert formats.device_bytes(jax.live_arrays()) <= before
