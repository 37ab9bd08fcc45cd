# SPDX-License-Identifier: Apache-2.0
"""The kernel of a block of GPTQ against its definition, and against the paper's loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import device
from pallas_kernels.gptq_block import at_their_turn, at_their_turn_reference


def case(b: int, n: int, bits: int, asymmetric: bool, seed: int = 0):
    """Weights, a factor of some inverse Hessian, and grids that some weights lie beyond."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((b, n)).astype(np.float32)
    x = rng.standard_normal((4 * b, b)) @ (np.eye(b) + 0.3 * rng.standard_normal((b, b)))
    upper = np.linalg.cholesky(np.linalg.inv(x.T @ x)).T.astype(np.float32)
    upper += np.tril(np.full((b, b), np.nan, np.float32), -1)  # not looked at
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    step = rng.uniform(1.5, 2.5, (b, n)).astype(np.float32) / high
    zero = rng.integers(low, high, (b, n)) if asymmetric else np.zeros((b, n))
    return (rows, upper, step, zero.astype(np.float32)), {"low": float(low), "high": float(high)}


def loop(rows, upper, step, zero, *, low, high):
    """Of one column after the other, in float64."""
    rows = np.float64(rows)
    for i in range(len(rows)):
        codes = np.clip(np.rint(rows[i] / step[i] + zero[i]), low, high)
        error = (rows[i] - (codes - zero[i]) * step[i]) / upper[i, i]
        for j in range(i + 1, len(rows)):
            rows[j] -= upper[i, j] * error
    return rows


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("b", "n"), [(16, 1), (32, 33), (64, 32), (128, 70)])
def test_definition_and_program_are_the_loop(b, n, bits, asymmetric):
    arrays, ends = case(b, n, bits, asymmetric)
    expected = loop(*arrays, **ends)
    defined = np.asarray(at_their_turn_reference(*map(jnp.asarray, arrays), **ends))
    run = np.asarray(at_their_turn(*map(jnp.asarray, arrays), **ends, interpret=True))
    # A weight at a tie may fall to either side, and its column goes on from there.
    for found in (defined, run):
        close = np.isclose(found, expected, rtol=1e-4, atol=1e-4).all(axis=0)
        assert np.isfinite(found).all() and close.mean() >= (1 if n < 10 else 0.95)


def test_bad_input():
    arrays, ends = case(24, 8, 4, False)
    with pytest.raises(ValueError, match="24 inputs of a block; the kernel takes a multiple of 16"):
        at_their_turn(*map(jnp.asarray, arrays), **ends)


@pytest.mark.gpu
@pytest.mark.skipif(not device.is_hopper(), reason="needs a Hopper GPU")
@pytest.mark.parametrize(("b", "n"), [(128, 4096), (128, 14336), (32, 1000), (128, 1), (16, 37)])
@pytest.mark.parametrize(("bits", "asymmetric"), [(4, False), (3, True), (8, False)])
def test_on_a_gpu(b, n, bits, asymmetric):
    arrays, ends = case(b, n, bits, asymmetric, seed=b + n)
    arrays = list(map(jnp.asarray, arrays))
    run = jax.jit(lambda *a: at_their_turn(*a, **ends))
    found = np.asarray(run(*arrays))
    np.testing.assert_array_equal(found, run(*arrays))
    expected = np.asarray(at_their_turn_reference(*arrays, **ends))
    close = np.isclose(found, expected, rtol=1e-4, atol=1e-4).all(axis=0)
    assert np.isfinite(found).all() and close.mean() >= (1 if n < 10 else 0.95)
