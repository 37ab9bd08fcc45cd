# SPDX-License-Identifier: Apache-2.0
"""Quantizing the other operand of a product, at run time.

x  ~  codes * scale,     scale = absmax over the token (or over a group of it) / highest code     dynamic
                         scale = absmax over all calibration tokens / highest code                static

A static scale is stored with the weight (``QTensor.input_scale``): nothing has to be read before the
codes are made, and what lies beyond what calibration saw saturates.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from qjax import formats, ranges, tiles
from qjax.formats import Format
from qjax.qtensor import QTensor
from qjax.scheme import ActivationScheme
from qjax.straight_through import straight_through


class Quantized(NamedTuple):
    """Activations in few bits, as a product uses them once and forgets them.

    Attributes:
      codes: unpacked, in the shape of the activations.
      scale: float32; length 1 along contraction axes, or one entry a group of the last of them; along
        other axes too where it is static.
      format: what the codes mean.
      group_size: elements along the last contraction axis that share a scale; None: all.
    """

    codes: Shaped[Array, "..."]
    scale: Float[Array, "..."]
    format: Format
    group_size: int | None


def quantize(
    x: Float[Array, "..."],
    scheme: ActivationScheme,
    axis: tuple[int, ...],
    static: Float[Array, "..."] | None = None,
) -> Quantized:
    """Quantizes activations: per token, or per group of each token, or all by one static scale.

    Args:
      x: activations.
      scheme: format, and what shares a scale.
      axis: the axes that the product sums over.
      static: the scale of a static scheme, one number or as :func:`input_scale` gives it.

    Returns:
      Codes and float32 scales. A token of zeros has scale one where scales are its own. NaN stays
      visible: in the codes if their format has one, else in the scale of its token.

    Raises:
      ValueError: the group size does not divide a longer last contraction axis; or a scheme is static
        and there is no scale, or the other way round.
    """
    _check_static(scheme, static)
    if static is not None:
        return _quantized_by(x, scheme, axis, static)
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
    scale = _scale(absmax, scheme)
    codes = formats.encode(
        x.astype(jnp.float32) / tiles.spread(scale, tile, x.shape), scheme.format
    )
    return Quantized(codes, scale, scheme.format, group_size)


def static_scale(absmax: Float[Array, "..."], scheme: ActivationScheme) -> Float[Array, ""]:
    """The one scale under which the largest of all activations meets the highest code.

    Args:
      absmax: the largest magnitudes that calibration saw, such as those of each input.
      scheme: of the activations.

    Example:
      >>> float(static_scale(jnp.array([1.0, 254.0]), ActivationScheme(format=formats.INT8, static=True)))
      2.0
    """
    return _scale(jnp.max(absmax), scheme)


def input_scale(
    w: QTensor, ndim: int, batch: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
) -> Float[Array, "..."] | None:
    """A weight's static scale in the axes of the activations that it meets; None if it has none.

    Args:
      w: the weight.
      ndim: axes of the activations.
      batch: batch axes of the activations and of the weight, in the order of one another. Those that
        weights are stacked along must be among them: each weight has a scale of its own.

    Raises:
      ValueError: weights are stacked along another axis.
    """
    scale = w.input_scale
    if scale is None:
        return None
    scale = scale if w.layer is None else scale[w.layer]
    of_x, of_w = batch
    if not set(range(scale.ndim)) <= set(of_w):
        raise ValueError(
            f"a static input scale for each of {scale.shape} stacked weights: a product must have "
            "their leading axes as batch axes, or take them one by one (scan, vmap)"
        )
    axes = [of_x[of_w.index(a)] for a in range(scale.ndim)]
    scale = jnp.transpose(scale, [axes.index(a) for a in sorted(axes)])
    return jnp.expand_dims(scale, [i for i in range(ndim) if i not in axes])


def dequantize(q: Quantized) -> Float[Array, "..."]:
    """The float32 activations that the codes stand for."""
    tile = tuple(-(-n // s) for n, s in zip(q.codes.shape, q.scale.shape, strict=True))
    return formats.decode(q.codes, q.format) * tiles.spread(q.scale, tile, q.codes.shape)


def fake_quantize(
    x: Float[Array, "*shape"],
    scheme: ActivationScheme,
    axis: tuple[int, ...],
    static: Float[Array, "..."] | None = None,
) -> Float[Array, "*shape"]:
    """What a product makes of activations by quantizing them, in their dtype; its gradient is one.

    A scale that follows its token cuts nothing off; what lies beyond a static one has no gradient.

    Args:
      x: activations.
      scheme: format, and what shares a scale.
      axis: the axes that the product sums over.
      static: the scale of a static scheme.

    Raises:
      ValueError: as :func:`quantize` does.
    """
    near = dequantize(quantize(x, scheme, axis, static)).astype(x.dtype)
    return straight_through(within_range(x, scheme, static), near)


def within_range(
    x: Float[Array, "*shape"], scheme: ActivationScheme, static: Float[Array, "..."] | None
) -> Float[Array, "*shape"]:
    """The activations as they are, without a gradient at the ends of a static range and beyond it.

    Args:
      x: activations.
      scheme: format of the codes.
      static: the scale of a static scheme; None: all have one.
    """
    if static is None:
        return x
    position = x.astype(jnp.float32) / static
    inside = (position > scheme.format.low) & (position < scheme.format.high)
    return jnp.where(inside, x, jax.lax.stop_gradient(x))


def _check_static(scheme: ActivationScheme, static: Float[Array, "..."] | None) -> None:
    if scheme.static and static is None:
        raise ValueError(
            "a static scheme has no input scale yet: qjax.quantize_sequentially finds it, or "
            "qjax.quantize_model with the result of qjax.calibrate; by hand, "
            "q.replaced(input_scale=qjax.activations.static_scale(absmax, q.activations))"
        )
    if static is not None and not scheme.static:
        raise ValueError(
            "a static input scale does not go with a dynamic scheme: take one of -static"
        )


def _quantized_by(
    x: Float[Array, "..."],
    scheme: ActivationScheme,
    axis: tuple[int, ...],
    static: Float[Array, "..."],
) -> Quantized:
    wide = x.astype(jnp.float32)
    scale = jnp.broadcast_to(static, (1,) * (x.ndim - jnp.ndim(static)) + jnp.shape(static))
    codes = formats.encode(wide / scale, scheme.format)
    if scheme.format.kind != "float":  # floats have a code for NaN
        hidden = jnp.any(jnp.isnan(wide), axis=axis, keepdims=True)
        scale = jnp.where(hidden, jnp.nan, scale)
    return Quantized(codes, scale, scheme.format, None)


def _scale(absmax: Float[Array, "..."], scheme: ActivationScheme) -> Float[Array, "..."]:
    # Divided by the highest code, 127, and not by 127.5 as a weight's: a token's largest element is
    # often an outlier that must not saturate, and with 127.5 it falls on a tie of rounding.
    return ranges.symmetric_scale(
        absmax, scheme.format, scheme.scale_format, divisor=scheme.format.high
    ).astype(jnp.float32)
