# SPDX-License-Identifier: Apache-2.0
"""Splitting what a product sums over: a few inputs in one part, all others in the other.

    x w  =  rest(x) rest(w)  +  held(x) held(w)

``held`` has the chosen inputs and nothing else, ``rest`` has zeros where they were, so that it keeps the
shape that kernels and scales were made for. Inputs are numbered over all axes that are summed over,
flattened in the order given.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped


def split(
    x: Shaped[Array, "..."], columns: Int[Array, " c"], axes: tuple[int, ...]
) -> tuple[Shaped[Array, "..."], Shaped[Array, "c ..."]]:
    """Takes some inputs out of activations, or out of a weight.

    Args:
      x: either operand of a product.
      columns: numbers of the inputs, each once.
      axes: of ``x`` that the product sums over.

    Returns:
      ``x`` with zeros at those inputs; and the inputs, in front of all axes that are not summed over.

    Example:
      >>> rest, held = split(jnp.array([[1, 2, 3]]), jnp.array([1]), (-1,))
      >>> rest.tolist(), held.tolist()
      ([[1, 0, 3]], [[2]])
    """
    where = _places(x, columns, axes)
    lengths = tuple(x.shape[a] for a in axes)
    chosen = jnp.zeros(lengths + (1,) * (x.ndim - len(axes)), bool).at[where].set(True)
    # A mask, not a scatter into x: XLA joins it with the rounding that follows.
    rest = jnp.where(jnp.moveaxis(chosen, range(len(axes)), axes), jnp.zeros((), x.dtype), x)
    return rest, jnp.moveaxis(x, axes, range(len(axes)))[where]


def joined(
    rest: Shaped[Array, "..."],
    columns: Int[Array, " c"],
    held: Shaped[Array, "c ..."],
    axes: tuple[int, ...],
) -> Shaped[Array, "..."]:
    """The inverse of :func:`split`.

    Args:
      rest: the array without those inputs, whatever stands there.
      columns: their numbers.
      held: the inputs; rounded to the dtype of ``rest``.
      axes: of ``rest`` that a product sums over.
    """
    front = jnp.moveaxis(rest, axes, range(len(axes)))
    front = front.at[_places(rest, columns, axes)].set(held.astype(rest.dtype))
    return jnp.moveaxis(front, range(len(axes)), axes)


def check(
    shape: tuple[int, ...],
    columns: Shaped[Array, "..."],
    held: Shaped[Array, "..."],
    axes: tuple[int, ...],
) -> None:
    """Checks that inputs read from somewhere belong to an array: values are looked at, not under jit.

    Args:
      shape: of the array.
      columns: numbers of the inputs.
      held: the inputs.
      axes: of the array that a product sums over.

    Raises:
      ValueError: numbers that are not ascending or go beyond the axes, or inputs of other shapes.
    """
    summed = {a % len(shape) for a in axes}
    inputs = math.prod(shape[a] for a in axes)
    free = tuple(n for i, n in enumerate(shape) if i not in summed)
    if held.shape != (*columns.shape, *free) or columns.ndim != 1:
        raise ValueError(
            f"outliers have shapes {columns.shape} and {held.shape}; an array {shape} that is summed "
            f"over {axes} needs [columns] and [columns, {', '.join(map(str, free))}]"
        )
    numbers = np.asarray(columns).tolist()
    if columns.dtype != jnp.int32 or numbers != sorted({n for n in numbers if 0 <= n < inputs}):
        raise ValueError(
            f"columns of outliers must be int32, ascending and below {inputs}, got {columns.dtype} "
            f"{numbers[:8]}"
        )


def _places(
    x: Shaped[Array, "..."], columns: Int[Array, " c"], axes: tuple[int, ...]
) -> tuple[Int[Array, " c"], ...]:
    """The index along each axis."""
    lengths = [x.shape[a] for a in axes]
    return tuple(
        columns // math.prod(lengths[i + 1 :]) % length for i, length in enumerate(lengths)
    )
