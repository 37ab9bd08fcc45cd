# SPDX-License-Identifier: Apache-2.0
"""Learned rounding starts from any QTensor, and what it trains is what it stores, bit for bit."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qjax import formats, qtensor
from qjax.algorithms import gptq, learned_rounding, round_nearest
from qjax.algorithms.learned_rounding import Options, Parameters
from qjax.qtensor import QTensor

INTEGERS = [
    f"w{bits}a16-{tile}{asym}"
    for bits, tile, asym in itertools.product(
        (2, 3, 4, 8), ("g8", "channel", "tensor"), ("", "-asym")
    )
]
OTHERS = [
    "nf4-g8",
    "fp8-a16",
    "fp8-e5m2-tensor",
    "fp8-block",
    "mxfp4",
    "mxfp8",
    "nvfp4",
    "w8a8",
    "w4a8-g8",
]


def weight(rng, dtype=jnp.float32, shape=(64, 12)):
    return jnp.asarray(rng.standard_normal(shape) * rng.uniform(0.1, 2, shape[-1]), dtype)


def any_start(w, scheme: str, rng) -> QTensor:
    """Codes that are far from the nearest, and zeros that are far from the best."""
    q = round_nearest.quantize(w, scheme)
    fmt = q.format
    codes = qtensor.unpacked(q)
    if fmt.kind == "integer":
        moved = np.asarray(codes, np.int64) + rng.integers(-2, 3, codes.shape)
        codes = jnp.asarray(np.clip(moved, fmt.low, fmt.high).astype(np.int8))
    else:
        codes = codes.ravel()[rng.permutation(codes.size)].reshape(codes.shape)
    zero = q.zero
    if zero is not None:
        moved = np.asarray(zero, np.int64) + rng.integers(-2, 3, zero.shape)
        zero = jnp.asarray(np.clip(moved, fmt.low, fmt.high).astype(np.int8))
    return QTensor.from_codes(
        codes, q.scale, zero, q.tensor_scale, format=fmt, axis=q.axis, tile=q.tile, dtype=q.dtype,
        activations=q.activations,
    )  # fmt: skip


def moved(params: Parameters, rng, size: float) -> Parameters:
    return jax.tree.map(
        lambda leaf: leaf + jnp.asarray(rng.uniform(-size, size, leaf.shape), jnp.float32), params
    )


def assert_same(a: QTensor, b: QTensor):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


ALL = [(scheme, jnp.float32) for scheme in INTEGERS + OTHERS] + [
    (scheme, jnp.bfloat16)
    for scheme in ("w2a16-g8", "w4a16-g8-asym", "nf4-g8", "nvfp4", "fp8-block")
]


@jax.jit
def both(anchor, params):
    """The trained array, under the transformations of a training step, and the stored one."""
    value, _ = jax.vjp(lambda p: learned_rounding.soft(anchor, p), params)
    return value, learned_rounding.hard(anchor, params)


@pytest.mark.parametrize(("scheme", "dtype"), ALL)
def test_training_begins_with_the_array_that_it_is_given_and_stores_what_it_trains(
    scheme, dtype, rng
):
    w = weight(rng, dtype)
    for q in (round_nearest.quantize(w, scheme), any_start(w, scheme, rng)):
        anchor = learned_rounding.anchored(w, q)
        start = learned_rounding.parameters(anchor)
        soft, hard = both(anchor, start)
        assert_same(hard, q)
        assert soft.dtype == dtype
        np.testing.assert_array_equal(soft, qtensor.dequantize(q))
        for size in (0.1, 0.9):
            soft, hard = both(anchor, moved(start, rng, size))
            np.testing.assert_array_equal(soft, qtensor.dequantize(hard))
            assert hard.scheme == q.scheme and hard.scale.dtype == q.scale.dtype
            assert bool((hard.scale.astype(jnp.float32) > 0).all())


@pytest.mark.parametrize("scheme", ["w4a16-g16", "w3a16-g16-asym"])
def test_training_begins_with_the_codes_of_gptq(scheme, rng):
    w = weight(rng)
    x = rng.standard_normal((256, 64)).astype(np.float32) @ rng.standard_normal((64, 64)) / 8
    options = gptq.Options(order="by-group")
    factor = gptq.factor(jnp.asarray(x.T @ x, jnp.float32), options, 16)
    q = gptq.quantize(w, scheme, factor, options=options)
    nearest = round_nearest.quantize(w, scheme)
    assert (qtensor.unpacked(q) != qtensor.unpacked(nearest)).mean() > 0.1
    anchor = learned_rounding.anchored(w, q)
    assert_same(learned_rounding.hard(anchor, learned_rounding.parameters(anchor)), q)


def test_a_weight_whose_code_is_not_the_nearest_starts_just_inside_that_codes_cell():
    w = jnp.array([[3.3], [3.3], [3.3], [9.0]])
    codes = jnp.array([[3], [4], [1], [7]], jnp.int8)
    q = QTensor.from_codes(
        codes, jnp.ones((1, 1)), format=formats.INT4, axis=(-2,), tile=(4, 1), dtype=jnp.float32
    )
    shift = learned_rounding.anchored(w, q).shift
    np.testing.assert_allclose(w + shift, [[3.3], [3.51], [1.49], [9.0]], rtol=1e-6)


@pytest.mark.parametrize("asym", ["", "-asym"])
@pytest.mark.parametrize("tile", ["g16", "channel"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gradients_are_those_of_the_formulas(bits, tile, asym, rng):
    w = weight(rng)
    q = any_start(w, f"w{bits}a16-{tile}{asym}", rng)
    anchor = learned_rounding.anchored(w, q)
    params = moved(learned_rounding.parameters(anchor), rng, 0.3)
    towards = rng.standard_normal(w.shape).astype(np.float32)
    got = jax.grad(lambda p: jnp.sum(learned_rounding.soft(anchor, p) * towards))(params)

    size = 64 if tile == "channel" else 16
    new = learned_rounding.hard(anchor, params)
    over = lambda leaf: np.repeat(np.asarray(leaf, np.float64), size, axis=0)  # noqa: E731
    tiled = lambda x: x.reshape(-1, size, x.shape[-1]).sum(1)  # noqa: E731
    codes, scale = np.asarray(qtensor.unpacked(new), np.float64), over(new.scale)
    zero = 0.0 if new.zero is None else over(new.zero)
    position = np.asarray(w) / scale + zero + np.asarray(anchor.shift + params.offset)
    inside = (position > q.format.low) & (position < q.format.high)
    assert 0.05 < inside.mean() < 1 or bits == 8
    slope = codes - zero - inside * np.asarray(w) / scale
    np.testing.assert_allclose(got.offset, towards * scale * inside, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        got.scale, tiled(towards * slope) * np.asarray(q.scale), rtol=1e-3, atol=1e-4
    )
    if new.zero is not None:
        by_zero = np.asarray(tiled(-towards * scale * ~inside))
        unclipped = np.asarray(q.zero) + np.asarray(params.zero)
        free = (unclipped > q.format.low) & (unclipped < q.format.high)
        np.testing.assert_allclose(
            np.where(free, got.zero, 0), np.where(free, by_zero, 0), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("scheme", ["nf4-g8", "fp8-a16", "nvfp4"])
def test_a_gap_is_how_far_the_neighbours_of_a_value_are(scheme, rng):
    w = weight(rng)
    q = round_nearest.quantize(w, scheme)
    anchor = learned_rounding.anchored(w, q)
    values = np.asarray(formats.decode(qtensor.unpacked(q), q.format))
    ladder = np.unique(
        np.asarray(q.format.table)
        if q.format.table
        else np.nan_to_num(np.arange(256, dtype=np.uint8).view(q.format.dtype).astype(np.float32))
    )
    place = np.searchsorted(ladder, values.astype(ladder.dtype))
    inner = (place > 0) & (place < len(ladder) - 1)
    place = np.clip(place, 1, len(ladder) - 2)
    expected = (ladder[place + 1] - ladder[place - 1]) / 2
    np.testing.assert_allclose(np.asarray(anchor.gap)[inner], expected[inner], rtol=1e-6)


def test_infinite_weights_keep_the_codes_that_they_have(rng):
    w = weight(rng).at[3, 4].set(jnp.inf)
    anchor = learned_rounding.anchored(w, round_nearest.quantize(w, "w4a16-g16"))
    params = learned_rounding.parameters(anchor)
    gradients = jax.grad(lambda p: jnp.sum(learned_rounding.soft(anchor, p) ** 2))(params)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradients))
    assert int(qtensor.unpacked(learned_rounding.hard(anchor, params))[3, 4]) == 7


@pytest.mark.parametrize("scheme", ["w3a16-g16", "w4a16-g16-asym", "nf4-g16", "mxfp4", "nvfp4"])
def test_rounding_for_a_product_beats_rounding_to_nearest(scheme, rng):
    """The objective of GPTQ, for a single layer: inputs that hang together."""
    w = weight(rng)
    x = jnp.asarray(rng.standard_normal((64, 16)) @ rng.standard_normal((16, 64)), jnp.float32)
    x = x + 0.1 * jnp.asarray(rng.standard_normal(x.shape), jnp.float32)
    q = round_nearest.quantize(w, scheme)
    anchor = learned_rounding.anchored(w, q)
    params = learned_rounding.parameters(anchor)
    optimizer = learned_rounding.optimizer(Options(steps=100))

    def error(near):
        return jnp.mean((x @ (w - near)) ** 2)

    @jax.jit
    def step(params, state):
        gradients = jax.grad(lambda p: error(learned_rounding.soft(anchor, p)))(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(100):
        params, state = step(params, state)
    after = error(qtensor.dequantize(learned_rounding.hard(anchor, params)))
    assert after < 0.6 * error(qtensor.dequantize(q))


def test_steps_shrink_to_nothing_and_reach_as_far_as_the_options_say(rng):
    w = weight(rng)
    anchor = learned_rounding.anchored(w, round_nearest.quantize(w, "w4a16-g16-asym"))
    params = {"a": learned_rounding.parameters(anchor)}
    options = Options(steps=4, rounding_reach=0.2, range_reach=0.02)
    optimizer = learned_rounding.optimizer(options)
    state, gradients = optimizer.init(params), jax.tree.map(jnp.ones_like, params)
    lengths = []
    for _ in range(5):
        updates, state = optimizer.update(gradients, state, params)
        lengths.append([float(leaf.ravel()[0]) for leaf in updates["a"]])
    decay = np.array([1, 0.75, 0.5, 0.25, 0])[:, None]
    np.testing.assert_allclose(lengths, -decay * [[0.1, 0.01, 0.1]], rtol=1e-4, atol=1e-9)


def test_scales_that_are_powers_of_two_and_zeros_that_there_are_none_of_are_not_learned(rng):
    w = weight(rng)
    of = lambda s: learned_rounding.parameters(  # noqa: E731
        learned_rounding.anchored(w, round_nearest.quantize(w, s))
    )
    assert of("mxfp4").scale is None and of("mxfp4").zero is None
    assert of("w4a16-g16").scale is not None and of("w4a16-g16-asym").zero is not None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"batch": 0}, "batch"),
        ({"rounding_reach": 0.0}, "rounding_reach"),
        ({"rounding_reach": float("inf")}, "rounding_reach"),
        ({"range_reach": -0.1}, "range_reach"),
        ({"range_reach": 1.0}, "range_reach"),
        ({"seed": -1}, "seed"),
    ],
)
def test_options_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Options(**wrong)


def test_another_weights_qtensor_and_stacked_ones_are_refused(rng):
    w = weight(rng)
    with pytest.raises(ValueError, match="one weight and its QTensor"):
        learned_rounding.anchored(w[:32], round_nearest.quantize(w, "w4a16-g16"))
    stacked = jnp.stack([w, w])
    with pytest.raises(ValueError, match="one weight and its QTensor"):
        learned_rounding.anchored(stacked, round_nearest.quantize(stacked, "w4a16-g16", stacked=1))
