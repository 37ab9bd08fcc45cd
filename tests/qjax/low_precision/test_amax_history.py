# SPDX-License-Identifier: Apache-2.0
"""A history is what it would be in plain Python, however often its layer was used in a step."""

import jax.numpy as jnp
import pytest

from qjax.low_precision import amax_history


@pytest.mark.parametrize("window", [1, 2, 5])
@pytest.mark.parametrize("uses", [1, 3])
def test_it_forgets_after_the_window(rng, window, uses):
    """Summed over the uses of a step, as JAX sums cotangents."""
    history, amaxes = amax_history.empty(window), []
    assert float(amax_history.reach(history)) == 0
    for _ in range(12):
        seen = rng.uniform(0.1, 10, uses).astype("float32")
        history = sum(amax_history.pushed(history, jnp.asarray(a)) for a in seen)
        amaxes.append(float(seen.sum()))
        assert float(amax_history.reach(history)) == pytest.approx(max(amaxes[-window:]), rel=1e-5)


def test_a_mean_over_micro_batches_scales_no_older_entry():
    history = amax_history.pushed(amax_history.empty(4), jnp.float32(8))
    for _ in range(3):
        history = (amax_history.pushed(history, jnp.float32(1)) * 2) / 4  # a mean of two of four
    assert float(amax_history.reach(history)) == 8


def test_zeros_are_empty():
    assert not amax_history.was_used(amax_history.empty(3))
    assert amax_history.was_used(amax_history.pushed(amax_history.empty(3), jnp.float32(0)))


def test_stacks():
    assert amax_history.empty(3, (2, 5)).shape == (2, 5, 4)


def test_a_window_of_nothing():
    with pytest.raises(ValueError, match="at least one step, got window=0"):
        amax_history.empty(0)
