# SPDX-License-Identifier: Apache-2.0
"""Quantizing the other operand of a product, at run time, from its own values.

x  ~  codes * scale,     scale = absmax over the token (or over a group of it) / highest code
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from qjax import formats, ranges, tiles
from qjax.formats import Format
from qjax.scheme import ActivationScheme
from qjax.straight_through import straight_through


class Quantized(NamedTuple):
    """Activations in few bits, as a product uses them once and forgets them.

    Attributes:
      codes: unpacked, in the shape of the activations.
      scale: float32; length 1 along contraction axes, or one entry a group of the last of them.
      format: what the codes mean.
      group_size: elements along the last contraction axis that share a scale; None: all.
    """

    codes: Shaped[Array, "..."]
    scale: Float[Array, "..."]
    format: Format
    group_size: int | None


def quantize(x: Float[Array, "..."], scheme: ActivationScheme, axis: tuple[int, ...]) -> Quantized:
    """Quantizes activations dynamically: per token, or per group of each token.

    Args:
      x: activations.
      scheme: format, and whether scales are per token or per group.
      axis: the axes that the product sums over.

    Returns:
      Codes and float32 scales. A token of zeros has scale one.

    Raises:
      ValueError: the group size does not divide a longer last contraction axis.
    """
    length = x.shape[axis[-1]]
    group_size = scheme.group_size
    if group_size is None or group_size >= length:  # one group covers the token
        group_size = None
        tile = tuple(n if i in {a % x.ndim for a in axis} else 1 for i, n in enumerate(x.shape))
    elif length % group_size:
        raise ValueError(
            f"activations are quantized in groups of {group_size}, which does not divide the "
            f"{length} elements that the product sums over"
        )
    else:
        tile = tuple(group_size if i == axis[-1] % x.ndim else 1 for i in range(x.ndim))
    # Infinities saturate; NaN stays, in the scale, so that a product does not hide it.
    magnitudes = jnp.abs(jnp.where(jnp.isinf(x), 0, x).astype(jnp.float32))
    absmax = jnp.max(tiles.split(magnitudes, tile), axis=tiles.inner_axes(tile))
    # Divided by the highest code, 127, and not by 127.5 as a weight's: a token's largest element is
    # often an outlier that must not saturate, and with 127.5 it falls on a tie of rounding.
    scale = ranges.symmetric_scale(
        absmax, scheme.format, scheme.scale_format, divisor=scheme.format.high
    ).astype(jnp.float32)
    codes = formats.encode(
        x.astype(jnp.float32) / tiles.spread(scale, tile, x.shape), scheme.format
    )
    return Quantized(codes, scale, scheme.format, group_size)


def dequantize(q: Quantized) -> Float[Array, "..."]:
    """The float32 activations that the codes stand for."""
    tile = tuple(-(-n // s) for n, s in zip(q.codes.shape, q.scale.shape, strict=True))
    return formats.decode(q.codes, q.format) * tiles.spread(q.scale, tile, q.codes.shape)


def fake_quantize(
    x: Float[Array, "*shape"], scheme: ActivationScheme, axis: tuple[int, ...]
) -> Float[Array, "*shape"]:
    """What a product makes of activations by quantizing them, in their dtype; its gradient is one.

    A scale follows its token, so that nothing lies beyond it and nothing is cut off.

    Args:
      x: activations.
      scheme: format, and whether scales are per token or per group.
      axis: the axes that the product sums over.

    Raises:
      ValueError: as :func:`quantize` does.
    """
    return straight_through(x, dequantize(quantize(x, scheme, axis)).astype(x.dtype))
