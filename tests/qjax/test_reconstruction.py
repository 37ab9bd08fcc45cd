# SPDX-License-Identifier: Apache-2.0
"""Blocks trained as a whole: better where they can be, never worse, one program for all of them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qjax import nnx_layers, post_training, qtensor, reconstruction
from qjax.algorithms import learned_rounding, round_nearest
from qjax.algorithms.learned_rounding import Options
from qjax.blockwise import Block
from qjax.reconstruction import reconstruct

WIDTH, HIDDEN = 32, 64
FEW = Options(steps=40, rounding_reach=0.2)


class Mixer(nnx.Module):
    """A layer of each kind, one with a bias, a norm and a layer that stays plain."""

    def __init__(self, seed: int, dtype=jnp.float32):
        kwargs = {"rngs": nnx.Rngs(seed), "param_dtype": dtype, "dtype": dtype}
        self.norm = nnx.RMSNorm(WIDTH, **kwargs)
        self.up = nnx.Linear(WIDTH, HIDDEN, **kwargs)
        self.heads = nnx.LinearGeneral((HIDDEN,), (2, 32), use_bias=False, **kwargs)
        self.join = nnx.Einsum("bthk,hkd->btd", (2, 32, WIDTH), **kwargs)
        self.gate = nnx.Linear(WIDTH, WIDTH, **kwargs)

    def __call__(self, x, scale):
        normed = self.norm(x)
        return x + self.join(self.heads(nnx.silu(self.up(normed)))) * self.gate(normed) * scale


def apply(module, x, context):
    return module(x, context)


def block_of(seed: int, dtype=jnp.float32) -> Block:
    return Block(path=f"layers/{seed}", module=Mixer(seed, dtype), context=jnp.float32(0.5))


def quantized(block: Block, scheme: str) -> dict:
    start = {}
    for path, layer in nnx_layers.quantizable_layers(block.module):
        if path != "gate":
            axis = nnx_layers.contraction_axes(layer)
            start[path] = round_nearest.quantize(nnx_layers.weight_of(layer), scheme, axis=axis)
    return start


def windows(seed: int, count: int = 16) -> list:
    """As calibration has them: batches, the last of them smaller."""
    x = np.random.default_rng(seed).standard_normal((count, 8, WIDTH)).astype(np.float32)
    return [jnp.asarray(x[: count - 3]), jnp.asarray(x[count - 3 :])]


def outputs(block: Block, inputs: list) -> list:
    return [apply(block.module, x, block.context) for x in inputs]


def error_of(block: Block, weights: dict, inputs: list, targets: list, options: Options) -> float:
    """The mean squared error on held-out windows of the block with QTensors in their places."""
    module = post_training.copied(block.module)
    layers = dict(nnx_layers.quantizable_layers(module))
    for path, q in weights.items():
        nnx_layers.install(layers[path], q)
    x, y = np.concatenate(inputs), np.concatenate(targets)
    held_out, _ = reconstruction._windows(len(x), options)
    got = apply(module, jnp.asarray(x[held_out]), block.context)
    return float(np.mean(np.square(np.asarray(got, np.float64) - y[held_out])))


@pytest.mark.parametrize(
    "scheme",
    ["w2a16-g16", "w3a16-channel-asym", "w8a8", "w4a8-g16", "nf4-g16", "mxfp4-a4", "nvfp4", "fp8-dynamic"],
)  # fmt: skip
def test_a_trained_block_is_never_worse_and_its_losses_are_those_of_its_qtensors(scheme):
    block, inputs = block_of(0), windows(1)
    start = quantized(block, scheme)
    targets = outputs(block, inputs)
    result = reconstruct(block, start, inputs, targets, apply=apply, options=FEW)
    assert result.weights.keys() == start.keys()
    for path, q in result.weights.items():
        assert q.scheme == start[path].scheme and q.shape == start[path].shape
    assert result.after <= result.before
    for weights, loss in ((start, result.before), (result.weights, result.after)):
        expected = error_of(block, weights, inputs, targets, FEW)
        np.testing.assert_allclose(loss, expected, rtol=2e-3)
    q = start["up"]
    if q.activations is None and q.format.bits < 8:  # else there is little to gain, or much noise
        assert result.after < 0.95 * result.before


@pytest.mark.parametrize("scheme", ["w4a16-g16", "w4a8-g16"])
def test_the_first_step_is_that_of_the_formulas(scheme):
    """One layer, its input quantized or not, in numpy; Adam's first step is as long as its rate."""
    rng = np.random.default_rng(0)
    linear = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=nnx.Rngs(0))
    block = Block(path="one", module=linear, context=None)
    w = np.asarray(linear.kernel.get_value(), np.float64)
    q = round_nearest.quantize(linear.kernel.get_value(), scheme)
    x = rng.standard_normal((16, 8, WIDTH)).astype(np.float32)
    y = (x @ w).astype(np.float32)
    options = Options(steps=4, batch=3, rounding_reach=0.2, range_reach=0.02)
    anchors = reconstruction._anchors(block, {"Linear": q})
    problem = reconstruction._Problem(
        graphdef=nnx.graphdef(linear), state=nnx.state(linear), anchors=anchors, x=x, y=y,
        context=None, apply=lambda module, x, context: module(x), options=options,
        compute_dtype=None,
    )  # fmt: skip
    params = {"Linear": learned_rounding.parameters(anchors["Linear"])}
    state = learned_rounding.optimizer(options).init(params)
    rows = np.array([3, 0, 9])
    (got,) = reconstruction._step(problem, params, state, rows, 0.01)[0].values()

    x = x[rows].reshape(-1, WIDTH).astype(np.float64)
    if scheme == "w4a8-g16":
        step = np.abs(x).max(1, keepdims=True) / 127
        x = np.round(x / step) * step
    scale = np.repeat(np.asarray(q.scale, np.float64), 16, axis=0)
    codes = np.asarray(qtensor.unpacked(q), np.float64)
    wrong = x @ (codes * scale) - y[rows].reshape(-1, WIDTH)
    by_weight = 2 * x.T @ wrong / wrong.size / 0.01
    inside = np.abs(w / scale + 0.5) < 7.5
    by_offset = by_weight * scale * inside
    by_scale = by_weight * (codes - inside * w / scale) * scale
    by_scale = by_scale.reshape(2, 16, WIDTH).sum(1)
    # A gradient of zero leaves its parameter where it is, and so do those that are all rounding errors.
    clear = np.abs(by_offset) > 1e-5
    assert clear.mean() > 0.8
    np.testing.assert_allclose(got.offset[clear], -0.1 * np.sign(by_offset)[clear], rtol=1e-2)
    assert not np.any(np.asarray(got.offset)[~inside])
    clear = np.abs(by_scale) > 1e-4
    assert clear.mean() > 0.8
    np.testing.assert_allclose(got.scale[clear] - 1, -0.01 * np.sign(by_scale)[clear], rtol=1e-2)


def test_all_blocks_of_a_structure_are_one_program():
    reconstruction._step.clear_cache()
    reconstruction._held_out_loss.clear_cache()
    options = Options(steps=4, seed=7)
    for seed in range(3):
        block, inputs = block_of(seed), windows(seed)
        start, targets = quantized(block, "w4a16-g16"), outputs(block, inputs)
        reconstruct(block, start, inputs, targets, apply=apply, options=options)
    assert reconstruction._step._cache_size() == 1
    assert reconstruction._held_out_loss._cache_size() == 1


def test_training_that_does_harm_leaves_everything_as_it_was():
    block, inputs = block_of(0), windows(1)
    start, targets = quantized(block, "w4a16-g16"), outputs(block, inputs)
    wild = Options(steps=3, rounding_reach=4.0, range_reach=0.9)
    result = reconstruct(block, start, inputs, targets, apply=apply, options=wild)
    assert result.after == result.before
    assert all(result.weights[path] is q for path, q in start.items())


def test_scales_that_may_not_change_do_not():
    block, inputs = block_of(0), windows(1)
    start, targets = quantized(block, "w3a16-g16"), outputs(block, inputs)
    options = Options(steps=40, rounding_reach=0.2, range_reach=0.0)
    result = reconstruct(block, start, inputs, targets, apply=apply, options=options)
    assert result.after < result.before
    for path, q in result.weights.items():
        np.testing.assert_array_equal(q.scale, start[path].scale)


def test_what_is_perfect_already_stays():
    block, inputs = block_of(0), windows(1)
    start = quantized(block, "w8a16-g16")
    for path, layer in nnx_layers.quantizable_layers(block.module):
        if path in start:
            nnx_layers.variable_of(layer).set_value(qtensor.dequantize(start[path]))
    result = reconstruct(block, start, inputs, outputs(block, inputs), apply=apply, options=FEW)
    assert result.before < 1e-12 and result.after <= result.before


def test_the_block_itself_and_what_is_not_quantized_stay_and_results_repeat():
    block, inputs = block_of(0), windows(1)
    before = [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(block.module))]
    start, targets = quantized(block, "w3a16-g16"), outputs(block, inputs)
    results = [
        reconstruct(block, start, inputs, targets, apply=apply, options=FEW) for _ in range(2)
    ]
    after = jax.tree.leaves(nnx.state(block.module))
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)
    first, second = (jax.tree.leaves(result.weights) for result in results)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_block_makes_up_for_what_reached_it_wrong():
    """Targets that no weights of the block give exactly: the start's error is not the floor."""
    block, inputs = block_of(0), windows(1)
    targets = outputs(block, inputs)
    noisy = [x + 0.1 * jnp.roll(x, 1, axis=-1) for x in inputs]
    start = quantized(block, "w4a16-g16")
    options = Options(steps=60, batch=4)
    result = reconstruct(block, start, noisy, targets, apply=apply, options=options)
    assert result.after < result.before


def test_a_block_in_bfloat16_is_trained_in_float32():
    block, inputs = block_of(0, jnp.bfloat16), windows(1)
    start = quantized(block, "w3a16-g16")
    targets = [y.astype(jnp.float32) for y in outputs(block, inputs)]
    result = reconstruct(
        block, start, inputs, targets, apply=apply, options=FEW, compute_dtype=jnp.float32
    )
    assert result.after < result.before
    assert all(q.dtype == q.scale.dtype == jnp.bfloat16 for q in result.weights.values())


@pytest.mark.parametrize(("count", "batch"), list(itertools.product((2, 9, 64), (1, 5))))
def test_no_window_is_both_for_training_and_for_measuring(count, batch):
    held_out, order = reconstruction._windows(count, Options(steps=30, batch=batch))
    assert len(held_out) == max(1, count // 8)
    assert order.shape == (30, batch)
    assert not set(held_out) & set(order.ravel())
    seen = np.unique(order.ravel(), return_counts=True)[1]
    assert np.ptp(seen) <= 1


def test_what_cannot_be_trained_is_refused():
    block, inputs = block_of(0), windows(1)
    start, targets = quantized(block, "w4a16-g16"), outputs(block, inputs)

    def refused(message: str, block=block, start=start, inputs=inputs, targets=targets):
        with pytest.raises(ValueError, match=message):
            reconstruct(block, start, inputs, targets, apply=apply, options=FEW)

    refused("layers/0: has no layer down; there are", start={"down": start["up"]})
    refused("layers/0/up: one weight and its QTensor", start={"up": start["join"]})
    refused("layers/0: 2 windows or more", inputs=[inputs[0][:1]], targets=[targets[0][:1]])
    refused("layers/0: 2 windows or more", targets=targets[:1])
    refused("layers/0: the loss before training", inputs=[x * jnp.nan for x in inputs])
    held = Block(path="held", module=post_training.copied(block.module), context=block.context)
    nnx_layers.install(held.module.up, start["up"])
    refused("held/up: is quantized", block=held)
