# SPDX-License-Identifier: Apache-2.0
"""Products whose three matrix multiplications, forward and backward, have 8-bit floats on both sides.

    y  = (Q_x(x) . Q_w(w))   * s_x * s_w            Q_x, Q_w: e4m3
    dx = (Q_g(g) . Q_w(w)^T) * s_g * s_w            Q_g:      e5m2
    dw = (Q_x(x)^T . Q_g(g)) * s_x * s_g
    Q(t) = round(saturate(t / s)),    s = 2 ** ceil(log2(2**margin * amax / high))

``high`` is 448 or 57344. With current scaling amax is that of the tensor itself. With delayed scaling it
is the largest of the last steps, so that a tensor is quantized while it is written and need not be read
twice; what has grown since saturates, which ``margin`` guards against. In the first step the history is
empty and every scale is 1. Only the quantized operands are kept for the backward pass: a byte an element.

=====================================  =================================================================
papers                                 here
=====================================  =================================================================
E4M3 for weights and activations,      ``formats.E4M3``, ``formats.E5M2``
E5M2 for gradients (section 3)
per-tensor scaling factor (3.2)        ``s``: one float32 a tensor, and a power of two
amax history (Transformer Engine)      :mod:`qjax.low_precision.amax_history`, ``Histories``
=====================================  =================================================================

Scales are powers of two, where the paper takes any number: then neither ``t / s`` nor the product with
``s_x * s_w`` rounds, whatever the dtype of the result, and as floats have their relative precision
everywhere, the price is one binade at the bottom. An infinity becomes NaN in its code, so that it is
not hidden from a loss scaling; neither counts for amax.

**What a GPU makes of it.** The operands of each product *are* 8-bit floats, and the scale comes after. In
this form XLA has an FP8 product in any case: `__cublas$lt$matmul$f8`, with the scale taken into the call,
or a Triton kernel on the same operands, whichever autotuning finds faster. The other form that XLA knows,
``dot(bf16(q) * s, bf16(q) * s)``, became a bfloat16 product when compiled for an H200 with Triton allowed
(jax 0.11.2): two kernels wrote the operands out wide first. Backward products ask for the highest
precision: for cuBLASLt that forbids the fast accumulation that forward products may use.

References:
  Micikevicius, Stosic, Burgess, Cornea, Dubey, Grisenthwaite, Ha, Heinecke, Judd, Kamalu, Mellempudi,
  Oberman, Shoeybi, Siu, Wu, FP8 Formats for Deep Learning, 2022, https://arxiv.org/abs/2209.05433.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

from qjax import formats
from qjax.formats import Format
from qjax.low_precision import amax_history
from qjax.subscripts import as_dot_general

DotDimensionNumbers = tuple[
    tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]
]


class Histories(NamedTuple):
    """Amax histories of a product that is scaled by earlier steps.

    Attributes:
      lhs: of the first operand.
      rhs: of the second.
      gradient: of what the backward pass gets.
    """

    lhs: Float[Array, " slots"]
    rhs: Float[Array, " slots"]
    gradient: Float[Array, " slots"]


class _Product(NamedTuple):
    """What is fixed when a product is traced."""

    numbers: DotDimensionNumbers
    precision: Any
    out: str
    lhs: str
    rhs: str
    margin: int


class _Quantized(NamedTuple):
    codes: Shaped[Array, "..."]
    scale: Float[Array, ""]
    history: Any  # of the next step; None with current scaling


def dot_general(
    lhs: Float[Array, "..."],
    rhs: Float[Array, "..."],
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    *,
    out_sharding: Any = None,
    histories: Histories | None = None,
    margin: int = 0,
) -> Float[Array, "..."]:
    """``jax.lax.dot_general`` with e4m3 operands and, backward, e5m2 gradients.

    Differentiated with regard to ``histories``, it gives the histories of the next step.

    Args:
      lhs: activations.
      rhs: weight.
      dimension_numbers: as in ``jax.lax``.
      precision: of the forward product's accumulation.
      preferred_element_type: of the result; the promoted dtype of the operands if None.
      out_sharding: None alone: constrain the result instead.
      histories: delayed scaling by these; current scaling if None.
      margin: powers of two of the range that are kept free above amax.

    Raises:
      ValueError: a negative margin.
      NotImplementedError: an ``out_sharding``.

    Example:
      >>> x, w = jnp.array([[3.0, -450.0]]), jnp.array([[1.0], [1.0]])
      >>> dot_general(x, w, (((1,), (0,)), ((), ()))).tolist()  # 450 lies between 448 and 480
      [[-445.0]]
    """
    if out_sharding is not None:
        raise NotImplementedError("out_sharding of an FP8 product: constrain the result instead")
    if margin < 0:
        raise ValueError(f"a margin is a number of powers of two, 0 or more, got {margin=}")
    contract, batch = (tuple(map(tuple, pair)) for pair in dimension_numbers)
    product = _Product(
        numbers=(contract, batch),  # pyright: ignore[reportArgumentType]  pairs
        precision=precision,
        out=jnp.dtype(preferred_element_type or jnp.result_type(lhs, rhs)).name,
        lhs=lhs.dtype.name, rhs=rhs.dtype.name, margin=margin,
    )  # fmt: skip
    return _multiply(product, lhs, rhs, histories)


def einsum(
    subscripts: str,
    x: Float[Array, "..."],
    w: Float[Array, "..."],
    *,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
    histories: Histories | None = None,
    margin: int = 0,
) -> Float[Array, "..."]:
    """``jnp.einsum`` of activations and a weight as one :func:`dot_general`, with its arguments.

    Raises:
      ValueError: the subscripts are not those of one product; see :func:`qjax.subscripts.letters`.

    Example:
      >>> einsum("...d,dhk->...hk", jnp.ones((5, 2)), jnp.ones((2, 3, 4))).shape
      (5, 3, 4)
    """
    numbers, order = as_dot_general(subscripts, x.ndim, w.ndim)
    y = dot_general(
        x, w, numbers, precision, preferred_element_type, out_sharding=out_sharding,
        histories=histories, margin=margin,
    )  # fmt: skip
    return jnp.transpose(y, order)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(
    product: _Product,
    lhs: Float[Array, "..."],
    rhs: Float[Array, "..."],
    histories: Histories | None,
) -> Float[Array, "..."]:
    return _forward(product, lhs, rhs, histories)[0]


def _forward(
    product: _Product,
    lhs: Float[Array, "..."],
    rhs: Float[Array, "..."],
    histories: Histories | None,
) -> tuple[Float[Array, "..."], tuple[_Quantized, _Quantized, Any]]:
    old = histories or Histories(None, None, None)  # pyright: ignore[reportArgumentType]
    q_lhs = _quantize(lhs, formats.E4M3, product.margin, old.lhs)
    q_rhs = _quantize(rhs, formats.E4M3, product.margin, old.rhs)
    y = _scaled(q_lhs, q_rhs, product.numbers, product.precision, product.out)
    return y, (q_lhs, q_rhs, old.gradient)


def _backward(
    product: _Product, kept: tuple[_Quantized, _Quantized, Any], gradient: Float[Array, "..."]
) -> tuple[Float[Array, "..."], Float[Array, "..."], Histories | None]:
    q_lhs, q_rhs, history = kept
    q_g = _quantize(gradient, formats.E5M2, product.margin, history)
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = product.numbers
    lhs_free = _others(q_lhs.codes.ndim, lhs_contract + lhs_batch)
    rhs_free = _others(q_rhs.codes.ndim, rhs_contract + rhs_batch)
    # Axes of the gradient: batch, free axes of lhs, free axes of rhs.
    batch = tuple(range(len(lhs_batch)))
    of_lhs = tuple(range(len(batch), len(batch) + len(lhs_free)))
    of_rhs = tuple(range(len(batch) + len(lhs_free), q_g.codes.ndim))
    d_lhs = _scaled(
        q_g, q_rhs, ((of_rhs, rhs_free), (batch, rhs_batch)), lax.Precision.HIGHEST, product.lhs
    )
    d_rhs = _scaled(
        q_g, q_lhs, ((of_lhs, lhs_free), (batch, lhs_batch)), lax.Precision.HIGHEST, product.rhs
    )
    # A product's remaining axes come in their order in its second operand; each is an axis of the first.
    lhs_of = dict(zip(rhs_contract, lhs_contract, strict=True))
    rhs_of = dict(zip(lhs_contract, rhs_contract, strict=True))
    d_lhs = _arranged(d_lhs, [*lhs_batch, *lhs_free, *(lhs_of[a] for a in sorted(rhs_contract))])
    d_rhs = _arranged(d_rhs, [*rhs_batch, *rhs_free, *(rhs_of[a] for a in sorted(lhs_contract))])
    if history is None:
        return d_lhs, d_rhs, None
    return d_lhs, d_rhs, Histories(q_lhs.history, q_rhs.history, q_g.history)


_multiply.defvjp(_forward, _backward)


def _quantize(x: Float[Array, "..."], fmt: Format, margin: int, history: Any) -> _Quantized:
    finite = jnp.isfinite(x)
    amax = jnp.max(jnp.abs(jnp.where(finite, x, 0)), initial=0).astype(jnp.float32)
    reach = amax if history is None else amax_history.reach(history)
    scale = _power_of_two(reach / (fmt.high * 2.0**-margin))
    codes = formats.encode(jnp.where(finite, x.astype(jnp.float32) / scale, jnp.nan), fmt)
    return _Quantized(codes, scale, None if history is None else amax_history.pushed(history, amax))


def _power_of_two(x: Float[Array, ""]) -> Float[Array, ""]:
    """The least power of two that is not below x; 1 for 0, of which nothing is known."""
    mantissa, exponent = jnp.frexp(x)  # x = mantissa * 2**exponent, mantissa in [0.5, 1)
    exponent = jnp.clip(exponent - (mantissa == 0.5), -126, 127)
    return jnp.where(x == 0, 1.0, jnp.ldexp(jnp.float32(1), exponent))


def _scaled(
    a: _Quantized, b: _Quantized, numbers: DotDimensionNumbers, precision: Any, out: str
) -> Float[Array, "..."]:
    # Not in float16: without their scales, products leave its range. In bfloat16 a power of two is exact,
    # and the product need not be written in float32 first.
    wide = jnp.float32 if out == "float16" else jnp.dtype(out)
    y = lax.dot_general(a.codes, b.codes, numbers, precision, preferred_element_type=wide)
    return (y * (a.scale * b.scale).astype(wide)).astype(out)


def _others(ndim: int, axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(axis for axis in range(ndim) if axis not in axes)


def _arranged(x: Float[Array, "..."], axes: list[int]) -> Float[Array, "..."]:
    """Moves each axis of x to the place that ``axes`` names for it."""
    return jnp.transpose(x, sorted(range(len(axes)), key=axes.__getitem__))
