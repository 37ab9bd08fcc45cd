# SPDX-License-Identifier: Apache-2.0
"""Codes whose inputs stand in an order of their own, so that any inputs can share a scale.

    w[order[i]]  ~  (codes[i] - zero[i // size]) * scale[i // size],        x w  =  x[order] near

where ``near`` is what the codes stand for, place by place. A group is a run of the codes, as everywhere;
which inputs are in it, the order says. Other libraries keep codes in the order of the inputs and, as
``g_idx``, the group of each: ``g_idx[order[i]] = i // size``.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped


def gathered(x: Shaped[Array, "..."], order: Int[Array, " k"], axis: int) -> Shaped[Array, "..."]:
    """Takes inputs into the order of the codes.

    Args:
      x: either operand of a product.
      order: the input at each place.
      axis: of ``x`` that the product sums over.

    >>> gathered(jnp.array([[1, 2, 3]]), jnp.array([2, 0, 1]), -1).tolist()
    [[3, 1, 2]]
    """
    return jnp.take(x, order, axis=axis, unique_indices=True)


def put_back(
    rows: Shaped[Array, "..."], order: Int[Array, " k"], axis: int
) -> Shaped[Array, "..."]:
    """The inverse of :func:`gathered`.

    Args:
      rows: what stands at each place.
      order: the input at each place.
      axis: of ``rows`` that is in the order.

    >>> put_back(jnp.array([[3, 1, 2]]), jnp.array([2, 0, 1]), -1).tolist()
    [[1, 2, 3]]
    """
    return gathered(rows, jnp.argsort(order), axis)


def of_groups(groups: Int[np.ndarray, " k"], size: int) -> Int[np.ndarray, " k"]:
    """The order in which the inputs of a group follow each other, and otherwise stay as they are.

    Args:
      groups: the group of each input, ``g_idx``; values are looked at, not under jit.
      size: inputs of a group.

    Raises:
      ValueError: groups are missing or of other sizes; the last alone may be smaller.

    Example:
      >>> of_groups(np.array([1, 0, 1, 0, 2]), 2).tolist()
      [1, 3, 0, 2, 4]
    """
    order = np.argsort(groups, kind="stable").astype(np.int32)
    expected = np.arange(len(groups)) // size
    if not np.array_equal(groups[order], expected):
        numbers, counts = np.unique(groups, return_counts=True)
        wrong = (
            f"{len(numbers)} numbers from {numbers[0]} to {numbers[-1]}, of {counts.min()} to "
            f"{counts.max()} inputs"
        )
        raise ValueError(
            f"groups of {size} inputs must be numbered 0 to {expected[-1]}, the last alone may be "
            f"smaller; there are {wrong}"
        )
    return order


def check(order: Shaped[Array, "..."], shape: tuple[int, ...]) -> None:
    """Checks that an order read from somewhere is one: values are looked at, not under jit.

    Args:
      order: the input at each place, of each of stacked weights.
      shape: that it must have.

    Raises:
      ValueError: another shape or dtype, or not every input once.
    """
    numbers = np.asarray(order)
    fits = numbers.dtype == np.int32 and numbers.shape == shape
    if not fits or not (np.sort(numbers, axis=-1) == np.arange(shape[-1])).all():
        raise ValueError(
            f"the order of inputs must be int32 {list(shape)} with each number below {shape[-1]} once; "
            f"it is {numbers.dtype} {list(numbers.shape)}"
        )


def check_axes(axes: tuple[int, ...]) -> None:
    """Checks that there is one axis whose inputs can have an order.

    Raises:
      ValueError: there are several.
    """
    if len(axes) != 1:
        raise ValueError(
            f"inputs can have an order of their own along one axis, this product sums over {axes}"
        )
