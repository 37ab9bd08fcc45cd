# SPDX-License-Identifier: Apache-2.0
"""QTensor: an array held in few bits, as a value that JAX knows.

    w  ~  (codes - zero) * scale            (* tensor_scale, where the scales are themselves e4m3)

One scale serves one *tile*. The tile has a length for each axis: ``(128, 1)`` on an ``[in, out]``
kernel is a group of 128 along the contraction, ``(in, 1)`` one scale an output channel, ``(in, out)``
one for the tensor, ``(128, 128)`` a block. Tiles are runs of the codes; where these have their inputs in
an order of their own, that order is stored too (:mod:`qjax.input_order`).
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels import packing, product, quantized_matmul, row_blocks
from pallas_kernels.machine import Half
from pallas_kernels.operands import Weights
from qjax import formats, input_order, outliers, tiles
from qjax.formats import Format, device_bytes
from qjax.scheme import ActivationScheme, ScaleFormat, Scheme, WeightScheme


@dataclass(frozen=True, kw_only=True)
class KernelLayout:
    """Leaves arranged for a kernel: :mod:`pallas_kernels.row_blocks`.

    Attributes:
      tokens: dtype that the kernel multiplies with.
      scale_dtype: of the scales in the plain arrangement, and of pairs.
      pairs: whether scales are pairs of 16 bits; else float32, as the class describes them.
      version: of the arrangement.
    """

    tokens: product.Tokens
    scale_dtype: str
    pairs: bool
    version: int = row_blocks.VERSION


# How a scheme calls the dtypes of scales that are not simply floats.
SCALE_FORMATS: dict[str, ScaleFormat] = {"float8_e8m0fnu": "e8m0", "float8_e4m3fn": "e4m3"}

_SMALL = 2**20  # elements, see readable: a copy of so many takes no time worth mentioning

_LEAVES = (
    "codes", "scale", "zero", "tensor_scale", "input_scale", "order", "columns", "outliers", "layer",
)  # fmt: skip


@jax.tree_util.register_pytree_with_keys_class
class QTensor:
    """An array in few bits: codes and scales as leaves, everything else static.

    It passes through jit, scan, vmap, grad, eval_shape, shard_map, tree.map and checkpoints like a
    dict of arrays would. Axes stacked in front of the leaves (scanned layers, vmap) are leading axes
    of the logical array too.

    Attributes:
      codes: as stored (``format.storage``): int8, int4, an 8-bit float, or bytes packed along the
        last axis (:mod:`pallas_kernels.packing`).
      scale: one entry a tile; the logical dtype, or float8_e8m0fnu (mx), or float8_e4m3fn (nvfp4).
      zero: int8, one entry a tile; None when symmetric.
      tensor_scale: float32 scalar over e4m3 scales; else None.
      input_scale: float32 scalar, of all activations, where their scheme is static; None before
        calibration has found it (:func:`qjax.activations.static_scale`), or where it is not.
      order: int32, one entry an input: which one stands at each place of the codes along the contraction
        axis, of which there is one then; None: they stand as they are. Codes, scale and zero are in this
        order; the logical array, columns and outliers are not.
      columns: int32, numbers of the inputs that are held as they are, as :mod:`qjax.outliers` counts
        them, over the whole axis; None: no input is.
      outliers: the weights of those inputs, ``[columns, ...]``, whatever their codes say. A product takes
        these inputs by themselves, not quantized.
      format: what the codes mean.
      axis: the contraction axes, counted from the end.
      activations: how the other operand of a product is quantized; None leaves it as it is.
      layer: which of stacked layers this array is, whose leaves are those of all of them; None: all.
        Only arranged weights have one: :func:`qjax.scan_layers`.
      layout: how codes, scale and zero are arranged; None: as described here.
        :func:`qjax.kernel_layout.for_kernel` and :func:`plain` go from one to the other.
    """

    __slots__ = (
        "_dtype", "_shape", "_tile", "activations", "axis", "codes", "columns", "format",
        "input_scale", "layer", "layout", "order", "outliers", "scale", "tensor_scale", "zero",
    )  # fmt: skip

    # The leaves are Any on purpose: under transformations JAX puts tracers, shapes or plain
    # objects in their place.
    codes: Any
    scale: Any
    zero: Any
    tensor_scale: Any
    input_scale: Any
    order: Any
    columns: Any
    outliers: Any
    layer: Any
    format: Format
    axis: tuple[int, ...]
    activations: ActivationScheme | None
    layout: KernelLayout | None

    def __init__(
        self,
        *,
        codes: Any,
        scale: Any,
        zero: Any = None,
        tensor_scale: Any = None,
        input_scale: Any = None,
        order: Any = None,
        columns: Any = None,
        outliers: Any = None,
        layer: Any = None,
        format: Format,
        axis: tuple[int, ...],
        tile: tuple[int, ...],
        shape: tuple[int, ...],
        dtype: Any,
        activations: ActivationScheme | None = None,
        layout: KernelLayout | None = None,
    ):
        """Holds codes that are already stored (packed); :meth:`from_codes` takes plain ones.

        Args:
          codes: as stored; nothing is checked, for JAX rebuilds QTensors around its own leaves.
          scale: one entry a tile.
          zero: one entry a tile, or None.
          tensor_scale: scalar, or None.
          input_scale: scalar, or None.
          order: the input at each place, or None.
          columns: numbers of inputs, or None.
          outliers: their weights, or None.
          layer: int32 scalar, or None.
          format: what the codes mean.
          axis: contraction axes, counted from the end.
          tile: tile length for each axis of ``shape``.
          shape: logical shape without stacked leading axes.
          dtype: logical dtype: what :func:`dequantize` gives.
          activations: how the other operand of a product is quantized.
          layout: how the leaves are arranged.
        """
        self.codes, self.scale, self.zero, self.tensor_scale = codes, scale, zero, tensor_scale
        self.columns, self.outliers, self.layer = columns, outliers, layer
        self.input_scale, self.order = input_scale, order
        self.format, self.axis, self.activations = format, axis, activations
        self.layout = layout
        self._shape, self._tile, self._dtype = tuple(shape), tuple(tile), jnp.dtype(dtype)

    @staticmethod
    def from_codes(
        codes: Shaped[Array, "..."],
        scale: Shaped[Array, "..."],
        zero: Shaped[Array, "..."] | None = None,
        tensor_scale: Float[Array, ""] | None = None,
        *,
        order: Int[Array, " k"] | None = None,
        format: Format,
        axis: tuple[int, ...],
        tile: tuple[int, ...],
        dtype: Any,
        activations: ActivationScheme | None = None,
    ) -> "QTensor":
        """Stores plain codes, below 8 bits several to a byte.

        Args:
          codes: logical shape; int8 (integers, or indices of a codebook) or an 8-bit float; inputs in the
            order given.
          scale: ``ceil(shape / tile)`` entries.
          zero: the same shape, int8; None when symmetric.
          tensor_scale: scalar over e4m3 scales, else None.
          order: the input at each place, each once; None: as they are.
          format: what the codes mean.
          axis: contraction axes.
          tile: tile length for each axis.
          dtype: logical dtype.
          activations: how the other operand of a product is quantized.

        Raises:
          ValueError: scale or zero do not have one entry a tile, or the order not one an input of a
            single axis.
        """
        expected = tiles.counts(codes.shape, tile)
        for name, array in (("scale", scale), ("zero", zero)):
            if array is not None and array.shape != expected:
                raise ValueError(
                    f"{name} has shape {array.shape}; codes {codes.shape} in tiles {tile} "
                    f"need {expected}"
                )
        if order is not None:
            input_order.check_axes(axis)
            if order.shape != (codes.shape[axis[0]],):
                raise ValueError(
                    f"order has shape {order.shape}; there are {codes.shape[axis[0]]} inputs"
                )
        stored = packing.pack(codes, format.bits) if format.packed else codes.astype(format.storage)
        return QTensor(
            codes=stored,
            scale=scale,
            zero=zero,
            tensor_scale=tensor_scale,
            order=order,
            format=format,
            axis=tuple(a if a < 0 else a - codes.ndim for a in axis),
            tile=tuple(tile),
            shape=codes.shape,
            dtype=dtype,
            activations=activations,
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the logical array, read off the codes: of all layers, one layer or one shard."""
        if self.layout is not None:
            *leading, blocks, tiles_ = self.codes.shape[: -3 if self.format.bits == 8 else -2]
            leading = leading if self.layer is None else leading[1:]
            return (*leading, tiles_ * row_blocks.COLUMNS, blocks * row_blocks.ROWS)
        *leading, last = self.codes.shape
        if self.format.packed:
            # The bytes of a row may hold fewer codes than fit; a shard of a row is whole bytes.
            row = packing.packed_length(self._shape[-1], self.format.bits)
            last = self._shape[-1] if last == row else last * 8 // self.format.bits
        return (*leading, last)

    @property
    def tile(self) -> tuple[int, ...]:
        """Tile length for each of the last axes; all of the array's, unless layers are stacked."""
        return self._tile[max(0, len(self._tile) - self.ndim) :]

    @property
    def dtype(self) -> Any:
        """Dtype of the logical array."""
        return self._dtype

    @property
    def ndim(self) -> int:
        """Number of axes of the logical array."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements of the logical array."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that the device holds: codes, scales, zeros; two int4 codes to a byte.

        Of a layer that is looked at in the arrays of all layers: what is its own. The arrays take
        :func:`qjax.formats.device_bytes`.
        """
        if self.layer is None:
            return device_bytes(self)
        return device_bytes(self.replaced(layer=None)) // self.codes.shape[0]

    @property
    def bits_per_weight(self) -> float:
        """Stored bits an element, scales and zeros included."""
        return 8 * self.nbytes / self.size

    @property
    def group_size(self) -> int | None:
        """Elements of the last contraction axis that share a scale; None when all of them do."""
        length, tile = self.shape[self.axis[-1]], self.tile[self.axis[-1]]
        return None if tile >= length else tile

    @property
    def scheme(self) -> Scheme:
        """The scheme that this array is held and multiplied by; read off the tile and the dtypes."""
        shape, ndim = _tiled_shape(self), len(self.tile)
        contracted = {a % ndim for a in self.axis}
        whole = {i for i in range(ndim) if self.tile[i] == shape[i]}
        cut = [i for i in range(ndim) if i not in whole and self.tile[i] > 1]
        granularity, group_size = "channel", None
        scale_format = SCALE_FORMATS.get(str(self.scale.dtype), "float")
        grouped = self.activations.group_size if self.activations else None
        if grouped is not None and self.format.kind == "float" and scale_format == "float":
            # The blocks of a small weight may cover a whole axis and look like channels.
            granularity, group_size = "block", grouped
        elif any(i not in contracted and self.tile[i] > 1 for i in cut):
            granularity, group_size = "block", max(self.tile[i] for i in cut)
        elif contracted - whole:
            granularity, group_size = "group", self.tile[self.axis[-1]]
        elif len(whole) == ndim:
            granularity = "tensor"
        weights = WeightScheme(
            format=self.format,
            granularity=granularity,
            group_size=group_size,
            symmetric=self.zero is None,
            scale_format=scale_format,
        )
        return Scheme(weights=weights, activations=self.activations)

    @property
    def scaled_per_contraction(self) -> bool:
        """Whether one scale covers everything that a product sums over."""
        return all(self.tile[a] >= self.shape[a] for a in self.axis)

    def astype(self, dtype: Any) -> "QTensor":
        """The same codes and scales, standing for an array of another logical dtype."""
        result = self.replaced()
        result._dtype = jnp.dtype(dtype)
        return result

    def replaced(self, **leaves: Any) -> "QTensor":
        """The same with other leaves."""
        present, static = self.tree_flatten_with_keys()
        if unknown := leaves.keys() - {key.name for key, _ in present}:
            raise TypeError(f"a QTensor has no leaf {', '.join(sorted(unknown))}")
        return QTensor.tree_unflatten(static, [leaves.get(key.name, leaf) for key, leaf in present])

    def __getitem__(self, index: Any) -> "QTensor":
        """``q[...]`` is ``q``: Flax reads its parameters so. No other index is possible."""
        if index is Ellipsis:
            return self
        raise TypeError(f"a QTensor can only be read whole, q[...]; got index {index!r}")

    def __repr__(self) -> str:
        """Format, logical shape and tile; the stored shape where the leaves are no arrays."""
        shape = self.shape if hasattr(self.codes, "shape") else self._shape
        return f"QTensor({self.format.name}, shape={shape}, tile={self._tile})"

    def tree_flatten_with_keys(self):
        """Leaves with their names, and everything static."""
        leaves = tuple((jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in _LEAVES)
        return leaves, (
            self.format, self.axis, self._tile, self._shape, self._dtype, self.activations,
            self.layout,
        )  # fmt: skip

    @classmethod
    def tree_unflatten(cls, static, leaves):
        """Inverse of :meth:`tree_flatten_with_keys`; takes any leaves."""
        format, axis, tile, shape, dtype, activations, layout = static
        return cls(
            **dict(zip(_LEAVES, leaves, strict=True)), format=format, axis=axis, tile=tile, shape=shape,
            dtype=dtype, activations=activations, layout=layout,
        )  # fmt: skip


def plain(q: QTensor) -> QTensor:
    """The same weight with its leaves as the class describes them.

    The inverse of :func:`qjax.kernel_layout.for_kernel`.
    """
    if q.layout is None:
        return q
    q = _taken(q)
    assert q.layout is not None
    weights, dtype = cast(Weights, q.format.storage), jnp.dtype(q.layout.scale_dtype)
    codes = quantized_matmul.plain_codes(q.codes, weights).astype(q.format.storage)
    scale, zero = q.scale, q.zero
    if q.layout.pairs:
        # The other way round: of as many equal ones as there are outputs the tensor keeps one.
        held = slice(None) if q.tile[-1] == 1 else slice(1)
        if zero is not None:
            half = cast(Half, q.layout.tokens)
            zero = quantized_matmul.unpack_zeros(zero, half, weights)[..., held]
        scale = row_blocks.untile_pairs(scale, dtype)[..., held]
    else:
        scale = scale.astype(dtype)
    result = q.replaced(codes=codes, scale=scale, zero=zero)
    result.layout = None
    return result


def _taken(q: QTensor) -> QTensor:
    """A layer by itself: its leaves are copied out of those of all layers."""
    if q.layer is None:
        return q
    leaves = {name: getattr(q, name) for name in _LEAVES if name != "layer"}
    return q.replaced(**jax.tree.map(lambda leaf: leaf[q.layer], leaves), layer=None)


def readable(q: QTensor) -> Shaped[Array, "..."]:
    """The codes as they are stored, for a program to compute with.

    Codes are no numbers to train, but JAX would give 8-bit floats a gradient: these have none.

    XLA on a GPU reads int4 wrong where it makes one kernel of a small product and its weight: with
    [32, 32], [32, 48] and [64, 32] every other output was zero, by what its tuner happened to choose;
    with [64, 64] and larger weights none was (one NVIDIA H200, jax 0.11.2, 2026-11-28). So the codes of
    small weights are widened in a kernel of their own there.
    """
    codes = jax.lax.stop_gradient(q.codes)
    if codes.dtype != jnp.int4 or q.size >= _SMALL or jax.default_backend() != "gpu":
        return codes
    return jax.lax.optimization_barrier(codes.astype(jnp.int8))


def unpacked(q: QTensor) -> Shaped[Array, "..."]:
    """The codes in the logical shape, inputs as they are stored: int8, or an 8-bit float."""
    q = plain(q)
    if not q.format.packed:
        return readable(q).astype(q.format.dtype)
    return packing.unpack(q.codes, q.format.bits, q.shape[-1], signed=q.format.signed)


def centred(q: QTensor, dtype: Any = jnp.float32) -> Float[Array, "..."]:
    """``codes - zero`` as values of a float dtype; exact in bfloat16 too for every format but nf4.

    Inputs stand as they are stored, in the order of the QTensor if it has one.
    """
    q = plain(q)
    if q.zero is None and q.format.kind != "codebook":
        # One conversion straight from the stored type: XLA fuses it into a dot, a chain it may not.
        codes = unpacked(q) if q.format.packed else readable(q)
        return codes.astype(dtype)
    values = formats.decode(unpacked(q), q.format)
    if q.zero is not None:
        values = values - tiles.spread(q.zero, q.tile, _tiled_shape(q)).astype(jnp.float32)
    return values.astype(dtype)


def scales(q: QTensor) -> Float[Array, "..."]:
    """The float32 factor of each tile: ``scale * tensor_scale``."""
    q = plain(q)
    factor = q.scale.astype(jnp.float32)
    if q.tensor_scale is None:
        return factor
    return factor * q.tensor_scale.reshape(q.tensor_scale.shape + (1,) * len(q.tile))


def dequantize(q: QTensor, dtype: Any = None) -> Float[Array, "..."]:
    """The array that the codes stand for: ``(codes - zero) * scale``; outliers as they are.

    Inputs that are stored in an order of their own are put back.

    Args:
      q: the quantized array.
      dtype: of the result; the logical dtype if None. The product is taken in float32 and rounded
        once.

    Raises:
      ValueError: a part of such inputs, as a shard of them is.

    Example:
      >>> codes = jnp.array([[1, -2], [3, 4]], jnp.int8)
      >>> q = QTensor.from_codes(codes, jnp.array([[0.5, 2.0]]), format=formats.INT4, axis=(-2,),
      ...                        tile=(2, 1), dtype=jnp.float32)
      >>> dequantize(q).tolist()
      [[0.5, -4.0], [1.5, 8.0]]
    """
    factor = tiles.spread(scales(q), q.tile, _tiled_shape(q))
    near = (centred(q) * factor).astype(q.dtype if dtype is None else dtype)
    if q.order is None and q.outliers is None:
        return near
    q = _taken(q)
    if q.order is not None:
        check_inputs(q)
        back = functools.partial(input_order.put_back, axis=q.axis[0])
        for _ in range(q.order.ndim - 1):
            back = jax.vmap(back)
        near = back(near, q.order)
    if q.outliers is None:
        return near
    place = functools.partial(outliers.joined, axes=q.axis)
    for _ in range(q.columns.ndim - 1):
        place = jax.vmap(place)
    return place(near, q.columns, q.outliers)


def check_inputs(q: QTensor) -> None:
    """Checks that inputs which stand in an order of their own are all there.

    Raises:
      ValueError: the codes or the order are cut along them, as by ``jax.shard_map``.
    """
    (axis,), held = q.axis, q.order.shape[-1]
    k, codes = q._shape[axis], q.shape[axis]
    if not k == held == codes:
        raise ValueError(
            f"{q.format.name}{list(q._shape)} has its {k} inputs in an order of their own and can be cut "
            f"along its outputs alone; this part has {codes} of the inputs, and {held} of their order"
        )


def _tiled_shape(q: QTensor) -> tuple[int, ...]:
    return q.shape[q.ndim - len(q.tile) :]
