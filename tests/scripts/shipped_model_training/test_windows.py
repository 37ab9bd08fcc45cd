# SPDX-License-Identifier: Apache-2.0
import jax.numpy as jnp

from shipped_model_training.windows import training_windows

TOKENS = jnp.arange(50, dtype=jnp.uint16)


def test_windows_are_a_function_of_seed_and_step() -> None:
    draw = lambda seed, step: training_windows(TOKENS, seed, jnp.int32(step), 8, 5)  # noqa: E731
    assert jnp.array_equal(draw(3, 9), draw(3, 9))
    assert not jnp.array_equal(draw(3, 9), draw(3, 10))
    assert not jnp.array_equal(draw(3, 9), draw(4, 9))


def test_windows_reach_both_ends_and_stay_inside() -> None:
    windows = training_windows(TOKENS, 0, jnp.int32(0), 2000, 5)
    assert windows.dtype == jnp.int32
    assert (jnp.diff(windows, axis=1) == 1).all()
    assert windows.min() == 0 and windows.max() == 49
