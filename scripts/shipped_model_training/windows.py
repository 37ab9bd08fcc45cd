# SPDX-License-Identifier: Apache-2.0
"""Training windows as a pure function of the seed and the step.

Nothing is shuffled or remembered: an interrupted run that starts again at step s draws the very
windows that it would have drawn.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, UInt16


def training_windows(
    tokens: UInt16[Array, " n"],
    seed: int | Int[Array, ""],
    step: Int[Array, ""],
    batch_size: int,
    length: int,
) -> Int[Array, "B length"]:
    """Draw windows that start anywhere in the text, with equal chances, and may cross documents.

    Args:
        tokens: the whole training text.
        seed: of the run.
        step: number of the optimizer step.
        batch_size: number of windows, B.
        length: tokens of a window; all but the first are predicted.

    Example:
        >>> tokens = jnp.arange(100, dtype=jnp.uint16)
        >>> windows = training_windows(tokens, 0, jnp.int32(7), batch_size=2, length=4)
        >>> bool((windows[:, 1:] - windows[:, :-1] == 1).all())
        True
    """
    key = jax.random.fold_in(jax.random.key(seed), step)
    starts = jax.random.randint(key, (batch_size, 1), 0, tokens.shape[0] - length + 1)
    return tokens[starts + jnp.arange(length)].astype(jnp.int32)
