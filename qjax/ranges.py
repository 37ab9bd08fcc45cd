# SPDX-License-Identifier: Apache-2.0
"""From a range of values to the scale and zero that a tile is stored with.

A range is a pair (low, high) a tile that its codes shall reach. Absmax takes the true extremes; the
percentile cuts outliers off; two searches shrink the extremes step by step and keep what rounds with
the least error: of the weights themselves (mse), or of what they are multiplied to (output), which takes
the Hessian of the layer's input.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

from qjax import formats, tiles
from qjax.formats import Format
from qjax.scheme import WeightScheme


@dataclass(frozen=True, kw_only=True)
class RangeSearch:
    """How the range of a tile is chosen.

    Attributes:
      method: see the module's docstring.
      percentile: percent of a tile's magnitudes inside the range; percentile method only.
      steps: candidates of a search, from the full range down.
      max_shrink: share of the range that the last candidate gives up.
      norm: exponent of the error of weights. The defaults of the search are those of the GPTQ code
        (Frantar et al., 2023): 80 candidates, a hundredth apart, and 2.4.
    """

    method: Literal["absmax", "percentile", "mse", "output"] = "absmax"
    percentile: float = 99.9
    steps: int = 80
    max_shrink: float = 0.8
    norm: float = 2.4

    def __post_init__(self):  # noqa: D105
        if self.method not in ("absmax", "percentile", "mse", "output"):
            raise ValueError(
                f"a range is found by absmax, percentile, mse or output, got {self.method!r}"
            )
        if not 0 < self.percentile <= 100:
            raise ValueError(f"a percentile lies in (0, 100], got {self.percentile=}")
        if self.steps < 1 or not 0 <= self.max_shrink < 1:
            raise ValueError(
                f"need steps >= 1 and max_shrink in [0, 1), got {self.steps=} {self.max_shrink=}"
            )
        if self.norm <= 0:
            raise ValueError(f"an error norm is positive, got {self.norm=}")


class Grid(NamedTuple):
    """Where the codes of each tile lie: ``w ~ (codes - zero) * scale * tensor_scale``."""

    scale: Any
    zero: Any
    tensor_scale: Any

    @property
    def step(self) -> Float[Array, "..."]:
        """The float32 factor of a tile."""
        step = self.scale.astype(jnp.float32)
        return step if self.tensor_scale is None else step * self.tensor_scale


def find_grid(
    w: Float[Array, "..."],
    scheme: WeightScheme,
    tile: tuple[int, ...],
    search: RangeSearch,
    hessian: Float[Array, "k k"] | None = None,
    dtype: Any = None,
    arithmetic: Any = jnp.float32,
) -> Grid:
    """Chooses the scale and zero of each tile.

    Args:
      w: the weight; infinities do not count towards a range, they saturate.
      scheme: format, symmetry and how scales are stored.
      tile: tile length for each axis.
      search: how the range is chosen.
      hessian: of the inputs of a ``[k, n]`` weight with tiles of inputs, for the output search; without
        it, and for other tiles, every input counts alike.
      dtype: of float scales; None: the weight's.
      arithmetic: what each step to an asymmetric scale and zero is rounded to; compressed-tensors takes
        the weight's dtype.

    Returns:
      One entry a tile.
    """
    low, high = _extremes(w, scheme, tile, search)
    tensor_scale = _tensor_scale(low, high, scheme)

    def shrunk(shrink):
        ends = low * shrink, high * shrink
        return _grid(*ends, scheme, dtype or w.dtype, tensor_scale, arithmetic)

    if search.method == "mse":
        return shrunk(
            _least_error(w, scheme.format, tile, search, shrunk, _power(tile, search.norm))
        )
    if search.method == "output":
        cost = _power(tile, 2.0)
        if hessian is not None and w.ndim == 2 and tile[1] == 1:
            cost = _of_products(hessian, tile)
        return shrunk(_least_error(w, scheme.format, tile, search, shrunk, cost))
    return shrunk(1.0)


def encode(
    w: Float[Array, "..."], grid: Grid, fmt: Format, tile: tuple[int, ...]
) -> Shaped[Array, "..."]:
    """Plain codes of an array on a grid: ``round(w / step + zero)``, saturated."""
    position = w.astype(jnp.float32) / tiles.spread(grid.step, tile, w.shape)
    if grid.zero is not None:
        position = position + tiles.spread(grid.zero, tile, w.shape).astype(jnp.float32)
    return formats.encode(position, fmt)


def symmetric_scale(
    absmax: Float[Array, "..."],
    fmt: Format,
    scale_format: str,
    dtype: Any = jnp.float32,
    *,
    divisor: float | None = None,
) -> Shaped[Array, "..."]:
    """The scale, as stored, under which ``absmax`` meets the end of the format's range.

    A tile of zeros gets scale one; one whose scale would round to zero, the least that there is.

    Args:
      absmax: largest magnitude of each tile.
      fmt: format of the codes.
      scale_format: ``"float"`` stores in ``dtype``; ``"e8m0"`` as a power of two; ``"e4m3"`` as such.
      dtype: of float scales.
      divisor: what ``absmax`` is divided by; ``fmt.symmetric_divisor`` if None.
    """
    if scale_format == "e8m0":
        return _power_of_two(absmax, fmt)
    scale = _divided(absmax, fmt.symmetric_divisor if divisor is None else divisor)
    if scale_format == "e4m3":
        scale = jnp.minimum(scale, formats.E4M3.high)
    return _never_zero(scale, jnp.float8_e4m3fn if scale_format == "e4m3" else dtype, absmax)


def _divided(reach: Float[Array, "..."], steps: float) -> Float[Array, "..."]:
    """``reach / steps``, rounded once.

    XLA multiplies by the reciprocal of a divisor that it knows to be constant, which may give the next
    float; the weight at the end of a range then falls to another side of its tie than in every other
    library. It does not know that no range is negative.
    """
    return reach / jnp.where(reach >= 0, jnp.float32(steps), jnp.nan)


def _never_zero(scale: Float[Array, "..."], dtype: Any, reach: Float[Array, "..."]) -> Any:
    """The scale rounded to ``dtype``; where that is zero, one for a tile without reach."""
    stored, info = formats.nearest(scale, dtype).astype(dtype), jnp.finfo(dtype)
    # float32 arithmetic flushes its own subnormals, and bfloat16's, to zero.
    least = max(float(info.smallest_subnormal), float(jnp.finfo(jnp.float32).tiny))
    instead = jnp.where(reach == 0, 1.0, least).astype(dtype)
    return jnp.where(stored.astype(jnp.float32) < least, instead, stored)


def _tensor_scale(
    low: Float[Array, "..."], high: Float[Array, "..."], scheme: WeightScheme
) -> Float[Array, ""] | None:
    """Puts the largest tile's scale at the top of e4m3 (NVFP4: 448 * 6); None without e4m3 scales."""
    if scheme.scale_format != "e4m3":
        return None
    absmax = jnp.max(jnp.maximum(-low, high))
    # Files hold the reciprocal. Itself taken as one, the scale comes back from there bit for bit.
    tensor_scale = 1 / ((scheme.format.symmetric_divisor * formats.E4M3.high) / absmax)
    return jnp.where(tensor_scale == 0, 1.0, tensor_scale)


def _grid(
    low: Float[Array, "..."],
    high: Float[Array, "..."],
    scheme: WeightScheme,
    dtype: Any,
    tensor_scale: Float[Array, ""] | None,
    arithmetic: Any,
) -> Grid:
    fmt = scheme.format
    if not scheme.symmetric:
        low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)  # zero itself must have a code
        reach = formats.nearest(high - low, arithmetic)
        scale = _never_zero(_divided(reach, fmt.high - fmt.low), dtype, reach)
        below = formats.nearest(low / scale.astype(jnp.float32), arithmetic)
        zero = jnp.round(formats.nearest(fmt.low - below, arithmetic))
        return Grid(scale, jnp.clip(zero, fmt.low, fmt.high).astype(jnp.int8), None)
    absmax = jnp.maximum(-low, high)
    if tensor_scale is not None:
        absmax = absmax / tensor_scale
    return Grid(symmetric_scale(absmax, fmt, scheme.scale_format, dtype), None, tensor_scale)


def _power_of_two(absmax: Float[Array, "..."], fmt: Format) -> Shaped[Array, "..."]:
    """OCP microscaling: ``2 ** (floor(log2(absmax)) - emax)``, one more where saturation would cost.

    ``emax`` is the exponent of the format's largest value. Between that value and the power of two
    above it, saturating is the nearest rounding up to the midpoint; beyond, the next scale is better.
    """
    top_exponent = jnp.floor(jnp.log2(fmt.high))
    midpoint = (fmt.high + 2.0 ** (top_exponent + 1)) / 2
    mantissa, exponent = jnp.frexp(absmax)  # absmax = mantissa * 2**exponent, mantissa in [0.5, 1)
    exponent = exponent - 1 + (mantissa * 2.0 ** (top_exponent + 1) > midpoint)
    # e8m0 holds 2**-127 too, but float32 arithmetic flushes that to zero.
    exponent = jnp.clip(exponent - top_exponent, -126, 127)
    scale = jnp.where(absmax == 0, 1.0, jnp.ldexp(jnp.float32(1), exponent.astype(jnp.int32)))
    scale = jnp.where(jnp.isnan(absmax), absmax, scale)
    return scale.astype(jnp.float8_e8m0fnu)


def _extremes(
    w: Float[Array, "..."], scheme: WeightScheme, tile: tuple[int, ...], search: RangeSearch
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    finite = jnp.where(jnp.isfinite(w), w, 0).astype(jnp.float32)
    inner = tiles.inner_axes(tile)
    if search.method == "percentile":
        # Neither a ragged tile's filling nor infinities must count as small magnitudes.
        known = jnp.where(jnp.isfinite(w), finite, jnp.nan)
        split = tiles.split(known, tile, fill=jnp.nan)

        def percentile(values, percent):
            # Of nothing but infinities it is NaN.
            return jnp.nan_to_num(jnp.nanpercentile(values, percent, axis=inner))

        if scheme.symmetric:
            bound = percentile(jnp.abs(split), search.percentile)
            return -bound, bound
        tail = (100 - search.percentile) / 2
        return percentile(split, tail), percentile(split, 100 - tail)
    split = tiles.split(finite, tile)
    if scheme.symmetric:
        absmax = jnp.max(jnp.abs(split), axis=inner)
        return -absmax, absmax
    return jnp.min(split, axis=inner), jnp.max(split, axis=inner)


def _least_error(
    w: Float[Array, "..."],
    fmt: Format,
    tile: tuple[int, ...],
    search: RangeSearch,
    shrunk: Callable[[Any], Grid],
    cost: Callable[[Any], Float[Array, "..."]],
) -> Float[Array, "..."]:
    """How far to shrink each tile's range for the least cost of ``w - dequantized``, tile by tile."""

    def error(shrink):
        grid = shrunk(shrink)
        values = formats.decode(encode(w, grid, fmt, tile), fmt)
        if grid.zero is not None:
            values = values - tiles.spread(grid.zero, tile, w.shape).astype(jnp.float32)
        wrong = values * tiles.spread(grid.step, tile, w.shape) - w.astype(jnp.float32)
        return cost(jnp.where(jnp.isfinite(w), wrong, 0.0))

    def keep_better(i, best):
        best_error, best_shrink = best
        shrink = 1.0 - search.max_shrink * i / search.steps
        this = error(shrink)
        better = this < best_error
        return jnp.where(better, this, best_error), jnp.where(better, shrink, best_shrink)

    unshrunk = error(1.0)
    start = unshrunk, jnp.ones_like(unshrunk)
    return jax.lax.fori_loop(1, search.steps, keep_better, start)[1]


def _power(tile: tuple[int, ...], norm: float) -> Callable[[Any], Float[Array, "..."]]:
    """``sum |wrong|**norm`` of each tile."""
    return lambda wrong: jnp.sum(
        tiles.split(jnp.abs(wrong) ** norm, tile), axis=tiles.inner_axes(tile)
    )


def _of_products(
    hessian: Float[Array, "k k"], tile: tuple[int, ...]
) -> Callable[[Any], Float[Array, "..."]]:
    """``sum_t (x_t wrong)^2`` over calibration rows, of each tile of inputs as if it were alone."""
    size, k = tile[0], len(hessian)
    count = -(-k // size)
    padded = jnp.pad(hessian, ((0, count * size - k),) * 2)
    # The blocks on the diagonal: inputs of one tile with each other.
    blocks = jnp.stack(
        [lax.dynamic_slice(padded, (i * size, i * size), (size, size)) for i in range(count)]
    )

    def cost(wrong: Float[Array, "k n"]) -> Float[Array, "tiles n"]:
        split = tiles.split(wrong, tile)[:, :, :, 0]  # [tiles, size, n]
        moved = jnp.einsum("tab,tbn->tan", blocks, split, precision="highest")
        return jnp.sum(split * moved, axis=1)

    return cost
