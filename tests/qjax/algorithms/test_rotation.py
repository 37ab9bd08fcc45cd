# SPDX-License-Identifier: Apache-2.0
"""Rotations of every size against plain Kronecker products in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.algorithms import rotation

# Multiples of four up to 512 that need Williamson's construction or fields of prime powers: their odd part
# is a Hartley transform.
NO_HADAMARD = [
    52, 92, 100, 116, 156, 172, 184, 188, 232, 236, 244, 260, 268, 292, 324, 340, 344, 356, 372, 376,
    404, 412, 428, 436, 452, 472, 476, 508,
]  # fmt: skip


def matrix(n: int) -> np.ndarray:
    return functools.reduce(np.kron, rotation.factors(n))


def test_factors_are_orthogonal_and_of_every_size():
    found = {}
    for n in (*range(1, 513), 4864, 11008, 14336, 18944, 29568):
        assert np.prod([len(factor) for factor in rotation.factors(n)]) == n
        found |= {len(factor): factor for factor in rotation.factors(n)}
    for order, factor in found.items():
        if order % 4 == 0 or order < 3:  # a Hadamard matrix, exactly
            whole = np.rint(factor * np.sqrt(order))
            assert (factor == whole / np.sqrt(order)).all(), order
            assert (whole @ whole.T == order * np.eye(order)).all(), order
        else:
            assert np.abs(factor @ factor.T - np.eye(order)).max() < 1e-13, order
            assert np.abs(factor).max() <= np.sqrt(2 / order) + 1e-15, order


def test_which_sizes_are_hadamard_matrices():
    flat = [
        n
        for n in range(4, 513, 4)
        if all(len(f) % 4 == 0 or len(f) == 2 for f in rotation.factors(n))
    ]
    assert sorted(set(range(4, 513, 4)) - set(flat)) == NO_HADAMARD
    for n in (2, 12, 20, 28, 36, 240, 512):
        np.testing.assert_allclose(np.abs(matrix(n)), n**-0.5, rtol=1e-12)


@pytest.mark.parametrize("n", [1, 3, 24, 40, 52, 128])
@pytest.mark.parametrize("seed", [None, 3])
def test_an_axis_is_turned_by_the_product_of_the_factors(rng, n, seed):
    x = rng.standard_normal((2, n, 5)).astype(np.float32)
    q = matrix(n) if seed is None else np.diag(rotation.signs(n, seed)) @ matrix(n)
    np.testing.assert_allclose(q @ q.T, np.eye(n), atol=1e-13)
    expected = np.einsum("anb,nm->amb", x.astype(np.float64), q)
    found = rotation.turned(jnp.asarray(x), 1, seed)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(rotation.turned_back(found, 1, seed), x, atol=1e-5)


def test_products_stay(rng):
    x, w = rng.standard_normal((6, 96)), rng.standard_normal((96, 4))
    turned = (
        rotation.turned(jnp.asarray(a, jnp.float32), axis, 0) for a, axis in ((x, -1), (w, 0))
    )
    np.testing.assert_allclose(jnp.matmul(*turned, precision="highest"), x @ w, atol=1e-4)


@pytest.mark.parametrize("n", [64, 28, 43])
def test_one_large_channel_is_spread_over_all(n):
    x = jnp.zeros(n).at[5].set(100.0)
    most = 100 * np.sqrt((1 if n != 43 else 2) / n)
    assert np.abs(rotation.turned(x, 0, 1)).max() <= most * (1 + 1e-6)


def test_the_result_is_rounded_once(rng):
    x = jnp.asarray(rng.standard_normal((3, 56)), jnp.bfloat16)
    found = rotation.turned(x, 1, 0)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        found, rotation.turned(x.astype(jnp.float32), 1, 0).astype(found.dtype)
    )


def test_signs_are_those_of_the_seed_everywhere():
    first = [-1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, 1]
    assert rotation.signs(12, 0).tolist() == first
    assert rotation.signs(12, 1).tolist() != first
    assert abs(rotation.signs(4096, 0).mean()) < 0.05


def test_it_traces(rng):
    x = jnp.asarray(rng.standard_normal((4, 24)), jnp.float32)
    vmapped = jax.vmap(lambda row: rotation.turned(row, 0))(x)
    np.testing.assert_allclose(vmapped, rotation.turned(x, 1), atol=1e-6)
