# SPDX-License-Identifier: Apache-2.0
"""Products with quantized weights: the one door to the kernels.

How a product ``x . w`` is computed, for a weight that is a QTensor:

=================  ==========================  =====================================================
weights            activations                 XLA form
=================  ==========================  =====================================================
one scale for all  as they are                 ``dot(x, codes) * scale``: the codes go into the dot
that is summed                                 as they are, nothing dequantized is written out
over               int8 or int4 per token      ``dot(codes, codes) -> int32``, times both scales
                   e4m3 per token              ``dot(codes, codes)`` as bfloat16, times both scales
groups or blocks   as they are                 ``dot(x, dequantize(w))``
                   per token                   ``dot(codes, dequantize(w)) * scale``
any                in groups (fp8-block, mx)   ``dot(dequantize(x), dequantize(w))``
any, and outliers  any                         as above without them, plus their ``dot`` as floats
any, with inputs   any                         as above, of ``x`` with its inputs in that order
in their own order
groups, on a GPU   as they are, few rows       ``sum(dot(x, codes) by group * scale)``: `few_rows`
=================  ==========================  =====================================================

int4, int8 and e4m3 weights that :func:`qjax.prepare` has arranged for it go through
:mod:`pallas_kernels.quantized_matmul` instead, on a Hopper GPU: activations of the scales' 16-bit dtype,
up to 4096 rows, or quantized to int8 or e4m3 as the weight wants them, however many
(:func:`qjax.kernel_products.why_not`). All others go through XLA, in the arrangement of the table.

Accumulation is float32 or int32 whatever the operands are, and the result is rounded once, to
``preferred_element_type`` or the promoted dtype. The dot of two integers always asks for an int32
result: asking for int8 sends XLA on a GPU into a scalar loop (openxla/xla issue 7117).
"""

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Integer, Shaped

from pallas_kernels import device
from qjax import activations, input_order, kernel_layout, kernel_products, outliers, qtensor, tiles
from qjax.float_dot import doubled, float_dot
from qjax.qtensor import QTensor
from qjax.subscripts import as_dot_general

Implementation = Literal["auto", "xla", "pallas"]
_LEAST_ROWS = 16  # see few_rows

DimensionNumbers = tuple[Any, Any]  # ((x contracting, w contracting), (x batch, w batch))


def matmul(
    x: Float[Array, "*batch k"],
    w: Float[Array, "k n"] | QTensor,
    *,
    preferred_element_type: Any = None,
    implementation: Implementation = "auto",
) -> Float[Array, "*batch n"]:
    """``x @ w`` with a plain or quantized matrix.

    Args:
      x: activations.
      w: ``[k, n]``.
      preferred_element_type: dtype of the result; the promoted dtype of both if None.
      implementation: see :func:`dot_general`.

    Returns:
      The product, accumulated in float32 or int32.

    Raises:
      ValueError: the shapes do not go together.

    Example:
      >>> import qjax
      >>> w = jnp.eye(4)
      >>> qjax.matmul(jnp.ones((2, 4)), qjax.quantize(w, "w8a16-channel")).shape
      (2, 4)
    """
    if w.ndim != 2 or x.shape[-1] != w.shape[0]:
        raise ValueError(f"matmul of {x.shape} and {w.shape}: need [..., k] and [k, n]")
    return dot_general(
        x,
        w,
        (((x.ndim - 1,), (0,)), ((), ())),
        preferred_element_type=preferred_element_type,
        implementation=implementation,
    )


def dot_general(
    x: Shaped[Array, "..."],
    w: Shaped[Array, "..."] | QTensor,
    dimension_numbers: DimensionNumbers,
    precision: Any = None,
    preferred_element_type: Any = None,
    *,
    out_sharding: Any = None,
    implementation: Implementation = "auto",
) -> Shaped[Array, "..."]:
    """``jax.lax.dot_general`` whose second operand may be quantized; the hook for Flax layers.

    Args:
      x: activations.
      w: weight.
      dimension_numbers: ``((x contracting, w contracting), (x batch, w batch))``.
      precision: of a floating-point dot, as in ``jax.lax``.
      preferred_element_type: dtype of the result; the promoted dtype of both if None.
      out_sharding: as in ``jax.lax``; for plain weights only.
      implementation: ``"xla"``; ``"pallas"`` for a hand-written kernel; ``"auto"`` for the kernel where
        :func:`qjax.kernel_products.why_not` has nothing against it, else XLA.

    Returns:
      Batch axes, then the free axes of ``x``, then those of ``w``. Gradients flow to ``x`` (straight
      through its rounding, none beyond a static range) and to the weight's scales.

    Raises:
      NotImplementedError: ``"pallas"``, and no kernel takes the product; the message says why, in
        numbers.
      ValueError: axes that belong together differ in length; or activations are to be quantized, but
        the weight was not quantized along the axes that this product sums over; or its inputs stand in
        an order of their own, and it is one of a batch or a part of its inputs.
    """
    if implementation not in ("auto", "xla", "pallas"):
        raise ValueError(f"{implementation=}: must be 'auto', 'xla' or 'pallas'")
    dtype = preferred_element_type or jnp.promote_types(x.dtype, w.dtype)
    numbers = _normalized(dimension_numbers, x.ndim, w.ndim)
    _check_lengths(x, w, numbers)
    if isinstance(w, QTensor) and out_sharding is not None:
        raise NotImplementedError("out_sharding with a QTensor: constrain the result instead")
    if isinstance(w, QTensor) and w.outliers is not None:
        return _in_two_parts(x, w, numbers, precision, implementation).astype(dtype)
    if isinstance(w, QTensor) and w.order is not None:
        x, w = _in_order(x, w, numbers)
    if implementation != "xla":
        reason = kernel_products.why_not(x, w, numbers)
        if reason is None and isinstance(w, QTensor):
            return kernel_products.product(x, w, jnp.dtype(dtype), many=_through_xla)
        if implementation == "pallas":
            raise NotImplementedError(
                f"no Pallas kernel takes {x.dtype}{list(x.shape)} x {_describe(w)}: {reason}; "
                "'auto' and 'xla' do"
            )
    if isinstance(w, QTensor):
        w = qtensor.plain(w)
    if not isinstance(w, QTensor):
        return float_dot(x, w, numbers, precision, dtype, out_sharding)
    if w.activations is not None:
        _check_quantized_axes(w, numbers)
        y: Array = _both_quantized(x, w, numbers, precision)
        return y.astype(dtype)
    return _weight_only(x, w, numbers, precision).astype(dtype)


def einsum(
    subscripts: str,
    x: Shaped[Array, "..."],
    w: Shaped[Array, "..."] | QTensor,
    *,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
    implementation: Implementation = "auto",
) -> Shaped[Array, "..."]:
    """``jnp.einsum`` of two operands, the second plain or quantized.

    Args:
      subscripts: explicit, such as ``"btd,dhk->bthk"``; an ellipsis may stand in ``x`` and the result.
      x: activations.
      w: weight.
      precision: see :func:`dot_general`.
      preferred_element_type: see :func:`dot_general`.
      out_sharding: see :func:`dot_general`.
      implementation: see :func:`dot_general`.

    Raises:
      ValueError: not two operands, a repeated letter, a letter that is summed in one operand alone,
        or one with two lengths.

    Example:
      >>> einsum("...d,dhk->...hk", jnp.ones((5, 2)), jnp.ones((2, 3, 4))).shape
      (5, 3, 4)
    """
    numbers, order = as_dot_general(subscripts, x.ndim, w.ndim)
    y = dot_general(
        x,
        w,
        numbers,
        precision,
        preferred_element_type,
        out_sharding=out_sharding,
        implementation=implementation,
    )
    return jnp.transpose(y, order)


def take(
    table: Float[Array, "v d"] | QTensor, ids: Integer[Array, "*ids"]
) -> Float[Array, "*ids d"]:
    """Rows of an embedding table; of a quantized one, only the rows asked for are dequantized.

    A table whose inputs stand in an order of their own is dequantized as a whole.

    >>> take(jnp.arange(6.0).reshape(3, 2), jnp.array([2])).tolist()
    [[4.0, 5.0]]
    """
    if not isinstance(table, QTensor):
        return jnp.take(table, ids, axis=0)
    if table.order is not None:
        return jnp.take(qtensor.dequantize(table), ids, axis=0)
    tile_rows, tile_columns = table.tile
    ids = jnp.where(ids < 0, ids + table.shape[0], ids)  # as jnp.take counts them
    tile_ids = ids // tile_rows

    def rows(per_tile):
        return None if per_tile is None else jnp.take(per_tile, tile_ids, axis=0)

    return qtensor.dequantize(
        QTensor(
            codes=jnp.take(table.codes, ids, axis=0),
            scale=rows(table.scale),
            zero=rows(table.zero),
            tensor_scale=table.tensor_scale,
            columns=table.columns,
            outliers=None if table.outliers is None else jnp.take(table.outliers, ids, axis=-1),
            format=table.format,
            axis=(-1,),
            tile=(1,) * ids.ndim + (tile_columns,),
            shape=(*ids.shape, table.shape[-1]),
            dtype=table.dtype,
        )
    )


def form(w: Any) -> str:
    """How a product with this weight runs here, in words: the row of the module's table.

    >>> form(jnp.ones((2, 2)))
    'xla: dot'
    """
    if not isinstance(w, QTensor):
        return "xla: dot"
    if w.outliers is not None:
        rest = form(w.replaced(columns=None, outliers=None))
        return f"{rest}; {w.columns.shape[-1]} inputs in {w.outliers.dtype}"
    if w.order is not None:
        return f"{form(w.replaced(order=None))}; inputs in the order of their groups"
    if device.is_hopper() and kernel_layout.why_no_kernel(w) is None:
        once = "" if w.layout else " once prepared"
        most = kernel_products.most_rows(w)
        up_to = "" if most is None else f" up to {most} rows"
        then = "" if most is None else f", then {_xla_form(w)}"
        return f"pallas: few_tokens, many_tokens{up_to}{once}{then}"
    partial = w.activations is None and not w.scaled_per_contraction and not w.format.packed
    few = ", few rows as partial sums" if partial and jax.default_backend() == "gpu" else ""
    return _xla_form(w) + few


def _xla_form(w: QTensor) -> str:
    """How XLA computes a product of many rows."""
    scheme, whole = w.activations, w.scaled_per_contraction
    if scheme is None:
        return "xla: dot of codes, then scale" if whole else "xla: dequantize, then dot"
    if scheme.group_size is not None:
        return "xla: dequantize both, then dot"
    inputs = ", that of inputs static" if scheme.static else ""
    if not whole:
        return f"xla: dot of {scheme.format.name} and dequantized, then scale{inputs}"
    return f"xla: {scheme.format.name} dot, then scales{inputs}"


def _through_xla(x: Float[Array, "m k"], w: QTensor, dtype: Any) -> Float[Array, "m n"]:
    """``x @ w`` whatever a kernel could do."""
    return matmul(x, w, preferred_element_type=dtype, implementation="xla")


def _weight_only(x, w: QTensor, numbers, precision) -> Float[Array, "..."]:
    if not _sums_over_quantized_axes(w, numbers):
        return float_dot(x, qtensor.dequantize(w, x.dtype), numbers, precision)
    if jax.default_backend() == "gpu" and _is_few_rows(x, w, numbers):
        return few_rows(x, w, numbers, precision)
    if not w.scaled_per_contraction:
        return float_dot(x, qtensor.dequantize(w, x.dtype), numbers, precision)
    # codes - zero is a whole number below 256, or an 8-bit float: exact in x's dtype. (nf4's values
    # are not; they are rounded to it as a dequantized weight would be.)
    y = float_dot(x, qtensor.centred(w, x.dtype), numbers, precision)
    return y * _beside_result(_free_scales(w), x.ndim, numbers)


def few_rows(x, w: QTensor, numbers: DimensionNumbers, precision: Any) -> Float[Array, "..."]:
    """The weight-only product of a decode step, as XLA on a GPU does it fastest.

        y = sum_g scale[g] * (x[g] . codes[g] - zero[g] * sum x[g])     g: groups of the contraction

    The codes go into the dot as they are and the scales come after it, so that no dequantized weight
    is written out; the price is ``rows * groups`` partial results. Rows are filled up to 16: below,
    XLA leaves its matrix product for a slower vector one. On one H200 (2026-11-23, jax 0.11.2, bfloat16
    activations, [4096, 14336], 16 rows) int4 in groups of 128 takes 43 us so and 87 dequantized; with one
    scale a channel 16 rows take 28 us and a single one, not filled up, 80; bfloat16 takes 34.

    Args:
      x: activations.
      w: weight, summed over the one axis that it was quantized along, inputs as they are.
      numbers: as in ``jax.lax.dot_general``, normalized; no batch axes.
      precision: as in ``jax.lax``.

    Returns:
      The float32 product: free axes of ``x``, then of ``w``.
    """
    assert w.order is None
    ((x_axis,), (axis,)), _ = numbers
    length, groups = w.shape[axis], w.scale.shape[axis]
    rows = jnp.moveaxis(x, x_axis, -1)
    free_shape = rows.shape[:-1]
    count = math.prod(free_shape)
    rows = rows.reshape(count, groups, length // groups)
    rows = jnp.pad(rows, [(0, max(0, _LEAST_ROWS - count)), (0, 0), (0, 0)])
    by_group = *w.shape[:axis], groups, length // groups, *w.shape[axis + 1 :]
    codes = qtensor.readable(w).astype(x.dtype).reshape(by_group)
    group_numbers = (((2,), (axis + 1,)), ((1,), (axis,)))
    partial = float_dot(rows, codes, group_numbers, precision)  # [groups, rows, *w free]

    def beside_partial(per_tile):
        tile = tuple(1 if i == axis else t for i, t in enumerate(w.tile))
        shape = tuple(groups if i == axis else n for i, n in enumerate(w.shape))
        return jnp.expand_dims(jnp.moveaxis(tiles.spread(per_tile, tile, shape), axis, 0), 1)

    if w.zero is not None:
        sums = jnp.sum(rows, axis=2, dtype=jnp.float32).T
        sums = sums.reshape(*sums.shape, *(1,) * (partial.ndim - 2))
        partial = partial - sums * beside_partial(w.zero).astype(jnp.float32)
    y = jnp.sum(partial * beside_partial(qtensor.scales(w)), axis=0)[:count]
    return y.reshape(*free_shape, *y.shape[1:])


def _is_few_rows(x, w: QTensor, numbers: DimensionNumbers) -> bool:
    """Whether :func:`few_rows` takes the product and is faster than dequantizing first.

    It is where the codes are of a type that XLA multiplies, and the float32 partial results take at
    most half the bytes of a bfloat16 weight: at 64 rows and groups of 128 they take 1.1 times as many,
    and an H200 needs 100 us instead of 90.
    """
    (x_contracting, w_contracting), (batch, _) = numbers
    if batch or len(w_contracting) != 1 or len(w.tile) != w.ndim or w.format.packed:
        return False
    (axis,) = w_contracting
    length, groups = w.shape[axis], w.scale.shape[axis]
    rows = max(_LEAST_ROWS, x.size // length)
    return length % groups == 0 and 4 * rows * groups <= length


def _in_two_parts(x, w: QTensor, numbers, precision, implementation) -> Float[Array, "..."]:
    """The float32 product of a weight with outliers: theirs, and that of the rest as it comes."""
    ((x_axes, w_axes), (batch, _)) = numbers
    _check_quantized_axes(w, numbers)
    columns, held = (leaf if w.layer is None else leaf[w.layer] for leaf in (w.columns, w.outliers))
    if batch or columns.ndim != 1:
        raise ValueError(f"{_describe(w)} has outliers: it can be multiplied alone, not in a batch")
    rest, few = outliers.split(x, columns, tuple(x_axes[w_axes.index(a % w.ndim)] for a in w.axis))
    few, held = (part.astype(jnp.promote_types(x.dtype, held.dtype)) for part in (few, held))
    w = w.replaced(columns=None, outliers=None)
    y = dot_general(rest, w, numbers, precision, jnp.float32, implementation=implementation)
    return y + float_dot(few, held, (((0,), (0,)), ((), ())), precision)


def _in_order(x, w: QTensor, numbers) -> tuple[Shaped[Array, "..."], Any]:
    """Both operands with their inputs in the order of the codes, which need not be known from there on.

    A product that sums over something else takes the weight dequantized, where they are put back.
    """
    ((x_axes, w_axes), (batch, _)) = numbers
    if not _sums_over_quantized_axes(w, numbers):
        return x, w
    order = w.order if w.layer is None else w.order[w.layer]
    if batch or order.ndim != 1:
        raise ValueError(
            f"{_describe(w)} has its inputs in an order of their own: it can be multiplied alone, not in "
            "a batch"
        )
    qtensor.check_inputs(w)
    axis = x_axes[w_axes.index(w.axis[0] % w.ndim)]
    return input_order.gathered(x, order, axis), w.replaced(order=None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _both_quantized(x, w: QTensor, numbers, precision) -> Float[Array, "..."]:
    assert w.activations is not None
    held = activations.input_scale(w, x.ndim, numbers[1])
    quantized = activations.quantize(x, w.activations, numbers[0][0], held)
    if quantized.group_size is not None or quantized.format.kind == "codebook":
        near = activations.dequantize(quantized).astype(x.dtype)
        return float_dot(near, qtensor.dequantize(w, x.dtype), numbers, precision)
    token_scale = _token_scale(quantized.scale, w.ndim, numbers)
    if not w.scaled_per_contraction:
        codes = quantized.codes.astype(x.dtype)
        y = float_dot(codes, qtensor.dequantize(w, x.dtype), numbers, precision)
        return y * token_scale
    scale = _beside_result(_free_scales(w), x.ndim, numbers)
    if quantized.format.kind == "float":
        # 8-bit floats are exact in bfloat16. XLA's own e4m3 product is slower for a [k, n] weight on an
        # H200 (80 and 43 us at 16 rows, 422 and 85 at 256; it transposes the weight) and on a CPU.
        codes = quantized.codes.astype(jnp.bfloat16)
        y = float_dot(codes, qtensor.centred(w, jnp.bfloat16), numbers, precision)
        return y * token_scale * scale
    # int4 is widened here: XLA has no product of int8 and int4 but a scalar loop (630 x bf16 on H200).
    # Of a single row it makes a reduction then that its Triton compiler refuses (jax 0.11.2).
    refused = jax.default_backend() == "gpu" and w.format.bits < 8
    codes, single = doubled(quantized.codes, numbers) if refused else (quantized.codes, False)
    y = lax.dot_general(codes, qtensor.unpacked(w), numbers, preferred_element_type=jnp.int32)
    return (y[:1] if single else y).astype(jnp.float32) * token_scale * scale


def _both_quantized_forward(x, w, numbers, precision):
    return _both_quantized(x, w, numbers, precision), (x, w)


def _both_quantized_backward(numbers, precision, saved, cotangent):
    """Straight through the rounding of ``x``: the gradient of the weight-only product."""
    x, w = saved
    held = activations.input_scale(w, x.ndim, numbers[1])

    def product(x, w):
        return _weight_only(activations.within_range(x, w.activations, held), w, numbers, precision)

    return jax.vjp(product, x, w)[1](cotangent)


_both_quantized.defvjp(_both_quantized_forward, _both_quantized_backward)


def _free_scales(w: QTensor) -> Float[Array, "..."]:
    """Scales in the weight's own axes, length 1 where they do not vary."""
    return tiles.spread(qtensor.scales(w), w.tile, w.shape[w.ndim - len(w.tile) :])


def _beside_result(scale, x_ndim: int, numbers) -> Float[Array, "..."]:
    """Moves a weight's scales to where its axes stand in the result: batch, x free, w free."""
    (_, contracting), (_, batch) = numbers
    free = [i for i in range(scale.ndim) if i not in contracting and i not in batch]
    scale = lax.transpose(scale, (*batch, *free, *contracting))
    x_free = x_ndim - len(contracting) - len(batch)
    lengths = scale.shape
    return scale.reshape(
        *lengths[: len(batch)], *(1,) * x_free, *lengths[len(batch) : len(batch) + len(free)]
    )


def _token_scale(scale, w_ndim: int, numbers) -> Float[Array, "..."]:
    """Moves a token's scale to where it stands in the result: batch, x free, then ones."""
    (contracting, _), (batch, _) = numbers
    free = [i for i in range(scale.ndim) if i not in contracting and i not in batch]
    scale = lax.transpose(scale, (*batch, *free, *contracting))
    w_free = w_ndim - len(contracting) - len(batch)
    return scale.reshape(*scale.shape[: len(batch) + len(free)], *(1,) * w_free)


def _normalized(numbers: DimensionNumbers, x_ndim: int, w_ndim: int) -> DimensionNumbers:
    """Dimension numbers as hashable tuples of non-negative axes."""
    contracting, batch = numbers
    ndims = x_ndim, w_ndim
    return _non_negative(contracting, ndims), _non_negative(batch, ndims)


def _non_negative(pair: Any, ndims: tuple[int, int]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(a) % n for a in axes) for axes, n in zip(pair, ndims, strict=True))


def _check_lengths(x: Any, w: Any, numbers: DimensionNumbers) -> None:
    for (x_axes, w_axes), use in zip(numbers, ("summed over", "of a batch"), strict=True):
        lengths = tuple(x.shape[i] for i in x_axes), tuple(w.shape[i] for i in w_axes)
        if lengths[0] != lengths[1]:
            raise ValueError(
                f"product of {_describe(x)} and {_describe(w)}: the axes {use} have lengths "
                f"{lengths[0]} and {lengths[1]}, but must be equally long"
            )


def _check_quantized_axes(w: QTensor, numbers: DimensionNumbers) -> None:
    if not _sums_over_quantized_axes(w, numbers):
        raise ValueError(
            f"{_describe(w)} was quantized for products over its axes {w.axis}; this one sums "
            f"over {numbers[0][1]}, so its activations cannot be quantized to match"
        )


def _sums_over_quantized_axes(w: QTensor, numbers: DimensionNumbers) -> bool:
    return {a % w.ndim for a in w.axis} == set(numbers[0][1])


def _describe(w: Any) -> str:
    name = w.format.name if isinstance(w, QTensor) else str(w.dtype)
    return f"{name}{list(w.shape)}"
