# SPDX-License-Identifier: Apache-2.0
"""Rounding to nearest (RTN): each weight to the nearest value of its tile's grid, no data needed.

    codes = clip(round(w / scale + zero), low, high)

The baseline of every quantization paper, and the last step of most algorithms.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from qjax import ranges
from qjax.qtensor import QTensor
from qjax.ranges import RangeSearch
from qjax.scheme import Scheme, WeightScheme


def quantize(
    w: Float[Array, "..."],
    scheme: str | Scheme,
    *,
    axis: int | tuple[int, ...] | None = None,
    stacked: int = 0,
    search: RangeSearch = RangeSearch(),  # noqa: B008  frozen
    hessian: Float[Array, "k k"] | None = None,
    dtype: Any = None,
    name: str = "array",
) -> QTensor:
    """Quantizes an array by rounding to nearest.

    Args:
      w: the weight, any float dtype.
      scheme: how to hold it, or the scheme's name.
      axis: what a product sums over, and groups run along the last of; the last but one by default,
        as in a ``[in, out]`` kernel, and the only one of a vector.
      stacked: how many leading axes only stack weights, as those of scanned layers do: each weight
        gets the scales that it would get alone, and a scan takes them apart again.
      search: how the range of each tile is chosen.
      hessian: of the inputs that a ``[k, n]`` weight is multiplied with, for the output search.
      dtype: logical dtype of the result; None: the weight's. Weights that train in float32 find their
        codes unrounded.
      name: what errors call the array, such as its path in a model.

    Returns:
      The QTensor, scales in its dtype unless the scheme says otherwise.

    Raises:
      ValueError: NaN in ``w`` (checked where values are known, outside jit), a group size that does
        not divide the contraction axis, no axis left to divide, or an array that is empty or no
        floats.

    Example:
      >>> w = jax.random.normal(jax.random.key(0), (256, 64))
      >>> q = quantize(w, "w4a16-g128")
      >>> q.shape, q.nbytes, q.scale.shape
      ((256, 64), 8704, (2, 64))
    """
    parsed = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
    if w.size == 0 or not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(f"{name}: need floats to quantize, got {w.dtype} of shape {w.shape}")
    axes = contraction(w.ndim - stacked, axis, name)
    tile = tile_of(w.shape[stacked:], parsed.weights, axes, name)
    dtype = jnp.dtype(dtype or w.dtype)
    q, has_nan = _quantize(w, parsed, axes, tile, stacked, search, hessian, dtype=dtype)
    if not isinstance(has_nan, Tracer) and bool(has_nan):
        raise ValueError(f"{name}: NaN among the weights; a number is needed everywhere")
    return q


def tile_of(
    shape: tuple[int, ...], scheme: WeightScheme, axis: tuple[int, ...], name: str = "array"
) -> tuple[int, ...]:
    """The tile that a weight scheme means for an array.

    Args:
      shape: of the array.
      scheme: granularity and group size.
      axis: contraction axes, counted from the end.
      name: what errors call the array.

    Raises:
      ValueError: the group size does not divide the last contraction axis, or a block finds no
        second axis.

    >>> tile_of((256, 64), Scheme.parse("w4a16-g128").weights, (-2,))
    (128, 1)
    """
    ndim = len(shape)
    contracted = {a % ndim for a in axis}
    size = scheme.group_size
    match scheme.granularity:
        case "tensor":
            return shape
        case "channel":
            return tuple(n if i in contracted else 1 for i, n in enumerate(shape))
        case "group":
            assert size is not None  # WeightScheme checks
            length = shape[axis[-1]]
            if length % size:
                raise ValueError(
                    f"{name}: group size {size} does not divide {length}, the length that is "
                    f"summed over; {_divisors(length, size)} would"
                )
            return tuple(size if i == axis[-1] % ndim else 1 for i in range(ndim))
        case "block":
            assert size is not None
            free = [i for i in range(ndim) if i not in contracted]
            if not free:
                raise ValueError(f"{name}: blocks need two axes, got shape {shape}")
            sides = {axis[-1] % ndim, free[-1]}
            return tuple(size if i in sides else 1 for i in range(ndim))


def contraction(ndim: int, axis: int | tuple[int, ...] | None, name: str) -> tuple[int, ...]:
    """The contraction axes of an array, counted from the end; the last but one where none is said.

    Args:
      ndim: of the array.
      axis: one axis or several, counted from either end; None: the last but one, or the only one.
      name: what errors call the array.

    Raises:
      ValueError: the array has no such axes.
    """
    if ndim == 0:
        raise ValueError(f"{name}: a scalar cannot be quantized")
    if axis is None:
        axis = -2 if ndim > 1 else -1
    axes = (axis,) if isinstance(axis, int) else axis
    if not axes or any(not -ndim <= a < ndim for a in axes):
        raise ValueError(f"{name}: {axes=} are no axes of an array of {ndim} dimensions")
    return tuple(a if a < 0 else a - ndim for a in axes)


@functools.partial(
    jax.jit, static_argnames=("scheme", "axis", "tile", "stacked", "search", "dtype")
)
def _quantize(
    w: Float[Array, "..."],
    scheme: Scheme,
    axis: Any,
    tile: Any,
    stacked: int,
    search: RangeSearch,
    hessian: Float[Array, "k k"] | None,
    *,
    dtype: Any,
) -> tuple[QTensor, Bool[Array, ""]]:
    def one(w: Float[Array, "..."]) -> QTensor:
        grid = ranges.find_grid(w, scheme.weights, tile, search, hessian, dtype)
        return QTensor.from_codes(
            ranges.encode(w, grid, scheme.weights.format, tile),
            grid.scale,
            grid.zero,
            grid.tensor_scale,
            format=scheme.weights.format,
            axis=axis,
            tile=tile,
            dtype=dtype,
            activations=scheme.activations,
        )

    for _ in range(stacked):
        one = jax.vmap(one)
    return one(w), jnp.isnan(w).any()


def _divisors(length: int, size: int) -> str:
    """The nearest group sizes that would do, for an error message."""
    divisors = [d for d in range(2, length + 1) if length % d == 0]
    nearest = sorted(sorted(divisors, key=lambda d: abs(d - size))[:3])
    return " or ".join(map(str, nearest)) if nearest else "only one scale a channel (-channel)"
