# SPDX-License-Identifier: Apache-2.0
"""The largest magnitudes of a tensor in its last steps, as one array that survives being summed.

    history = [amax_1, amax_2, ..., amax_window, count]        newest first
    reach(history) = max(amax_1, amax_2 / count, ..., amax_window / count)

Reverse differentiation is the one way out of a backward pass, so the next history is handed out as the
*cotangent* of this one (as flax's FP8 ops do it). JAX adds cotangents up where a layer is used several
times in a step, and a user averages those of micro-batches: then older entries would grow, or shrink, in
every step. The last entry is 1 in each cotangent. Whatever weighted sum is taken, it says by what older
entries are to be divided; the newest becomes the sum of all uses' amaxes, which is not less than any.

A history of zeros is empty, and so is one whose layer was not used: the cotangent is zeros then.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def empty(window: int, leading: tuple[int, ...] = ()) -> Float[Array, "*leading slots"]:
    """A history of so many steps in which nothing was seen yet.

    Args:
      window: steps, at least 1.
      leading: shape of a stack of histories.

    Raises:
      ValueError: the window is shorter.
    """
    if window < 1:
        raise ValueError(f"an amax history covers at least one step, got {window=}")
    return jnp.zeros((*leading, window + 1), jnp.float32)


def reach(history: Float[Array, " slots"]) -> Float[Array, ""]:
    """The largest magnitude of the window; 0 of an empty history.

    >>> float(reach(jnp.array([2.0, 6.0, 8.0, 2.0])))  # summed over two uses
    4.0
    """
    return jnp.max(_entries(history))


def pushed(history: Float[Array, " slots"], amax: Float[Array, ""]) -> Float[Array, " slots"]:
    """The history one step later.

    >>> pushed(jnp.array([2.0, 6.0, 8.0, 2.0]), jnp.float32(5)).tolist()
    [5.0, 2.0, 3.0, 1.0]
    """
    return jnp.concatenate([amax[None], _entries(history)[:-1], jnp.ones(1)])


def was_used(cotangent: Float[Array, "*leading slots"]) -> Bool[Array, "*leading"]:
    """Whether the layer of a history took part in the step that this is the cotangent of."""
    return cotangent[..., -1] > 0


def _entries(history: Float[Array, " slots"]) -> Float[Array, " window"]:
    count = jnp.where(was_used(history), history[-1], 1.0)
    return jnp.concatenate([history[:1], history[1:-1] / count])
