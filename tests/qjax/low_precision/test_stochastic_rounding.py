# SPDX-License-Identifier: Apache-2.0
"""Stochastic rounding gives one of two neighbours, and in the mean the value itself."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from qjax import formats
from qjax.low_precision import apply_updates_stochastically, stochastic_rounding

DRAWS = 4096
HALVES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def ladder(name: str) -> np.ndarray:
    """Every finite value of a format or a dtype of 16 bits, float64."""
    if name in HALVES:
        codes = np.arange(2**16, dtype=np.uint16).view(HALVES[name])
    else:
        fmt = formats.format_named(name)
        match fmt.kind:
            case "integer":
                codes = np.arange(fmt.low, fmt.high + 1)
            case "codebook":
                codes = np.asarray(fmt.table, np.float32)
            case _:
                codes = np.arange(256, dtype=np.uint8).view(fmt.dtype)
    with np.errstate(invalid="ignore"):  # among the codes there are NaN
        values = codes.astype(np.float32).astype(np.float64)
    values = np.unique(values[np.isfinite(values)])
    # float32 arithmetic flushes its own subnormals, which bfloat16 has too.
    return values[(np.abs(values) >= np.finfo(np.float32).tiny) | (values == 0)]


@functools.partial(jax.jit, static_argnums=1)
def rounded_array(x, name, key):
    if name in HALVES:
        return stochastic_rounding.cast(x, name, key).astype(jnp.float32)
    fmt = formats.format_named(name)
    return formats.decode(stochastic_rounding.encode(x, fmt, key), fmt)


def rounded(values: np.ndarray, name: str, seed: int = 0) -> np.ndarray:
    x = jnp.asarray(values, jnp.float32)
    return np.asarray(rounded_array(x, name, jax.random.key(seed)), np.float64)


def values_inside(name: str, rng, count: int = 64) -> np.ndarray:
    """Some between each kind of neighbours: of the whole range, evenly over the ladder."""
    steps = ladder(name)
    steps = steps[np.abs(steps) < 1e30]
    place = rng.integers(0, len(steps) - 1, count)
    inside = steps[place] + rng.uniform(0, 1, count) * np.diff(steps)[place]
    return inside.astype(np.float32).astype(np.float64)


@pytest.mark.parametrize("name", [*formats.NAMES, *HALVES])
class TestOfEveryFormat:
    def test_a_neighbour_and_unbiased(self, name, rng):
        x, steps = values_inside(name, rng), ladder(name)
        got = rounded(np.broadcast_to(x, (DRAWS, len(x))), name)
        below = steps[np.searchsorted(steps, x, side="right") - 1]
        above = steps[np.searchsorted(steps, x)]
        assert ((got == below) | (got == above)).all()
        # Five standard deviations of the mean, and what the random numbers' own 23 (16) bits may be off.
        deviation = np.sqrt((x - below) * (above - x) / DRAWS)
        bits = 16 if name == "bfloat16" else 23
        assert (np.abs(got.mean(0) - x) <= 5 * deviation + (above - below) * 2.0**-bits).all()

    def test_exact_on_its_own_values(self, name):
        steps = ladder(name)
        for seed in range(2):
            np.testing.assert_array_equal(rounded(steps, name, seed), steps)


@pytest.mark.parametrize("fmt", [formats.INT4, formats.E4M3, formats.NF4], ids=lambda f: f.name)
def test_codes_saturate(fmt):
    x = jnp.array([jnp.inf, -jnp.inf, 1e6, -1e6])
    codes = stochastic_rounding.encode(x, fmt, jax.random.key(0))
    assert formats.decode(codes, fmt).tolist() == [fmt.high, fmt.low, fmt.high, fmt.low]


@pytest.mark.parametrize("dtype", HALVES)
def test_a_cast_keeps_what_is_not_finite(dtype):
    x = jnp.array([jnp.inf, -jnp.inf, jnp.nan, 3.4e38, 0.0])
    got = stochastic_rounding.cast(x, dtype, jax.random.key(0)).astype(jnp.float32)
    np.testing.assert_array_equal(got, x.astype(dtype).astype(jnp.float32))


def test_nan_stays_in_8_bit_floats():
    codes = stochastic_rounding.encode(jnp.array([jnp.nan]), formats.E4M3, jax.random.key(0))
    assert jnp.isnan(codes.astype(jnp.float32)).all()


def test_another_dtype_is_refused():
    with pytest.raises(ValueError, match="bfloat16 or float16, got int8"):
        stochastic_rounding.cast(jnp.ones(2), jnp.int8, jax.random.key(0))


def test_small_updates_arrive_in_16_bit_weights():
    """A hundred updates of a hundredth of a gap: the nearest loses all, chance loses none in the mean."""
    weights, update, steps = jnp.ones(4096, jnp.bfloat16), 2.0**-7 / 100, 100

    def step(carry, key):
        near, by_chance = carry
        updates = jnp.full(weights.shape, update)
        return (
            optax.apply_updates(near, updates),
            apply_updates_stochastically(by_chance, updates, key),
        ), None

    keys = jax.random.split(jax.random.key(0), steps)
    (near, by_chance), _ = jax.jit(lambda: jax.lax.scan(step, (weights, weights), keys))()
    assert (near == weights).all()
    assert by_chance.dtype == jnp.bfloat16
    # Bernoulli of 1/100, a hundred times: variance about one squared gap.
    mean = by_chance.astype(jnp.float32).mean()
    assert abs(float(mean) - (1 + steps * update)) < 5 * 2.0**-7 / np.sqrt(weights.size)


def test_updates_of_a_tree(rng):
    params = {"w": jnp.asarray(rng.standard_normal(5), jnp.float32), "held": None}
    params |= {"h": jnp.ones(3, jnp.float16), "fixed": jnp.ones(2)}
    updates = {"w": jnp.full(5, 0.1), "held": None, "h": jnp.ones(3), "fixed": None}
    moved = apply_updates_stochastically(params, updates, jax.random.key(0))
    exact = optax.apply_updates(params["w"], updates["w"])
    np.testing.assert_array_equal(moved["w"], exact)
    assert moved["held"] is None and moved["fixed"].tolist() == [1, 1]
    assert moved["h"].dtype == jnp.float16 and moved["h"].tolist() == [2, 2, 2]
