# SPDX-License-Identifier: Apache-2.0
"""From ranges to scales: each rule against a brute force over what could be stored."""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import qjax
from qjax import formats, ranges
from qjax.ranges import RangeSearch
from qjax.scheme import Scheme

E4M3_VALUES = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)


def magnitudes() -> np.ndarray:
    """Normal float32 numbers of every exponent, with mantissas on and around every edge."""
    mantissas = np.array([1, 1.2, 1.25, 1.5, 1.74, 1.75, 1.76, 1.8, 1.875, 1.9, 1.99], np.float64)
    x = np.ldexp(mantissas[:, None], np.arange(-126, 128)).ravel().astype(np.float32)
    x = np.concatenate([x, np.nextafter(x, np.float32(0)), np.nextafter(x, np.float32(3e38))])
    return x[x >= np.finfo(np.float32).tiny]


@pytest.mark.parametrize("name", ["e2m1", "e4m3"])
def test_powers_of_two_for_microscaling(name):
    """The least power of two under which the largest magnitude rounds to the format's top or below."""
    fmt = formats.format_named(name)
    absmax = magnitudes()
    scale = jax.jit(lambda x: ranges.symmetric_scale(x, fmt, "e8m0"))(absmax)
    assert scale.dtype == jnp.float8_e8m0fnu
    # Beyond the top the next value would be a power of two; half-way to it still rounds to the top.
    midpoint = (fmt.high + 2 ** np.ceil(np.log2(fmt.high))) / 2
    # e8m0 has 2**-127 too, which is no normal float32.
    powers = np.ldexp(1.0, np.arange(-126, 128))
    fits = absmax.astype(np.float64)[:, None] <= midpoint * powers
    expected = powers[np.argmax(fits, axis=1)]
    np.testing.assert_array_equal(np.asarray(scale).astype(np.float64), expected)


def test_zero_has_scale_one_in_every_storage():
    for scale_format in ("float", "e8m0", "e4m3"):
        scale = ranges.symmetric_scale(jnp.zeros(3), formats.E2M1, scale_format)
        assert np.asarray(scale).astype(np.float32).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("name", "dtype", "least"),
    [
        ("w8a16-channel", jnp.float16, 2.0**-24),
        ("w8a16-channel-asym", jnp.float16, 2.0**-24),
        ("nvfp4", jnp.float32, 2.0**-9),
        ("w8a16-channel", jnp.float32, 2.0**-126),  # its subnormals count as zero
        ("w8a16-channel", jnp.bfloat16, 2.0**-126),
    ],
)
def test_a_scale_too_small_to_store_is_the_least_there_is(name, dtype, least, decoded):
    """Only a tile of zeros has scale one: under it, small weights would all become zero."""
    w = np.zeros((16, 3), np.float64)
    w[:, 0] = 1.0
    tensor_scale = 1 / (6 * 448) if name == "nvfp4" else 1.0
    w[::2, 1] = 1.5 * least * tensor_scale
    q = qjax.quantize(jnp.asarray(w, dtype), name)
    np.testing.assert_array_equal(np.asarray(q.scale, np.float64)[0, 1:], [least, 1])
    w = np.asarray(jnp.asarray(w, dtype), np.float64)
    assert (np.abs(decoded(q) - w)[:, 1:] <= 0.5001 * least * tensor_scale).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["int2", "int4", "int8", "nf4", "e4m3"])
def test_float_scales(name, dtype):
    """The largest magnitude over half the range, in the weight's dtype."""
    fmt = formats.format_named(name)
    absmax = np.linspace(0.01, 7, 50).astype(np.float32)
    scale = ranges.symmetric_scale(jnp.asarray(absmax), fmt, "float", dtype)
    assert scale.dtype == dtype
    divisor = {"int2": 1.5, "int4": 7.5, "int8": 127.5, "nf4": 1.0, "e4m3": 448.0}[name]
    np.testing.assert_allclose(
        np.asarray(scale, np.float64),
        absmax / divisor,
        rtol=float(jnp.finfo(dtype).eps),
        atol=2.0**-25,
    )  # float16 is coarse there


@pytest.mark.parametrize("loudest", [1e-3, 1.0, 300.0])
def test_nvfp4_scales(loudest, rng):
    """The largest tile's scale is 448; every other is the nearest e4m3 number."""
    w = rng.standard_normal((64, 5)).astype(np.float32) * np.exp2(
        rng.uniform(-8, 0, (1, 5))
    ).astype(np.float32)
    w *= np.float32(loudest / np.abs(w).max())
    q = qjax.quantize(jnp.asarray(w), "nvfp4")
    assert q.tensor_scale.dtype == jnp.float32 and q.tensor_scale.shape == ()
    np.testing.assert_allclose(q.tensor_scale, loudest / (6 * 448), rtol=1e-6)
    assert q.scale.dtype == jnp.float8_e4m3fn
    wanted = np.abs(w.reshape(4, 16, 5)).max(1).astype(np.float64) / 6 / float(q.tensor_scale)
    distance = np.abs(wanted[..., None] - E4M3_VALUES)
    chosen = np.abs(wanted - np.asarray(q.scale).astype(np.float64))
    assert (chosen <= distance.min(-1) * (1 + 1e-5) + 1e-4).all()
    assert np.asarray(q.scale).astype(np.float64).max() == 448


TILED = [
    ("w4a16-g10", 10),
    ("w4a16-g10-asym", 10),
    ("w3a16-channel", 40),
    ("w8a16-channel-asym", 40),
    ("nf4-g20", 20),
]


@pytest.mark.parametrize("percentile", [100, 99.0, 75.0])
@pytest.mark.parametrize(("name", "group"), TILED)
def test_percentile(name, group, percentile, rng):
    """The range is numpy's percentile: of magnitudes, or half of the rest cut off at either end."""
    w = rng.standard_normal((40, 3)).astype(np.float32) + 0.1
    q = qjax.quantize(
        jnp.asarray(w), name, search=RangeSearch(method="percentile", percentile=percentile)
    )
    tiles = w.astype(np.float64).reshape(40 // group, group, 3)
    if q.zero is None:
        expected = np.percentile(np.abs(tiles), percentile, axis=1) / q.format.symmetric_divisor
    else:
        low = np.minimum(np.percentile(tiles, (100 - percentile) / 2, axis=1), 0)
        high = np.maximum(np.percentile(tiles, 100 - (100 - percentile) / 2, axis=1), 0)
        expected = (high - low) / (2**q.format.bits - 1)
    np.testing.assert_allclose(q.scale, expected, rtol=1e-5)


def test_percentile_of_a_ragged_block_counts_only_what_is_there(rng):
    w = rng.standard_normal((10, 7)).astype(np.float32)
    weights = qjax.scheme.WeightScheme(format=formats.INT4, granularity="block", group_size=6)
    q = qjax.quantize(
        jnp.asarray(w),
        Scheme(weights=weights),
        search=RangeSearch(method="percentile", percentile=50),
    )
    for i, j in itertools.product(range(2), range(2)):
        inside = np.abs(w[6 * i : 6 * i + 6, 6 * j : 6 * j + 6]).astype(np.float64)
        np.testing.assert_allclose(q.scale[i, j], np.percentile(inside, 50) / 7.5, rtol=1e-5)


def test_percentile_leaves_infinities_out(rng):
    w = rng.standard_normal((20, 1)).astype(np.float32)
    w[:5] = np.inf
    q = qjax.quantize(
        jnp.asarray(w), "w4a16-channel", search=RangeSearch(method="percentile", percentile=60)
    )
    np.testing.assert_allclose(q.scale[0, 0], np.percentile(np.abs(w[5:]), 60) / 7.5, rtol=1e-5)


def plain_search(
    w: np.ndarray, bits: int, symmetric: bool, search: RangeSearch
) -> tuple[np.ndarray, np.ndarray]:
    """Error of each candidate for one tile, and its scale; float64 but for what is stored."""
    low, high = min(w.min(), 0), max(w.max(), 0)
    if symmetric:
        high = max(-low, high)
        low = -high
    bottom, top = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    errors, scales = [], []
    for i in range(search.steps):
        shrink = 1 - search.max_shrink * i / search.steps
        scale = np.float64(np.float32((high - low) * shrink / (2**bits - 1)))
        zero = 0 if symmetric else np.clip(np.rint(bottom - low * shrink / scale), bottom, top)
        near = (np.clip(np.rint(w / scale + zero), bottom, top) - zero) * scale
        errors.append((np.abs(near - w) ** search.norm).sum())
        scales.append(scale)
    return np.array(errors), np.array(scales)


@pytest.mark.parametrize("norm", [2.4, 2.0, 1.0])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_search_is_the_plain_search(bits, symmetric, norm, rng):
    w = rng.standard_t(3, (40, 4)).astype(np.float32)
    search = RangeSearch(method="mse", steps=20, norm=norm)
    name = f"w{bits}a16-g20" + ("" if symmetric else "-asym")
    q = qjax.quantize(jnp.asarray(w), name, search=search)
    for group, column in itertools.product(range(2), range(4)):
        tile = w[20 * group : 20 * group + 20, column].astype(np.float64)
        errors, scales = plain_search(tile, bits, symmetric, search)
        chosen = np.argmin(np.abs(scales - float(q.scale[group, column])))
        np.testing.assert_allclose(q.scale[group, column], scales[chosen], rtol=1e-6)
        assert errors[chosen] <= errors.min() * (1 + 1e-4)  # float32 sums may take a near tie


def test_the_default_search_is_that_of_gptq():
    """``for i in range(int(0.8 * 100)): p = 1 - i / 100`` of its code."""
    search = RangeSearch(method="mse")
    shrinks = [1 - search.max_shrink * i / search.steps for i in range(search.steps)]
    np.testing.assert_allclose(shrinks, [1 - i / 100 for i in range(80)], rtol=1e-12)
    assert search.norm == 2.4


MSE_NAMES = ["w4a16-g16", "w4a16-g16-asym", "w3a16-channel", "w2a16-g32-asym", "w8a16-tensor", "nf4-g16",
             "fp8", "fp8-e5m2", "mxfp4", "mxfp8", "nvfp4"]  # fmt: skip


@pytest.mark.parametrize("name", MSE_NAMES)
def test_mse_search_is_never_worse_than_absmax(name, rng, decoded, norm=2.4):
    """In its own norm, tile for tile."""
    w = (rng.standard_t(2, (64, 6)) * 0.1).astype(np.float32)
    searches = RangeSearch(method="mse", steps=12, norm=norm), RangeSearch()
    searched, plain = (qjax.quantize(jnp.asarray(w), name, search=search) for search in searches)
    counts = searched.scale.shape
    errors = [
        (np.abs(decoded(q) - w) ** norm)
        .reshape(counts[0], 64 // counts[0], counts[1], 6 // counts[1])
        .sum((1, 3))
        for q in (searched, plain)
    ]
    assert (errors[0] <= errors[1] * (1 + 1e-5)).all()
    if name.startswith(("w4", "w3", "w2")):
        assert errors[0].sum() < errors[1].sum()


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"percentile": 0}, r"\(0, 100\], got .*=0$"),
        ({"percentile": 100.5}, r"\(0, 100\], got .*100.5"),
        ({"steps": 0}, "steps >= 1 .*=0 "),
        ({"max_shrink": 1.0}, r"\[0, 1\), got .*=1.0"),
        ({"max_shrink": -0.1}, r"\[0, 1\), got .*=-0.1"),
        ({"norm": 0.0}, "norm.*0.0"),
    ],
)
def test_impossible_searches_are_refused(choices, message):
    with pytest.raises(ValueError, match=message):
        RangeSearch(**choices)


def test_an_unknown_method_is_refused():
    """Also where nothing checks types: it must not pass for absmax."""
    search = object.__new__(RangeSearch)
    object.__setattr__(search, "method", "max")
    with pytest.raises(ValueError, match="absmax, percentile, mse or output, got 'max'"):
        search.__post_init__()
