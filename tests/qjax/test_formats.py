# SPDX-License-Identifier: Apache-2.0
"""Rounding to every format, against a search over all of its values in float64."""

import statistics

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qjax import formats

FLOATS = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e2m1": ml_dtypes.float4_e2m1fn,
}
NAMES = ["int2", "int3", "int4", "int8", "nf4", *FLOATS]


def normal_float() -> np.ndarray:
    """QLoRA, appendix E: quantiles of a normal, eight below zero and nine from it on, scaled to 1."""
    offset = 0.9677083
    quantile = statistics.NormalDist().inv_cdf
    positive = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    negative = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    values = np.sort([*positive, 0.0, *negative])
    return values / values.max()


def codes_and_values(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Every finite code of a format, as a pattern of bits, and its value."""
    if name.startswith("int"):
        codes = np.arange(-(2 ** (int(name[3:]) - 1)), 2 ** (int(name[3:]) - 1))
        return codes, codes.astype(np.float64)
    if name == "nf4":
        return np.arange(16), np.asarray(formats.NF4.table, np.float32).astype(np.float64)
    bits = 4 if name == "e2m1" else 8
    codes = np.arange(2**bits)
    values = codes.astype(np.uint8).view(FLOATS[name]).astype(np.float64)
    return codes[np.isfinite(values)], values[np.isfinite(values)]


def probes(values: np.ndarray) -> np.ndarray:
    """Every value, every midpoint, and the float32 numbers right below and above each of them."""
    values = np.unique(values)
    points = np.concatenate([values, (values[1:] + values[:-1]) / 2]).astype(np.float32)
    outside = np.array([1.01, 2, 1e9], np.float32) * np.float32(np.abs(values).max())
    outside = np.append(outside, np.float32(3.4e38))
    tiny = np.array([1e-30, 2.0**-17, 2.0**-16, 2.0**-10, 2.0**-9], np.float32)
    rng = np.random.default_rng(0)
    inside = rng.uniform(values.min(), values.max(), 500).astype(np.float32)
    inside = np.concatenate(
        [inside, (inside * np.exp2(-rng.uniform(0, 20, 500))).astype(np.float32)]
    )
    all_points = np.concatenate([points, outside, -outside, tiny, -tiny, inside])
    around = [np.nextafter(all_points, np.float32(side)) for side in (-np.inf, np.inf)]
    return np.concatenate([all_points, *around])


def nearest_values(x: np.ndarray, name: str) -> np.ndarray:
    """The nearest value; of two equally near the one whose code is even."""
    codes, values = codes_and_values(name)
    distance = np.abs(np.clip(x.astype(np.float64), values.min(), values.max())[:, None] - values)
    # Among equals the even code comes first; +0 and -0 are one value.
    order = np.argsort(codes & 1, kind="stable")
    return values[order][np.argmin(distance[:, order], axis=1)]


def bit_patterns(codes: jax.Array) -> np.ndarray:
    codes = np.asarray(codes)
    return (
        codes.astype(np.int64) if codes.dtype == np.int8 else codes.view(np.uint8).astype(np.int64)
    )


encode = jax.jit(formats.encode, static_argnums=1)
decode = jax.jit(formats.decode, static_argnums=1)


def test_normal_float_is_the_one_of_the_paper():
    # The published table went through float32 and an approximate quantile.
    np.testing.assert_allclose(formats.NF4.table, normal_float(), atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_every_code_decodes(name):
    fmt = formats.format_named(name)
    codes, values = codes_and_values(name)
    stored = (
        codes.astype(np.uint8).view(FLOATS[name]) if fmt.kind == "float" else codes.astype(np.int8)
    )
    decoded = decode(jnp.asarray(stored), fmt)
    assert decoded.dtype == jnp.float32
    np.testing.assert_array_equal(decoded, values)
    assert (fmt.low, fmt.high) == (values.min(), values.max())
    assert fmt.bits == {"int2": 2, "int3": 3, "int4": 4, "nf4": 4, "e2m1": 4}.get(name, 8)


@pytest.mark.parametrize("name", NAMES)
def test_rounds_to_nearest(name):
    fmt = formats.format_named(name)
    x = probes(codes_and_values(name)[1])
    codes = encode(jnp.asarray(x), fmt)
    assert codes.dtype == jnp.dtype(fmt.dtype)
    np.testing.assert_array_equal(decode(codes, fmt), nearest_values(x, name))


@pytest.mark.parametrize("name", list(FLOATS))
def test_agrees_with_ml_dtypes(name):
    dtype, fmt = FLOATS[name], formats.format_named(name)
    x = probes(codes_and_values(name)[1])
    inside = x[np.abs(x) <= fmt.high]
    expected = inside.astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(decode(encode(jnp.asarray(inside), fmt), fmt), expected)


@pytest.mark.parametrize("name", ["int2", "int3", "int4", "int8"])
def test_integers_round_ties_to_even(name):
    fmt = formats.format_named(name)
    ties = np.arange(fmt.low, fmt.high) + 0.5
    codes = bit_patterns(encode(jnp.asarray(ties, jnp.float32), fmt))
    np.testing.assert_array_equal(codes, np.rint(ties))
    assert not (codes % 2).any()


@pytest.mark.parametrize("name", NAMES)
def test_infinities_saturate(name):
    fmt = formats.format_named(name)
    x = jnp.array([jnp.inf, -jnp.inf, 3.4e38, -3.4e38], jnp.float32)
    expected = [fmt.high, fmt.low, fmt.high, fmt.low]
    assert decode(encode(x, fmt), fmt).tolist() == expected


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_takes_short_floats(dtype):
    x = jnp.linspace(-9, 9, 200).astype(dtype)
    for name in ("int4", "e2m1"):
        rounded = decode(encode(x, formats.format_named(name)), formats.format_named(name))
        np.testing.assert_array_equal(rounded, nearest_values(np.asarray(x, np.float32), name))


def test_what_a_format_says_of_itself():
    four = formats.INT4
    assert (four.packed, four.signed, four.symmetric_divisor) == (False, True, 7.5)  # XLA's int4
    assert (formats.INT3.packed, formats.INT3.symmetric_divisor) == (True, 3.5)
    assert (formats.INT8.packed, formats.INT8.symmetric_divisor) == (False, 127.5)
    assert (formats.E2M1.packed, formats.E2M1.signed, formats.E2M1.symmetric_divisor) == (
        True,
        False,
        6,
    )
    assert [formats.format_named(name).name for name in NAMES] == NAMES


def test_an_unknown_format_is_refused():
    with pytest.raises(
        ValueError, match=r"^unknown number format 'int5': qjax has int2, int3, .*$"
    ):
        formats.format_named("int5")


@pytest.mark.parametrize(
    "dtype", ["float8_e4m3fn", "float8_e5m2", "float16", "bfloat16", "float32"]
)
def test_nearest_is_there_and_back(dtype):
    """So that leaving both conversions out, as XLA does on a GPU, changes nothing."""
    rng, top = np.random.default_rng(0), float(jnp.finfo(dtype).max)
    bits = rng.integers(0, 2**32, 20000, np.uint32)
    spread = rng.standard_normal(20000) * 2.0 ** rng.uniform(-30, 12, 20000)
    special = [0.0, -0.0, top, -top, np.inf, -np.inf, np.nan]
    parts = bits.view(np.float32), spread.astype(np.float32), np.array(special, np.float32)
    values = np.concatenate(parts)
    # What overflows is for the conversion; numbers that float32 itself holds as subnormals are zeros.
    values = values[~(np.abs(values) > top) | ~np.isfinite(values)]
    values = values[~((np.abs(values) < np.finfo(np.float32).tiny) & (values != 0))]
    with np.errstate(invalid="ignore"):  # of NaN and infinities, which some have no code for
        expected = values.astype(ml_dtypes.finfo(dtype).dtype).astype(np.float32)
    found = np.asarray(jax.jit(formats.nearest, static_argnums=1)(values, dtype))
    finite = np.isfinite(values)
    np.testing.assert_array_equal(found[finite], expected[finite])
    np.testing.assert_array_equal(found[~finite], values[~finite])
    assert (np.signbit(found) == np.signbit(values))[finite].all()
