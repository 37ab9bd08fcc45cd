# SPDX-License-Identifier: Apache-2.0
"""LSQ's value and gradients are the papers' closed forms, element by element."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import formats, tiles
from qjax.formats import format_named
from qjax.qat import lsq
from qjax.qat.lsq import LearnedGrid
from qjax.ranges import Grid

SHAPE, TILE = (10, 6), (4, 3)  # the last tile of the first axis is ragged


def problem(seed: int, fmt, *, zero: bool):
    """Values of which some lie far beyond the range, and a grid; all in float32."""
    rng = np.random.default_rng(seed)
    counts = tiles.counts(SHAPE, TILE)
    scale = rng.uniform(0.05, 0.3, counts).astype(np.float32)
    v = rng.standard_normal(SHAPE).astype(np.float32) * 0.2 * (fmt.high - fmt.low)
    z = rng.integers(fmt.low, fmt.high + 1, counts).astype(np.float32) if zero else None
    return v, scale, z, rng.standard_normal(SHAPE).astype(np.float32)


def nearest(position: float, fmt) -> float:
    held = sorted(set(fmt.table)) if fmt.table else range(int(fmt.low), int(fmt.high) + 1)
    return min(held, key=lambda value: abs(value - position))


def closed_form(v, scale, zero, cotangent, fmt):
    """The table of the module's docstring, in plain loops."""
    value, d_v = np.zeros(SHAPE), np.zeros(SHAPE)
    d_s, d_z = np.zeros(scale.shape), np.zeros(scale.shape)
    for i, j in np.ndindex(SHAPE):
        tile = i // TILE[0], j // TILE[1]
        s, z = float(scale[tile]), 0.0 if zero is None else float(zero[tile])
        position = float(np.float32(v[i, j]) / np.float32(s)) + z
        q = nearest(min(max(position, fmt.low), fmt.high), fmt)
        value[i, j] = (q - z) * s
        g = float(cotangent[i, j])
        if fmt.low < position < fmt.high:
            d_v[i, j] = g
            d_s[tile] += g * (q - z - v[i, j] / s)
        else:
            d_s[tile] += g * (q - z)
            d_z[tile] += g * -s
    return value, d_v, d_s, d_z


INTEGERS, CODEBOOKS = ("int2", "int3", "int4", "int8"), ("nf4", "e2m1")


@pytest.mark.parametrize(
    ("name", "zero"),
    [*((name, False) for name in INTEGERS + CODEBOOKS), *((name, True) for name in INTEGERS)],
)
def test_value_and_gradients(name: str, zero: bool) -> None:
    fmt = format_named(name)
    v, scale, z, cotangent = problem(1, fmt, zero=zero)
    grid = LearnedGrid(jnp.asarray(scale), None if z is None else jnp.asarray(z))
    value, pullback = jax.vjp(
        lambda v, grid: lsq.fake_quantize(v, grid, fmt, TILE), jnp.asarray(v), grid
    )
    d_v, d_grid = pullback(jnp.asarray(cotangent))
    expected = closed_form(v, scale, z, cotangent, fmt)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(d_v, expected[1])
    np.testing.assert_allclose(d_grid.scale, expected[2], rtol=1e-4, atol=1e-4)
    if zero:
        np.testing.assert_allclose(d_grid.zero, expected[3], rtol=1e-4, atol=1e-5)


def test_at_the_ends_of_the_range_no_weight_has_a_gradient() -> None:
    fmt, grid = formats.INT4, LearnedGrid(jnp.ones((1,)))
    v = jnp.array([-8.5, -8.0, -7.75, 6.75, 7.0, 7.5])
    slopes = jax.grad(lambda v: lsq.fake_quantize(v, grid, fmt, (6,)).sum())(v)
    assert slopes.tolist() == [0, 0, 1, 1, 0, 0]


def test_gradient_scale_is_the_papers() -> None:
    fmt = formats.INT4
    v, scale, _, _ = problem(2, fmt, zero=False)
    factor = lsq.gradient_scale(12, fmt)
    assert factor == pytest.approx(1 / math.sqrt(12 * 7))

    def slope(factor: float):
        return jax.grad(
            lambda s: lsq.fake_quantize(
                jnp.asarray(v), LearnedGrid(s), fmt, TILE, gradient_scale=factor
            ).sum()
        )(jnp.asarray(scale))

    np.testing.assert_allclose(slope(factor), factor * slope(1.0), rtol=1e-6)


def test_first_steps_are_the_papers() -> None:
    fmt = formats.INT4
    w = problem(3, fmt, zero=False)[0]
    steps, plus = (
        f(jnp.asarray(w), fmt, TILE) for f in (lsq.initial_step, lsq.initial_weight_step)
    )
    for tile in np.ndindex(steps.shape):
        own = w[4 * tile[0] : 4 * tile[0] + 4, 3 * tile[1] : 3 * tile[1] + 3].astype(np.float64)
        assert steps[tile] == pytest.approx(2 * np.abs(own).mean() / math.sqrt(7), rel=1e-5)
        reach = max(abs(own.mean() - 3 * own.std()), abs(own.mean() + 3 * own.std()))
        assert plus[tile] == pytest.approx(reach / 8, rel=1e-4)
    grid = lsq.initial_activation_grid(jnp.array([-1.0]), jnp.array([2.0]), fmt)
    ends = lsq.fake_quantize(jnp.array([-1.0, 2.0]), grid, fmt, (2,))
    np.testing.assert_allclose(ends, [-1.0, 2.0], atol=0.1 + 1e-6)


def test_steps_are_rounded_to_what_is_stored() -> None:
    grid = LearnedGrid(jnp.array([0.1], jnp.float32), jnp.array([1.4]))
    held = lsq.stored(grid, formats.INT4, jnp.bfloat16)
    assert held.scale.dtype == jnp.bfloat16 and held.zero.tolist() == [1]
    value = lsq.fake_quantize(jnp.array([0.3]), grid, formats.INT4, (1,), dtype=jnp.bfloat16)
    assert float(value[0]) == 3 * float(jnp.bfloat16(0.1))
    nothing = LearnedGrid(jnp.array([-1.0]))
    assert float(lsq.stored(nothing, formats.INT4).scale[0]) > 0


def test_powers_of_two_are_refused() -> None:
    with pytest.raises(ValueError, match="powers of two cannot be learned"):
        lsq.from_stored(Grid(jnp.ones(2, jnp.float8_e8m0fnu), None, None))
