# SPDX-License-Identifier: Apache-2.0
"""Codes of keys and values against plain loops over their groups."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import kv_cache

DYNAMIC = {"kv-int8": (8, None), "kv-int4": (4, 64)}


def by_groups(x: np.ndarray, bits: int, group: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Numbers that are left, and the scale of each of them."""
    low, rows = -(2 ** (bits - 1)), x.reshape(-1, x.shape[-1])
    left, scales = np.zeros_like(rows), np.zeros_like(rows)
    for row, out, scale_of in zip(rows, left, scales, strict=True):
        for start in range(0, len(row), group or len(row)):
            part = slice(start, start + (group or len(row)))
            most, least = row[part].max(), row[part].min()
            largest = most if most > -least else least
            scale = np.float32(largest) / np.float32(low) if largest else np.float32(1)
            out[part] = np.clip(np.rint(row[part] / scale), low, -low - 1) * scale
            scale_of[part] = scale
    return left.reshape(x.shape), scales.reshape(x.shape)


@pytest.mark.parametrize("name", DYNAMIC)
@pytest.mark.parametrize("size", [2, 8, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_codes_are_those_of_a_loop(name, size, dtype, rng):
    x = jnp.asarray(rng.standard_normal((3, 5, size)) * 3, dtype)
    expected, scale = by_groups(np.asarray(x, np.float32), *DYNAMIC[name])
    how = kv_cache.scheme(name)
    kept = kv_cache.encoded(
        x, how
    )  # compiled, XLA multiplies by 1 / scale, and ties fall otherwise
    found = kv_cache.decoded(kept, how, size, jnp.float32)
    # XLA multiplies by 1 / scale: what lies in the middle may fall to the other side.
    position = np.asarray(x, np.float32) / scale
    clear = np.abs(position - np.floor(position) - 0.5) > 1e-4
    np.testing.assert_allclose(found[clear], expected[clear], rtol=1e-6)
    assert clear.mean() > 0.9
    # Half a step, and a whole one at the end that has one code less.
    error = np.abs(np.asarray(found) - np.asarray(x, np.float32))
    assert (error <= np.abs(scale) * (1 + 1e-5)).all()
    assert (error <= np.abs(scale) / 2 * (1 + 1e-5)).mean() > 0.95
    np.testing.assert_allclose(
        kv_cache.rounded(x, how), found.astype(dtype), atol=np.abs(scale).max()
    )


@pytest.mark.parametrize("name", kv_cache.DYNAMIC)
def test_the_largest_of_a_group_is_kept_whatever_its_sign(name):
    x = jnp.array([[0.5, -3.0, 1.0, 0.25], [0.5, 3.0, -1.0, 0.25]])
    left = np.asarray(kv_cache.rounded(x, kv_cache.scheme(name)))
    np.testing.assert_allclose(left[:, 1], x[:, 1], rtol=1e-6)
    np.testing.assert_array_equal(left[0, 1], -left[1, 1])


@pytest.mark.parametrize("name", kv_cache.DYNAMIC)
def test_zeros_and_what_is_not_finite(name):
    x = jnp.ones((4, 8)).at[0].set(0).at[1, 3].set(jnp.nan).at[2, 3].set(jnp.inf)
    left = np.asarray(kv_cache.rounded(x, kv_cache.scheme(name)))
    assert (left[0] == 0).all() and np.isnan(left[1]).all()
    assert not np.isfinite(left[2]).all()
    np.testing.assert_allclose(left[3], 1, rtol=1e-6)


@pytest.mark.parametrize("name", kv_cache.DYNAMIC)
def test_a_gradient_of_one(name, rng):
    x = jnp.asarray(rng.standard_normal((3, 8)), jnp.float32)
    how = kv_cache.scheme(name)
    slope = jax.grad(lambda x: kv_cache.rounded(x, how).sum())(x)
    np.testing.assert_array_equal(slope, jnp.ones_like(x))


@pytest.mark.parametrize("size", [8, 80, 96, 128])
def test_products_of_turned_heads_are_those_of_heads(size, rng):
    q, k = (jnp.asarray(rng.standard_normal((3, 5, size)), jnp.float32) for _ in range(2))
    exact = np.einsum("abh,ach->abc", *(np.asarray(a, np.float64) for a in (q, k)))
    found = jnp.einsum("abh,ach->abc", kv_cache.turned(q), kv_cache.turned(k), precision="highest")
    np.testing.assert_allclose(found, exact, atol=1e-4)
    np.testing.assert_allclose(kv_cache.turned_back(kv_cache.turned(q)), q, atol=1e-5)


def test_channels_that_are_an_order_larger_hardly_matter_where_heads_are_turned(rng):
    """Queries are as much smaller: nothing changes but what 4 bits have to hold."""
    large = np.ones(128, np.float32)
    large[[5, 69]] = 30.0  # a pair that the rotation by position turns
    q, k = (jnp.asarray(rng.standard_normal((32, 128)), jnp.float32) for _ in range(2))
    q, k, how = q / large, k * large, kv_cache.scheme("kv-int4")
    scores = functools.partial(jnp.einsum, "ah,bh->ab", precision="highest")
    exact = scores(q, k)
    plain = jnp.linalg.norm(scores(q, kv_cache.rounded(k, how)) - exact)
    turned = scores(kv_cache.turned(q), kv_cache.rounded(kv_cache.turned(k), how))
    assert jnp.linalg.norm(turned - exact) < 0.5 * plain
