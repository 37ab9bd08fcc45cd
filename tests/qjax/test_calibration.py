# SPDX-License-Identifier: Apache-2.0
"""What cannot be calibrated, or with what, in one line each. What comes of it: test_sequential.py."""

import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import qjax


@pytest.mark.parametrize("model", [lambda x: 2 * x, nn.Dense(4)])
def test_what_is_no_nnx_module(model):
    with pytest.raises(TypeError, match=r"nnx\.[mM]odule"):  # with types checked, too
        qjax.calibrate(model, [jnp.ones((2, 8))])


def test_no_batch():
    with pytest.raises(ValueError, match="calibration needs at least one batch"):
        qjax.calibrate(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), [])
