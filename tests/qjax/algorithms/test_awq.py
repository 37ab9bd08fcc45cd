# SPDX-License-Identifier: Apache-2.0
"""AWQ's scale against the formula in numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.algorithms import awq


@pytest.mark.parametrize("ratio", [awq.RATIOS[0], 0.5, awq.RATIOS[-1]])
@pytest.mark.parametrize("channels", [1, 2, 7, 64])
def test_the_scale_is_that_of_the_formula(rng, ratio, channels):
    x, w = rng.uniform(0.01, 9, channels), rng.uniform(0.01, 1, channels)
    expected = np.array(
        [max(x[j] ** ratio / (w[j] ** (1 - ratio) + 1e-4), 1e-4) for j in range(channels)]
    )
    expected /= np.sqrt(max(expected) * min(expected))
    scale = awq.scale(jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32), ratio)
    np.testing.assert_allclose(scale, expected, rtol=2e-5)
    assert np.max(scale) * np.min(scale) == pytest.approx(1, rel=1e-5)


def test_channels_without_activations_keep_a_positive_scale():
    scale = awq.scale(jnp.array([0.0, 1.0, 4.0]), jnp.ones(3), 0.5)
    assert np.all(np.isfinite(scale))
    assert np.all(np.asarray(scale) > 0)


@pytest.mark.parametrize("group_size", [4, 6, 8, 32, None])  # also some that do not divide 16
def test_magnitudes_are_relative_to_the_largest_of_their_group(rng, group_size):
    weights = [rng.standard_normal((16, n)) for n in (3, 5)]
    together = np.abs(np.concatenate(weights, axis=1))
    size = group_size or 16
    expected = np.zeros(16)
    for k in range(16):
        first = k // size * size
        expected[k] = np.mean(
            [together[k, n] / together[first : first + size, n].max() for n in range(8)]
        )
    found = awq.relative_magnitude([jnp.asarray(w, jnp.float32) for w in weights], group_size)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_group_of_zeros_has_no_magnitude():
    assert awq.relative_magnitude([jnp.zeros((4, 2))], 2).tolist() == [0, 0, 0, 0]
