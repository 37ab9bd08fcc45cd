# SPDX-License-Identifier: Apache-2.0
"""How a weight that trains is going to be held: its values until then, and the QTensor at the end.

Both are made of the same codes.

    fake_quantize(w)  =  dequantize(quantize(w)),       d fake_quantize(w) / dw  =  1

Without a grid of their own, scales follow the weights as in rounding to nearest: each reaches to the
largest weight of its tile, or half a step short of it, and as it follows, every gradient passes. With one
(:mod:`qjax.qat.lsq`) what lies at its ends or beyond has none.

A NaN stays one, though no integer is a code for it: training that has gone wrong shows at once.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax import qtensor, ranges
from qjax.algorithms import round_nearest
from qjax.qat import lsq
from qjax.qat.lsq import LearnedGrid
from qjax.qtensor import QTensor
from qjax.ranges import Grid
from qjax.scheme import Scheme
from qjax.straight_through import straight_through


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a weight is going to be held.

    Attributes:
      scheme: format, granularity, and what becomes of activations.
      axis: what a product sums over, counted from the end.
      shape: of one weight; those that are stacked have axes in front of it.
      dtype: logical dtype of the QTensor, as its numpy name.
      scale_dtype: of float scales that do not follow the weight; those that do have the logical one.
      name: what errors call the weight: its path.
    """

    scheme: Scheme
    axis: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str
    scale_dtype: str
    name: str = "array"

    @property
    def tile(self) -> tuple[int, ...]:
        """What shares a scale.

        Raises:
          ValueError: the group size does not divide the axis.
        """
        return round_nearest.tile_of(self.shape, self.scheme.weights, self.axis, self.name)

    @staticmethod
    def of(q: QTensor, name: str = "array") -> "Form":
        """The form that a QTensor has.

        Args:
          q: in any arrangement.
          name: what errors call it.

        Raises:
          ValueError: it holds inputs beside its codes, or in an order of their own, which have no form.
        """
        if q.outliers is not None:
            raise ValueError(
                f"{name}: inputs that are held as they are, beside the codes, cannot be trained: start "
                "from another method than llm-int8"
            )
        if q.order is not None:
            raise ValueError(
                f"{name}: inputs that stand in an order of their own cannot be trained: start from "
                "another order of GPTQ than 'regrouped'"
            )
        q = qtensor.plain(q)
        shape = q.shape[q.ndim - len(q.tile) :]
        return Form(
            scheme=q.scheme, axis=q.axis, shape=shape, dtype=str(q.dtype),
            scale_dtype=str(q.scale.dtype), name=name,
        )  # fmt: skip


def fake_quantize(
    w: Float[Array, "*shape"], form: Form, grid: LearnedGrid | None = None
) -> Float[Array, "*shape"]:
    """What the weight will be worth once it is quantized; in its own dtype, trainable.

    Args:
      w: the weight as it trains, one or several stacked ones.
      form: how it is going to be held.
      grid: its scales and zeros where they are parameters; None: they follow the weight.

    Returns:
      The values of :func:`quantize`'s result.

    Raises:
      ValueError: the weight does not have the form's shape, or its group size does not divide it.

    Example:
      >>> import jax.numpy as jnp
      >>> scheme = Scheme.parse("w4a16-channel")
      >>> form = Form(
      ...     scheme=scheme, axis=(-2,), shape=(2, 1), dtype="float32", scale_dtype="float32"
      ... )
      >>> fake_quantize(jnp.array([[0.6], [-7.5]]), form).tolist()
      [[1.0], [-8.0]]
    """
    _check_shape(w, form)
    if grid is None:
        near = straight_through(w, qtensor.dequantize(quantize(w, form), w.dtype))
    else:
        fmt, tile = form.scheme.weights.format, form.tile
        near = lsq.fake_quantize(
            w, grid, fmt, tile, dtype=form.scale_dtype,
            gradient_scale=lsq.gradient_scale(math.prod(tile), fmt),
        )  # fmt: skip
    return jnp.where(jnp.isnan(w), w, near)


def quantize(w: Float[Array, "..."], form: Form, grid: LearnedGrid | None = None) -> QTensor:
    """The QTensor that :func:`fake_quantize` has the values of.

    Args:
      w: the weight as it trained.
      form: how it is to be held.
      grid: its scales and zeros where they are parameters.

    Raises:
      ValueError: as :func:`fake_quantize` does, or NaN among the weights.
    """
    _check_shape(w, form)
    if grid is None:
        return round_nearest.quantize(
            w, form.scheme, axis=form.axis, stacked=w.ndim - len(form.shape), dtype=form.dtype,
            name=form.name,
        )  # fmt: skip
    fmt, tile = form.scheme.weights.format, form.tile
    held = lsq.stored(grid, fmt, form.scale_dtype)
    codes = ranges.encode(w, held, fmt, tile)
    return QTensor.from_codes(
        codes, held.scale, held.zero, held.tensor_scale, format=fmt, axis=form.axis, tile=tile,
        dtype=form.dtype, activations=form.scheme.activations,
    )  # fmt: skip


def starting_grid(q: QTensor, name: str = "array") -> LearnedGrid:
    """The parameters of a QTensor's grid.

    Args:
      q: what another method found.
      name: what errors call it.

    Raises:
      ValueError: its scales cannot be learned.
    """
    q = qtensor.plain(q)
    try:
        return lsq.from_stored(Grid(q.scale, q.zero, q.tensor_scale))
    except ValueError as error:
        raise ValueError(f"{name}: {error}; train with scales that follow the weights") from error


def check_dynamic(path: str, scheme: Scheme) -> None:
    """Checks that a model which has not been calibrated can train for a scheme.

    Args:
      path: of a layer.
      scheme: how it is to be held.

    Raises:
      ValueError: activations have a static scale, which only calibration knows.
    """
    if scheme.is_static:
        raise ValueError(
            f"{path}: {scheme.name} has an input scale from calibration: qjax.quantize_model or "
            "qjax.quantize_sequentially first, then qjax.trainable trains what they found"
        )


def _check_shape(w: Float[Array, "..."], form: Form) -> None:
    if w.shape[max(0, w.ndim - len(form.shape)) :] != form.shape:
        raise ValueError(f"{form.name}: a weight of shape {form.shape} is meant, got {w.shape}")
