# SPDX-License-Identifier: Apache-2.0
"""The program in docs/low_precision_training.md runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.mark.one_version
def test_the_snippets(run_page):
    names = run_page("low_precision_training.md")
    assert names["paths"] == ("layers/0", "layers/2")
    assert names["of_few"] == ("up_proj",)
    fp8, half = np.split(np.asarray(names["losses"]), [4])
    assert (np.diff(fp8) < 0).all() and (np.diff(half) < 0).all()
    assert int(names["skipped"][...]) == 0
    assert names["weights"]["w"].dtype == jnp.bfloat16
    # Of the whole batch, by hand: the mean of the devices' means.
    expected = jax.grad(lambda w: jnp.mean((names["x"] @ w) ** 2))(jnp.ones((16, 4)))
    assert jax.device_count() > 1
    np.testing.assert_allclose(names["mean"], expected, atol=2**-3 * np.abs(expected).max())
