# SPDX-License-Identifier: Apache-2.0
"""Rounding to nearest, against a loop over tiles in numpy: the same scales, zeros and codes."""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import qjax
from qjax import formats
from qjax.scheme import Scheme, WeightScheme

INTEGERS = ["int2", "int3", "int4", "int8"]
FORMATS = [(name, True) for name in (*INTEGERS, "nf4", "e2m1", "e4m3", "e5m2")]
FORMATS += [(name, False) for name in INTEGERS]
GRANULARITIES = [("tensor", None), ("channel", None), ("group", 5), ("block", 8)]
# shape, dtype, the axes that a product sums over, the axis argument (None: the default)
ARRAYS = [
    ((30, 13), jnp.float32, (-2,), None),
    ((30, 13), jnp.bfloat16, (-2,), -2),
    ((13, 30), jnp.float32, (-1,), -1),
    ((3, 10, 7), jnp.bfloat16, (-3, -2), (0, 1)),
    ((2, 10, 5), jnp.float16, (-2,), 1),
]


def tile_of(shape, axes, granularity, size):
    if granularity == "tensor":
        return shape
    tile = [1] * len(shape)
    if granularity == "channel":
        for a in axes:
            tile[a] = shape[a]
    else:
        tile[axes[-1]] = size
    if granularity == "block":
        tile[max(a for a in range(-len(shape), 0) if a not in axes)] = size
    return tuple(tile)


def rounded(position: np.ndarray, name: str) -> np.ndarray:
    """Codes of positions on a format's own grid; beyond it, those of its ends."""
    fmt = formats.format_named(name)
    position = np.clip(position, np.float32(fmt.low), np.float32(fmt.high))
    if fmt.kind == "integer":
        return np.rint(position).astype(np.int8)
    if name == "e2m1":
        codes = position.astype(ml_dtypes.float4_e2m1fn).view(np.uint8).astype(np.int8)
        return np.where(codes == 8, 0, codes)  # -0 is stored as 0
    if name == "nf4":
        table = np.asarray(fmt.table, np.float32).astype(np.float64)
        return np.abs(position.astype(np.float64)[..., None] - table).argmin(-1).astype(np.int8)
    return position.astype(fmt.dtype)


def plain_rtn(w: np.ndarray, name: str, symmetric: bool, tile: tuple[int, ...], scale: np.ndarray):
    """``codes = clip(round(w / scale + zero), low, high)``, one tile after the other.

    XLA turns divisions into products with a reciprocal where it can, which rounds twice. So a scale
    has to be one of two; and the codes are given twice, for positions a float32 rounding or two below
    and above the exact one: they differ next to a tie only.
    """
    fmt = formats.format_named(name)
    counts = [int(np.ceil(n / t)) for n, t in zip(w.shape, tile, strict=True)]
    assert scale.shape == tuple(counts) and scale.dtype == w.dtype
    zero = np.zeros(counts, np.int8)
    below, above = np.zeros(w.shape, fmt.dtype), np.zeros(w.shape, fmt.dtype)
    for index in itertools.product(*map(range, counts)):
        where = tuple(slice(i * t, (i + 1) * t) for i, t in zip(index, tile, strict=True))
        inside = w[where].astype(np.float32)
        finite = np.where(np.isfinite(inside), inside, 0)
        low, high = min(finite.min(), np.float32(0)), max(finite.max(), np.float32(0))
        if symmetric:
            # Half the number of steps for integers: compressed-tensors' convention.
            reach, steps = max(-low, high), np.float32((fmt.high - fmt.low) / 2)
        else:
            reach, steps = high - low, np.float32(fmt.high - fmt.low)
        exact = (reach / steps).astype(w.dtype), (reach * (np.float32(1) / steps)).astype(w.dtype)
        assert scale[index] in (exact if reach else (1,))
        step = scale[index].astype(np.float32)
        if not symmetric:
            zero[index] = np.clip(np.rint(np.float32(fmt.low) - low / step), fmt.low, fmt.high)
        position = inside.astype(np.float64) / step
        slack = np.abs(position) * 2.0**-22 + np.abs(zero[index]) * 2.0**-24
        below[where] = rounded(position + zero[index] - slack, name)
        above[where] = rounded(position + zero[index] + slack, name)
    return below, above, zero


def weight(shape, dtype, rng) -> np.ndarray:
    """Bell-shaped, with an offset (so that asymmetric differs) and an outlier."""
    w = rng.standard_normal(shape) * 0.3 + 0.1
    w.flat[3] = 4.0
    return w.astype(np.float32).astype(dtype)


def scheme(name: str, granularity="channel", size=None, symmetric=True) -> Scheme:
    return Scheme(
        weights=WeightScheme(
            format=formats.format_named(name),
            granularity=granularity,
            group_size=size,
            symmetric=symmetric,
        )
    )


@pytest.mark.parametrize(("granularity", "size"), GRANULARITIES, ids=lambda v: str(v or ""))
@pytest.mark.parametrize(("name", "symmetric"), FORMATS)
def test_is_the_plain_loop(name, symmetric, granularity, size, rng, codes_of, decoded):
    ws = [weight(shape, dtype, rng) for shape, dtype, _, _ in ARRAYS]
    how = scheme(name, granularity, size, symmetric)

    @jax.jit  # one compilation for all arrays
    def quantize_all(ws):
        return [qjax.quantize(w, how, axis=axis) for w, (*_, axis) in zip(ws, ARRAYS, strict=True)]

    for w, q, (shape, dtype, axes, _) in zip(ws, quantize_all(ws), ARRAYS, strict=True):
        tile = tile_of(shape, axes, granularity, size)
        below, above, zero = plain_rtn(w, name, symmetric, tile, np.asarray(q.scale))
        assert (q.shape, q.dtype, q.axis, q.tile) == (shape, dtype, axes, tile)
        assert q.tensor_scale is None
        assert (q.zero is None) == symmetric
        if not symmetric:
            assert q.zero.dtype == jnp.int8
            np.testing.assert_array_equal(q.zero, zero)
        codes = codes_of(q)
        assert ((codes == below) | (codes == above)).all()
        assert (below != above).sum() <= q.scale.size + 0.02 * w.size  # an extreme is a tie
        check_error(w, q, decoded(q))


def check_error(w: np.ndarray, q: qjax.QTensor, near: np.ndarray):
    """Half a step for integers, half a gap between neighbours for the others.

    A range of 2**bits - 1 steps is used in full, so that its ends saturate by at most half a step; a
    scale that was rounded to the weight's dtype moves them by another 2**bits roundings of it.
    """
    places = [np.arange(n) // t for n, t in zip(w.shape, q.tile, strict=True)]
    step = np.asarray(q.scale, np.float64)[np.ix_(*places)]
    error = np.abs(near - w.astype(np.float64))
    roundoff = float(jnp.finfo(q.dtype).eps) / 2
    if q.format.kind == "integer":
        steps = 0.5 + 2.0**q.format.bits * roundoff + 1e-4
    else:
        top = q.format.high
        gap = {"nf4": 0.31, "e2m1": 2.0, "e4m3": 32.0, "e5m2": 8192.0}[q.format.name]
        steps = gap / 2 + top * roundoff + 1e-4
    assert (error <= steps * step).all()


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("shift", [-5.0, -0.2, 0.0, 0.2, 5.0])
def test_asymmetric_represents_zero(name, shift, rng, decoded):
    """Even where all weights have one sign."""
    w = (rng.standard_normal((20, 3)) * 0.3 + shift).astype(np.float32)
    w[7, 1] = 0
    q = qjax.quantize(jnp.asarray(w), scheme(name, "group", 10, symmetric=False))
    assert (np.abs(np.asarray(q.zero) + 0.5) <= 2 ** (q.format.bits - 1)).all()
    assert decoded(q)[7, 1] == 0


def test_asymmetric_is_better_on_one_sided_weights(rng, decoded):
    w = rng.uniform(0, 1, (30, 4)).astype(np.float32)
    errors = [
        np.abs(decoded(qjax.quantize(jnp.asarray(w), name)) - w).mean()
        for name in ("w4a16-g30-asym", "w4a16-g30")
    ]
    assert errors[0] < 0.6 * errors[1]  # twice as fine


@pytest.mark.parametrize(
    "name", ["w4a16-g4", "w4a16-g4-asym", "w8a16-channel", "nf4-g4", "fp8", "w2a16-tensor"]
)
def test_tiles_of_zeros(name, decoded):
    w = np.zeros((8, 3), np.float32)
    q = qjax.quantize(jnp.asarray(w), name)
    assert (np.asarray(q.scale, np.float32) == 1).all()
    np.testing.assert_array_equal(decoded(q), w)
    np.testing.assert_array_equal(qjax.dequantize(q), w)


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "nvfp4"])
def test_tiles_of_zeros_under_short_scales(name, decoded):
    w = np.zeros((32, 3), np.float32)
    q = qjax.quantize(jnp.asarray(w), name)
    np.testing.assert_array_equal(decoded(q), w)
    w[:, 1] = 1  # one tile of something beside tiles of zeros
    q = qjax.quantize(jnp.asarray(w), name)
    np.testing.assert_allclose(decoded(q), w, rtol=1e-6)


INFINITE = [
    "w4a16-g8",
    "w8a16-channel",
    "w4a16-g8-asym",
    "nf4-g8",
    "fp8",
    "fp8-e5m2",
    "mxfp4",
    "mxfp8",
    "nvfp4",
]


@pytest.mark.parametrize("name", INFINITE)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_infinities_saturate(name, dtype, rng, decoded):
    """They take the end of the range that the finite weights set, and move nothing else."""
    w = rng.standard_normal((32, 2)).astype(np.float32).astype(dtype)
    w[0, 0], w[1, 0] = np.inf, -np.inf
    without = np.where(np.isfinite(w), w, np.zeros((), dtype))
    q, plain = qjax.quantize(jnp.asarray(w), name), qjax.quantize(jnp.asarray(without), name)
    np.testing.assert_array_equal(q.scale, plain.scale)
    near, expected = decoded(q), decoded(plain)
    np.testing.assert_array_equal(near[2:], expected[2:])
    np.testing.assert_array_equal(near[:, 1], expected[:, 1])
    first = near[: q.tile[0], 0]
    assert (near[0, 0], near[1, 0]) == (first.max(), first.min())
    scale = float(q.scale[0, 0]) * float(1 if q.tensor_scale is None else q.tensor_scale)
    zero = 0 if q.zero is None else int(q.zero[0, 0])
    np.testing.assert_allclose(near[0, 0], (q.format.high - zero) * scale, rtol=1e-6)
    np.testing.assert_allclose(near[1, 0], (q.format.low - zero) * scale, rtol=1e-6)


@pytest.mark.parametrize("method", ["absmax", "percentile", "mse"])
def test_a_tile_of_infinities_is_finite(method, decoded):
    w = jnp.full((4, 2), -jnp.inf).at[:, 1].set(1.0)
    q = qjax.quantize(w, "w4a16-channel", search=qjax.RangeSearch(method=method, steps=4))
    assert np.isfinite(decoded(q)).all() and (decoded(q)[:, 0] < 0).all()


@pytest.mark.parametrize("name", ["w4a16-g8", "fp8", "nf4-g8", "mxfp4"])
def test_nan_is_refused_with_the_name(name):
    w = jnp.ones((32, 2), jnp.bfloat16).at[3, 1].set(jnp.nan)
    with pytest.raises(ValueError, match="^model/layers/3/q_proj: NaN among the weights; [^\n]*$"):
        qjax.quantize(w, name, name="model/layers/3/q_proj")


@pytest.mark.parametrize(
    ("shape", "how", "axis", "message"),
    [
        (
            (100, 4),
            "w4a16-g128",
            None,
            "layer: group size 128 does not divide 100, .*; 25 or 50 or 100 would$",
        ),
        ((4, 30), "w4a16-g8", -1, "layer: group size 8 does not divide 30, .* 6 or 10 "),
        ((1, 30), "w4a16-g8", None, "layer: group size 8 does not divide 1, .*-channel"),
        ((30,), "fp8-block", None, r"layer: blocks need two axes, got shape \(30,\)"),
        ((), "w4a16-channel", None, "layer: a scalar cannot be quantized"),
        ((4, 4), "w4a16-channel", 2, r"layer: .*\(2,\).* no axes of an array of 2 dimensions"),
        ((4, 4), "w4a16-channel", (), r"layer: .*\(\).* no axes of an array of 2 dimensions"),
        ((0, 4), "w4a16-channel", None, r"layer: .*float32 of shape \(0, 4\)"),
        ((4, 0), "nvfp4", None, r"layer: .*float32 of shape \(4, 0\)"),
        ((4, 4), "w5a16", None, "unknown scheme 'w5a16'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(shape, how, axis, message):
    with pytest.raises(ValueError, match=message) as caught:
        qjax.quantize(jnp.zeros(shape), how, axis=axis, name="layer")
    assert "\n" not in str(caught.value)


def test_a_vector_is_summed_over(rng, decoded):
    w = rng.standard_normal(30).astype(np.float32)
    q = qjax.quantize(jnp.asarray(w), "w8a16-g10")
    assert (q.scale.shape, q.axis, q.tile) == ((3,), (-1,), (10,))
    assert np.abs(decoded(q) - w).max() < np.abs(w).max() / 127


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_what_lies_on_the_grid_stays(bits, rng):
    """Quantizing what a QTensor stands for gives it again, where its range is used in full."""
    codes = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (16, 5))
    codes[0], codes[1] = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    w = codes.astype(np.float32) * 0.25
    again = qjax.quantize(jnp.asarray(w), f"w{bits}a16-g16-asym")
    np.testing.assert_allclose(qjax.dequantize(again), w, rtol=1e-6)


def test_works_under_transformations(rng):
    ws = jnp.asarray(rng.standard_normal((3, 20, 4)), jnp.float32)
    one_by_one = [qjax.quantize(w, "w4a16-g10-asym") for w in ws]
    stacked = jax.jit(jax.vmap(lambda w: qjax.quantize(w, "w4a16-g10-asym")))(ws)
    for i, q in enumerate(one_by_one):
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[i]), q, stacked)  # noqa: B023
    abstract = jax.eval_shape(lambda w: qjax.quantize(w, "w4a16-g10-asym"), ws[0])
    assert jax.tree.structure(abstract) == jax.tree.structure(one_by_one[0])
    for expected, leaf in zip(*map(jax.tree.leaves, (one_by_one[0], abstract)), strict=True):
        assert (leaf.shape, leaf.dtype) == (expected.shape, expected.dtype)
