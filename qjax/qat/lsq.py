# SPDX-License-Identifier: Apache-2.0
"""LSQ and LSQ+: the step between codes, and the zero, are trained with the weights.

    v' = (q - z) * s,      q = clip(round(v / s + z), Q_low, Q_high)

                 inside: Q_low < v / s + z < Q_high      at an end of the range and beyond it
    dv'/dv       1                                        0
    dv'/ds       q - z - v / s                            q - z
    dv'/dz       0                                        -s

The first line of gradients takes rounding for the identity (straight through); the second row is what
LSQ adds: inside its range a weight draws its step to where it would be rounded less. ``s`` and ``z`` have
one entry a tile, and their gradients are sums over it. For floats and codebooks ``round`` is the nearest
value of the format.

=====================  ======================================================================
papers                 here
=====================  ======================================================================
v, s (LSQ)             ``v`` and ``grid.scale``
Q_N, Q_P               ``-format.low`` and ``format.high``
v-bar, v-hat           the codes, and what :func:`fake_quantize` returns
g = 1 / sqrt(N Q_P)    :func:`gradient_scale`, ``N`` the weights or activations of one step
beta (LSQ+)            ``-zero * scale``: a whole zero is what files and kernels hold, so the offset is
                       trained as one, rounded straight through
=====================  ======================================================================

References:
  Esser, McKinstry, Bablani, Appuswamy, Modha, Learned Step Size Quantization, ICLR 2020,
  https://arxiv.org/abs/1902.08153.
  Bhalgat, Lee, Nagel, Blankevoort, Kwak, LSQ+: Improving low-bit quantization through learnable offsets
  and better initialization, CVPR Workshops 2020, https://arxiv.org/abs/2004.09576.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax import formats, tiles
from qjax.formats import Format
from qjax.ranges import Grid
from qjax.straight_through import straight_through


class LearnedGrid(NamedTuple):
    """What is trained of a grid: its arrays are parameters like any other.

    Attributes:
      scale: float32, one entry a tile.
      zero: float32, one entry a tile; None when symmetric. It is rounded where it is used.
      tensor_scale: float32 scalar over e4m3 scales, not trained; else None.
    """

    scale: Any
    zero: Any = None
    tensor_scale: Any = None


def fake_quantize(
    v: Float[Array, "*shape"],
    grid: LearnedGrid,
    fmt: Format,
    tile: tuple[int, ...],
    *,
    dtype: Any = jnp.float32,
    gradient_scale: float = 1.0,
) -> Float[Array, "*shape"]:
    """Rounds an array to a grid, with the gradients of the table above.

    Args:
      v: weights, or activations.
      grid: its parameters. Where a step has shrunk to nothing or below, it is the least that there is.
      fmt: format of the codes.
      tile: tile length for each of the last axes; the whole shape for one step for all.
      dtype: of stored scales. Steps are rounded to it first, straight through, so that what is trained is
        what will be stored.
      gradient_scale: what the gradients of scale and zero are multiplied by (LSQ's ``g``).

    Returns:
      In the dtype of ``v``.

    Example:
      >>> grid = LearnedGrid(scale=jnp.array([0.5]))
      >>> fake_quantize(jnp.array([0.3, 9.0]), grid, formats.INT4, (2,)).tolist()
      [0.5, 3.5]
    """
    grid = LearnedGrid(
        _with_gradient(grid.scale, gradient_scale), _with_gradient(grid.zero, gradient_scale),
        grid.tensor_scale,
    )  # fmt: skip
    step, zero = in_use(grid, fmt, dtype)
    rounded: Array = _fake_quantize(v.astype(jnp.float32), step, zero, fmt, tile)
    return rounded.astype(v.dtype)


def stored(grid: LearnedGrid, fmt: Format, dtype: Any = jnp.float32) -> Grid:
    """The grid as it is stored: scales in their dtype, whole zeros.

    Args:
      grid: its parameters.
      fmt: format of the codes.
      dtype: of stored scales.
    """
    zero = None if grid.zero is None else _whole(grid.zero, fmt).astype(jnp.int8)
    return Grid(_rounded(grid.scale, dtype), zero, grid.tensor_scale)


def from_stored(grid: Grid) -> LearnedGrid:
    """The parameters under which training begins with a grid that another method found.

    Raises:
      ValueError: scales are powers of two, which no small step reaches.
    """
    if grid.scale.dtype == jnp.float8_e8m0fnu:
        raise ValueError(
            "scales that are powers of two cannot be learned: no small step moves them"
        )
    zero = None if grid.zero is None else grid.zero.astype(jnp.float32)
    return LearnedGrid(jnp.array(grid.scale, jnp.float32), zero, grid.tensor_scale)


def initial_step(v: Float[Array, "..."], fmt: Format, tile: tuple[int, ...]) -> Float[Array, "..."]:
    """LSQ's first step of each tile: ``2 <|v|> / sqrt(Q_P)``.

    Args:
      v: weights, or activations.
      fmt: format of the codes.
      tile: tile length for each of the last axes.
    """
    return 2 * _mean(jnp.abs(v.astype(jnp.float32)), tile) / math.sqrt(fmt.high)


def initial_weight_step(
    w: Float[Array, "..."], fmt: Format, tile: tuple[int, ...]
) -> Float[Array, "..."]:
    """LSQ+'s first step of each tile: ``max(|mean - 3 std|, |mean + 3 std|) / 2**(bits - 1)``.

    Args:
      w: weights.
      fmt: format of the codes, an integer.
      tile: tile length for each of the last axes.
    """
    w = w.astype(jnp.float32)
    mean = _mean(w, tile)
    deviation = jnp.sqrt(jnp.maximum(_mean(jnp.square(w), tile) - jnp.square(mean), 0.0))
    reach = jnp.maximum(jnp.abs(mean - 3 * deviation), jnp.abs(mean + 3 * deviation))
    return reach / 2 ** (fmt.bits - 1)


def initial_activation_grid(
    low: Float[Array, "..."], high: Float[Array, "..."], fmt: Format
) -> LearnedGrid:
    """LSQ+'s first grid of activations: the range that was seen meets both ends of the format's.

        s = (high - low) / (Q_high - Q_low),    z = Q_low - low / s

    Args:
      low: least value seen, one entry a tile.
      high: greatest value seen.
      fmt: format of the codes, an integer.
    """
    scale = (high - low) / (fmt.high - fmt.low)
    scale = jnp.where(scale > 0, scale, 1.0)
    return LearnedGrid(scale=scale, zero=fmt.low - low / scale)


def gradient_scale(count: int, fmt: Format) -> float:
    """LSQ's ``g = 1 / sqrt(count * Q_P)``: it brings a step's gradient to the size of its weights'.

    Optimizers whose steps do not depend on the size of a gradient, such as Adam, do without.

    Args:
      count: weights, or activations of one token, that share a step.
      fmt: format of the codes.
    """
    return 1 / math.sqrt(count * fmt.high)


def in_use(grid: LearnedGrid, fmt: Format, dtype: Any = jnp.float32) -> tuple[Any, Any]:
    """The float32 factor and whole zero of each tile, with the gradients of the unrounded ones.

    Args:
      grid: its parameters.
      fmt: format of the codes.
      dtype: of stored scales.
    """
    step = straight_through(grid.scale, _rounded(grid.scale, dtype).astype(jnp.float32))
    if grid.tensor_scale is not None:
        step = step * jax.lax.stop_gradient(grid.tensor_scale)
    zero = None if grid.zero is None else straight_through(grid.zero, _whole(grid.zero, fmt))
    return step, zero


def _rounded(scale: Float[Array, "..."], dtype: Any) -> Float[Array, "..."]:
    """Scales in their stored dtype, none of them zero or infinite."""
    info = jnp.finfo(dtype)
    # float32 arithmetic flushes its own subnormals, and bfloat16's, to zero.
    least = max(float(info.smallest_subnormal), float(jnp.finfo(jnp.float32).tiny))
    return formats.nearest(jnp.clip(scale, least, float(info.max)), dtype).astype(dtype)


def _whole(zero: Float[Array, "..."], fmt: Format) -> Float[Array, "..."]:
    return jnp.clip(jnp.round(zero), fmt.low, fmt.high)


def _with_gradient(leaf: Any, factor: float) -> Any:
    """The array itself, its gradient multiplied."""
    if leaf is None or factor == 1.0:
        return leaf
    return straight_through(leaf * factor, leaf)


def _mean(x: Float[Array, "..."], tile: tuple[int, ...]) -> Float[Array, "..."]:
    """Means over the elements of each tile, also of a ragged one."""
    inner = tiles.inner_axes(tile)
    sums = jnp.sum(tiles.split(x, tile), axis=inner)
    return sums / jnp.sum(tiles.split(jnp.ones_like(x), tile), axis=inner)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _fake_quantize(v, step, zero, fmt: Format, tile: tuple[int, ...]) -> Float[Array, "..."]:
    return _placed(v, step, zero, fmt, tile)[0]


def _placed(v, step, zero, fmt, tile) -> tuple[Any, Any, Any, Any]:
    """The rounded array; positions and values among the format's; the wide step."""
    shape = v.shape[v.ndim - len(tile) :]
    wide = tiles.spread(step, tile, shape)
    shift = 0.0 if zero is None else tiles.spread(zero, tile, shape)
    position = v / wide + shift
    values = formats.decode(formats.encode(position, fmt), fmt)
    return (values - shift) * wide, position, values - shift, wide


def _forward(v, step, zero, fmt, tile):
    return _placed(v, step, zero, fmt, tile)[0], (v, step, zero)


def _backward(fmt, tile, saved, cotangent):
    v, step, zero = saved
    _, position, centred, wide = _placed(v, step, zero, fmt, tile)
    inside = (position > fmt.low) & (position < fmt.high)
    inner = tiles.inner_axes(tile)

    def over_tiles(terms):
        return jnp.sum(tiles.split(terms * cotangent, tile), axis=inner)

    d_step = over_tiles(jnp.where(inside, centred - v / wide, centred))
    d_zero = None if zero is None else over_tiles(jnp.where(inside, 0.0, -wide))
    return jnp.where(inside, cotangent, 0.0), d_step, d_zero


_fake_quantize.defvjp(_forward, _backward)
