# SPDX-License-Identifier: Apache-2.0
"""Learned rounding: codes, scales and zeros trained together for what comes out of a block.

    minimize over V, a, b    || block(x; W') - y ||^2,        W' = (codes - zero) * scale
    codes = clip(round(W / scale + zero + shift + V * gap))
    scale = a * scale_0,    zero = round(zero_0 + b)

``scale_0``, ``zero_0`` and the codes at the start are another method's. Where its code is not the
nearest one (GPTQ), ``shift`` moves the weight into the cell of that code, just inside its border, so
that training begins with exactly that method's array. Rounding has no gradient; everywhere it is taken
to be the identity (straight through), and clipping stops the gradient of V. Scales are rounded to their
stored dtype in every step, so that what was trained is what is stored.

=====================  =====================================================================
papers                 here
=====================  =====================================================================
V (AutoRound)          ``Parameters.offset``, in gaps between neighbouring values of the format
alpha, beta            ``Parameters.scale``, a factor of the tile's scale, and ``Parameters.zero``: the
(AutoRound)            same two degrees of freedom of a range, around whatever grid it starts from
s (all)                ``scale``, as it is stored
zp (AutoRound)         ``zero``
lr (AutoRound)         2 / steps of ``Options.rounding_reach`` and of ``Options.range_reach``
x_hat, z (BRECQ)       what the block gets and should give: :mod:`qjax.reconstruction`
=====================  =====================================================================

Four things are not as in the papers. Steps are Adam's and decay linearly, where AutoRound takes the
sign of the gradient: three blocks of a small Llama at w4a16-g128 from GPTQ lost 0.024 of perplexity
by Adam's and 0.047 by those, of 0.062 before. V may leave [-1/2, 1/2], for there are few steps to do
so in. The rectified sigmoid and the regularizer of AdaRound, which BRECQ uses, are not there: they
need tens of thousands of steps. Nor are BRECQ's weights by Fisher information: an output's error counts
as it is.

References:
  Cheng, Zhang, Shen, Cai, He, Lv, Liu, Optimize Weight Rounding via Signed Gradient Descent for the
  Quantization of LLMs (AutoRound), 2023, https://arxiv.org/abs/2309.05516.
  Li, Gong, Tan, Yang, Hu, Zhang, Yu, Wang, Gu, BRECQ: Pushing the Limit of Post-Training Quantization by
  Block Reconstruction, ICLR 2021, https://arxiv.org/abs/2102.05426.
  Nagel, Amjad, van Baalen, Louizos, Blankevoort, Up or Down? Adaptive Rounding for Post-Training
  Quantization (AdaRound), ICML 2020, https://arxiv.org/abs/2004.10568.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Shaped

from qjax import formats, qtensor, tiles
from qjax.formats import Format
from qjax.qtensor import QTensor
from qjax.straight_through import straight_through

_INSIDE = 0.49  # of the way from a value to the next: as near to its cell's border as is safe


@dataclass(frozen=True, kw_only=True)
class Options:
    """How rounding is learned.

    Attributes:
      steps: of training for each block, at least 1.
      batch: calibration windows of a step, at least 1.
      rounding_reach: how far a weight can move towards other codes in all steps together, and a zero; in
        gaps between codes, more than 0. AutoRound's is 1/2: steps of ``1 / steps`` that shrink
        linearly to nothing. 1/4 and 1 were worse for 3-bit weights of a small model.
      range_reach: how much a scale can change in all steps together, as a share of it, in [0, 1);
        0 leaves scales as they are.
      seed: of the order in which windows are taken.
    """

    steps: int = 200
    batch: int = 2
    rounding_reach: float = 0.5
    range_reach: float = 0.05
    seed: int = 0

    def __post_init__(self):  # noqa: D105
        if self.steps < 1 or self.batch < 1:
            raise ValueError(
                f"need steps and a batch of 1 or more, got {self.steps=} {self.batch=}"
            )
        if not 0 < self.rounding_reach < math.inf:
            raise ValueError(f"rounding_reach is a distance above 0, got {self.rounding_reach=}")
        if not 0 <= self.range_reach < 1:
            raise ValueError(f"range_reach is a share in [0, 1), got {self.range_reach=}")
        if self.seed < 0:
            raise ValueError(f"a seed is not negative, got {self.seed=}")


class Parameters(NamedTuple):
    """What is learned of one weight; all float32.

    Attributes:
      offset: V, for each weight; 0 at the start.
      scale: factor of each tile's scale; 1 at the start. None where scales are powers of two, which no
        small step reaches.
      zero: what each tile's zero moves by before it is rounded; 0 at the start. None when symmetric.
    """

    offset: Float[Array, "..."]
    scale: Any
    zero: Any


class Anchor(NamedTuple):
    """What stays as it is while one weight is learned.

    Attributes:
      weight: the original one, in its dtype.
      shift: from it to the cell of the code that it starts with, float32.
      gap: between neighbouring values of the format where it starts; None: 1 everywhere.
      start: the QTensor that training starts from.
    """

    weight: Float[Array, "..."]
    shift: Float[Array, "..."]
    gap: Any
    start: QTensor


def anchored(w: Float[Array, "..."], start: QTensor) -> Anchor:
    """Prepares a weight for training from another method's result.

    Args:
      w: the original weight; infinities are taken to be what ``start`` makes of them.
      start: any QTensor of its shape, without outliers, inputs as they are.

    Raises:
      ValueError: the shapes differ, the leaves are those of stacked layers, there are outliers, or
        inputs stand in an order of their own.
    """
    if w.shape != start.shape or len(start.tile) != w.ndim:
        raise ValueError(
            f"one weight and its QTensor are needed, got {w.shape} and {start.shape} in tiles of "
            f"{len(start.tile)} axes"
        )
    if start.outliers is not None:
        raise ValueError("weights that are held as they are, beside the codes, cannot be trained")
    if start.order is not None:
        raise ValueError(
            "weights whose inputs stand in an order of their own cannot be trained: start from another "
            "order of GPTQ than 'regrouped'"
        )
    start = qtensor.plain(start)
    near = qtensor.dequantize(start, w.dtype)
    w = jnp.where(jnp.isfinite(w), w, near)
    zero = None if start.zero is None else start.zero.astype(jnp.float32)
    position = _position(w, qtensor.scales(start), zero, start.tile)
    values = formats.decode(qtensor.unpacked(start), start.format)
    nearest = formats.decode(formats.encode(position, start.format), start.format)
    below, above = _gaps(values, start.format)
    inside = jnp.clip(position, values - _INSIDE * below, values + _INSIDE * above)
    return Anchor(
        weight=w,
        shift=jnp.where(nearest == values, 0.0, inside - position),
        gap=None if start.format.kind == "integer" else (below + above) / 2,
        start=start,
    )


def _gaps(
    values: Float[Array, "*shape"], fmt: Format
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """How far the next values of a format lie below and above some of its values.

    At an end of the range both are the same.
    """
    if fmt.kind == "integer":
        return jnp.ones_like(values), jnp.ones_like(values)
    codes = np.asarray(fmt.table) if fmt.table else np.arange(256, dtype=np.uint8).view(fmt.dtype)
    held = codes.astype(np.float32)
    ladder = np.unique(held[np.isfinite(held)])
    between = np.diff(ladder)
    place = jnp.searchsorted(jnp.asarray(ladder), values)
    below = jnp.asarray(np.concatenate([between[:1], between]))[place]
    return below, jnp.asarray(np.concatenate([between, between[-1:]]))[place]


def parameters(anchor: Anchor) -> Parameters:
    """The parameters at the start, under which a weight is exactly what it starts from."""
    q = anchor.start
    learnable = q.scale.dtype != jnp.float8_e8m0fnu
    return Parameters(
        offset=jnp.zeros(q.shape, jnp.float32),
        scale=jnp.ones(q.scale.shape, jnp.float32) if learnable else None,
        zero=None if q.zero is None else jnp.zeros(q.zero.shape, jnp.float32),
    )


def optimizer(options: Options) -> optax.GradientTransformation:
    """Adam over any pytree of :class:`Parameters`, one reach for roundings and zeros, one for scales."""
    reaches = {
        "offset": options.rounding_reach,
        "zero": options.rounding_reach,
        "scale": options.range_reach,
    }
    # Adam's steps are about as long as its rate, and the mean of a linear decay is half its start.
    return optax.partition(
        {
            field: optax.adam(optax.linear_schedule(2 * reach / options.steps, 0.0, options.steps))
            for field, reach in reaches.items()
        },
        lambda params: jax.tree_util.tree_map_with_path(lambda path, _: path[-1].name, params),
    )


def soft(anchor: Anchor, params: Parameters) -> Float[Array, "..."]:
    """The array of :func:`hard`, value for value, with gradients straight through its roundings.

    dW'/dV = scale * gap,    dW'/dscale = codes - zero - W / scale        inside the range
    dW'/dV = 0,              dW'/dscale = codes - zero,  dW'/dzero = -scale     where it saturates
    """
    q = anchor.start
    rounded = _rounded(anchor, params)
    values = straight_through(rounded.position, formats.decode(rounded.codes, q.format))
    if rounded.zero is not None:
        values = values - tiles.spread(rounded.zero, q.tile, q.shape)
    return (values * tiles.spread(rounded.step, q.tile, q.shape)).astype(q.dtype)


def hard(anchor: Anchor, params: Parameters) -> QTensor:
    """The QTensor that the parameters stand for."""
    q = anchor.start
    rounded = _rounded(anchor, params)
    return QTensor.from_codes(
        rounded.codes, rounded.scale,
        None if rounded.zero is None else rounded.zero.astype(jnp.int8), q.tensor_scale,
        format=q.format, axis=q.axis, tile=q.tile, dtype=q.dtype, activations=q.activations,
    ).replaced(input_scale=q.input_scale)  # fmt: skip


class _Rounded(NamedTuple):
    """A weight on its grid.

    Attributes:
      scale: as stored; without a gradient.
      step: the float32 factor of a tile.
      zero: a whole number, float32; None when symmetric.
      position: of each weight among the format's values, clipped to them.
      codes: of the values next to the positions.
    """

    scale: Shaped[Array, "..."]
    step: Float[Array, "..."]
    zero: Float[Array, "..."] | None
    position: Float[Array, "..."]
    codes: Shaped[Array, "..."]


def _rounded(anchor: Anchor, params: Parameters) -> _Rounded:
    q, fmt = anchor.start, anchor.start.format
    scale, step = q.scale, q.scale.astype(jnp.float32)
    if params.scale is not None:
        wide = step * params.scale
        info = jnp.finfo(scale.dtype)
        # float32 arithmetic flushes its own subnormals, and bfloat16's, to zero.
        least = max(float(info.smallest_subnormal), float(jnp.finfo(jnp.float32).tiny))
        bounded = jnp.clip(wide, least, float(info.max))
        scale = formats.nearest(bounded, scale.dtype).astype(scale.dtype)
        step = straight_through(wide, scale.astype(jnp.float32))
    if q.tensor_scale is not None:
        step = step * q.tensor_scale
    zero = None
    if q.zero is not None:
        moved = jnp.clip(q.zero.astype(jnp.float32) + params.zero, fmt.low, fmt.high)
        zero = straight_through(moved, jnp.round(moved))
    offset = params.offset if anchor.gap is None else params.offset * anchor.gap
    position = _position(anchor.weight, step, zero, q.tile) + anchor.shift + offset
    position = jnp.clip(position, fmt.low, fmt.high)
    return _Rounded(scale, step, zero, position, formats.encode(position, fmt))


def _position(
    w: Float[Array, "..."],
    step: Float[Array, "..."],
    zero: Float[Array, "..."] | None,
    tile: tuple[int, ...],
) -> Float[Array, "..."]:
    """Where weights lie among the values of their format."""
    position = w.astype(jnp.float32) / tiles.spread(step, tile, w.shape)
    return position if zero is None else position + tiles.spread(zero, tile, w.shape)
