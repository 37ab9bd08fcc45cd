# SPDX-License-Identifier: Apache-2.0
"""SmoothQuant's scale against equation 4 of the paper in numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.algorithms import smoothquant


@pytest.mark.parametrize("strength", [0, 0.5, 0.8, 1])
@pytest.mark.parametrize("channels", [1, 2, 7, 64])
def test_the_scale_is_that_of_equation_4(rng, strength, channels):
    x, w = rng.uniform(0.01, 90, channels), rng.uniform(0.01, 1, channels)
    expected = [x[j] ** strength / w[j] ** (1 - strength) for j in range(channels)]
    scale = smoothquant.scale(jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32), strength)
    np.testing.assert_allclose(scale, expected, rtol=1e-5)


def test_half_the_strength_makes_activations_and_weights_equally_large(rng):
    x, w = rng.uniform(0.01, 90, 32), rng.uniform(0.01, 1, 32)
    scale = smoothquant.scale(jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32), 0.5)
    np.testing.assert_allclose(x / scale, w * scale, rtol=1e-5)


def test_channels_that_are_zero_keep_their_size():
    scale = smoothquant.scale(jnp.array([0.0, 4.0, 4.0]), jnp.array([1.0, 0.0, 1.0]), 0.5)
    assert scale.tolist() == [1, 1, 2]


@pytest.mark.parametrize("strength", [-0.1, 1.1])
def test_a_strength_that_there_is_not(strength):
    with pytest.raises(ValueError, match=r"SmoothQuant's strength lies in \[0, 1\], got"):
        smoothquant.Options(strength=strength)
