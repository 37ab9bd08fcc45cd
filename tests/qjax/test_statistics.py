# SPDX-License-Identifier: Apache-2.0
"""Statistics of rows of which some do not count, and what is done where those that do are too few."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import cpu, statistics

ROWS, WIDTH = 50, 7


@pytest.fixture
def x() -> np.ndarray:
    # All positive: a zero that slipped in would be the least value.
    return np.abs(np.random.default_rng(0).standard_normal((ROWS, WIDTH)).astype(np.float32)) + 1


def of_rows(x, counted=None):
    return statistics.of_rows(jnp.asarray(x), hessian=True, counted=counted)


@pytest.mark.parametrize("share", [0.02, 0.5, 1])
def test_rows_that_do_not_count_leave_no_trace(x, share):
    counted = np.arange(ROWS) < share * ROWS
    spoiled = np.where(counted[:, None], x, np.nan).astype(np.float32)
    found, expected = of_rows(spoiled, jnp.asarray(counted)), of_rows(x[counted])
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_no_row_at_all_is_neutral(x):
    none = of_rows(x, jnp.zeros(ROWS, bool))
    both = statistics.merged(none, of_rows(x))
    for a, b in zip(jax.tree.leaves(both), jax.tree.leaves(of_rows(x)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert int(none.rows) == 0 and not np.asarray(none.hessian).any()


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_missing_rows_are_average_ones(x, rows):
    few, every = of_rows(x, jnp.arange(ROWS) < rows), of_rows(x)
    filled = statistics.filled_up(few, every, WIDTH)
    missing = WIDTH - rows
    expected = x[:rows].T @ x[:rows] + missing * (x.T @ x) / ROWS
    np.testing.assert_allclose(filled.hessian, expected, rtol=1e-5)
    mean = (np.abs(x[:rows]).sum(0) + missing * np.abs(x).mean(0)) / WIDTH
    np.testing.assert_allclose(filled.mean_magnitude, mean, rtol=1e-5)
    np.testing.assert_array_equal(filled.absmax, np.abs(x).max(0))
    assert int(filled.rows) == WIDTH


def test_enough_rows_stay_as_they_are(x):
    few = of_rows(x, jnp.arange(ROWS) < WIDTH)
    filled = statistics.filled_up(few, of_rows(x), WIDTH)
    for a, b in zip(jax.tree.leaves(filled), jax.tree.leaves(few), strict=True):
        np.testing.assert_array_equal(a, b)


def test_where_all_rows_are_too_few_there_are_as_many_as_all(x):
    assert int(statistics.filled_up(of_rows(x[:1]), of_rows(x[:4]), WIDTH).rows) == 4


@pytest.mark.parametrize("width", [1, 2, 3, 5, 8, 130])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("has_products", [False, True])
def test_hessian_is_the_exact_sum_of_products(monkeypatch, width, dtype, has_products):
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: has_products)
    rows = jax.random.normal(jax.random.key(2), (33, width)).astype(dtype)
    found = jax.jit(functools.partial(statistics.of_rows, hessian=True))(rows).hessian
    assert found.dtype == jnp.float32
    exact = np.asarray(rows, np.float64)
    # The sum of 33 products in float32, whose terms are as large as those of the columns' norms.
    norms = np.sqrt(np.sum(exact**2, axis=0))
    bound = 33 * 2.0**-24 * np.outer(norms, norms)
    assert (np.abs(found - exact.T @ exact) <= bound).all()
