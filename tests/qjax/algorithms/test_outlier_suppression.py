# SPDX-License-Identifier: Apache-2.0
"""The scales of Outlier Suppression+ against the paper's formula in a plain loop."""

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.algorithms import outlier_suppression
from qjax.algorithms.outlier_suppression import STANDS_OUT, STEPS


@pytest.mark.parametrize("channels", [5, 64, 129])
@pytest.mark.parametrize("outliers", [1, 2])
def test_the_scales_are_those_of_the_formula(rng, channels, outliers):
    x = rng.uniform(0.5, 2, channels)
    x[rng.choice(channels, outliers, replace=False)] *= rng.uniform(20, 90, outliers)
    tried = np.asarray(outlier_suppression.scales(jnp.asarray(x, jnp.float32)))
    largest, median = x.max(), np.median(x)
    for step in range(1, STEPS + 1):
        t = largest * (median / largest) ** (step / STEPS)
        expected = [max(1.0, x[j] / t) if x[j] > 6 * median else 1.0 for j in range(channels)]
        np.testing.assert_allclose(tried[step - 1], expected, rtol=1e-4)


def test_nothing_is_tried_where_no_channel_stands_out():
    x = jnp.ones(9).at[4].set(STANDS_OUT)
    assert (outlier_suppression.scales(x) == 1).all()
    assert not (outlier_suppression.scales(x.at[4].multiply(1.01)) == 1).all()


@pytest.mark.parametrize("x", [[0.0, 0.0, 0.0, 7.0], [0.0, 0.0], [3.0]])
def test_channels_that_are_mostly_zero_have_no_median_to_stand_out_of(x):
    assert (outlier_suppression.scales(jnp.array(x)) == 1).all()
