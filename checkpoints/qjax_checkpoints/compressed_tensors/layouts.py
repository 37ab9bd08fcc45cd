# SPDX-License-Identifier: Apache-2.0
"""How compressed-tensors lays out one linear layer, and the way to a QTensor and back.

The layer's weight is `[out, in]` there and `[in, out]` here. With b bits and G scales a row, the
tensors under the layer's name are

    pack-quantized        weight_packed        int32 [out, ceil(in * b / 32)]
                          weight_scale         float [out, G]
                          weight_zero_point    int32 [ceil(out * b / 32), G], asymmetric only
                          weight_shape         int64 [2], which is [out, in]
    int-quantized         weight               int8 [out, in]
                          weight_scale         float [out, G]
    float-quantized,      weight               float8_e4m3fn [out, in]
    naive-quantized       weight_scale         float [1], [out, 1] or a scale for each block
    mxfp8-quantized       weight               float8_e4m3fn [out, in]
                          weight_scale         uint8 [out, in / 32], e8m0: 2^(byte - 127)
    mxfp4-pack-quantized  weight_packed        uint8 [out, in / 2], e2m1, low nibble first
                          weight_scale         uint8 [out, in / 32], e8m0
    nvfp4-pack-quantized  weight_packed        uint8 [out, in / 2], e2m1, low nibble first
                          weight_scale         float8_e4m3fn [out, in / 16]
                          weight_global_scale  float32 [1]: the weight is *divided* by it

Where the scale of a layer's inputs is static, there is also

    any of the above      input_scale          float32 [1]

Old files whose groups are made of inputs that need not follow each other (`actorder: group`) have, too,

    pack-quantized        weight_g_idx         int32 [in], the group of each input

which is read and never written: releases of compressed-tensors and vLLM that are current have taken it
out. The codes stand in the order of the inputs there, and group by group here.

Packed integers are stored as `code + 2^(b-1)` in a dense stream of bits, least bit first: codes along
`in`, zeros along `out`. As here, `w = (code - zero) * scale`.

Packing 3 bits is not stable across releases of compressed-tensors: those before 0.19 leave the top
two bits of every word unused. The dense form of 0.19 and later is written and read here; 2, 4 and
8 bits are the same everywhere.

References:
    compressed-tensors, https://github.com/vllm-project/compressed-tensors, `compressors/`.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8, Int32, Shaped, UInt8

from pallas_kernels import packing
from qjax import formats, qtensor, tiles
from qjax.formats import Format
from qjax.qtensor import QTensor
from qjax.scheme import ActivationScheme
from qjax_checkpoints.shards import PendingTensor, pending, pending_array

PACKED_INTEGERS = "pack-quantized"
INTEGERS = "int-quantized"
FLOATS = "float-quantized"
FLOATS_WEIGHT_ONLY = "naive-quantized"
MXFP8 = "mxfp8-quantized"
MXFP4 = "mxfp4-pack-quantized"
NVFP4 = "nvfp4-pack-quantized"

_MX_GROUP = 32
_NVFP4_GROUP = 16
_CONTRACTION = (-2,)  # of a linear kernel [in, out]


def format_of(q: QTensor) -> str:
    """Returns the name of the format that holds `q`.

    Raises:
        ValueError: none does; the message says why, without naming the layer.
    """
    if q.ndim != 2 or q.axis != _CONTRACTION:
        raise ValueError("only linear layers can be held")
    if q.outliers is not None:
        raise ValueError("no format holds inputs with outliers beside the codes")
    if q.order is not None:
        raise ValueError(
            "its inputs are regrouped (weight_g_idx), which current releases and vLLM have taken out"
        )
    if q.activations is not None and q.activations.static and q.input_scale is None:
        raise ValueError(f"{q.scheme.name} needs the input scale that calibration finds")
    group = q.activations.group_size if q.activations else None
    if group is not None and q.shape[0] > group and q.shape[0] % group:
        raise ValueError(f"activation groups of {group} must divide its {q.shape[0]} inputs")
    if q.format.kind == "integer":
        return _integer_format(q)
    if q.format == formats.E4M3:
        return _float_format(q)
    if q.format == formats.E2M1:
        return _four_bit_float_format(q)
    raise ValueError(f"no format holds {q.format.name}")


def _integer_format(q: QTensor) -> str:
    group, lanes = q.tile
    if lanes != 1 and not one_scale(q):
        raise ValueError(f"no format holds integers in tiles of {group} x {lanes}")
    if q.group_size is not None and q.shape[0] % group:
        raise ValueError(f"groups of {group} must divide its {q.shape[0]} inputs")
    if q.activations is not None and q.format.bits == 8:
        return INTEGERS
    return PACKED_INTEGERS


def _float_format(q: QTensor) -> str:
    if q.scale.dtype == jnp.float8_e8m0fnu:
        if q.tile != (_MX_GROUP, 1) or q.shape[0] % _MX_GROUP:
            raise ValueError(f"e8m0 scales need whole groups of {_MX_GROUP}, it has {q.tile}")
        return MXFP8
    if not (one_scale(q) or q.tile == (q.shape[0], 1) or block_size(q) is not None):
        raise ValueError(f"no format holds e4m3 in tiles of {q.tile[0]} x {q.tile[1]}")
    return FLOATS_WEIGHT_ONLY if q.activations is None else FLOATS


def _four_bit_float_format(q: QTensor) -> str:
    group = _MX_GROUP if q.scale.dtype == jnp.float8_e8m0fnu else _NVFP4_GROUP
    if q.tile != (group, 1) or q.shape[0] % group:
        raise ValueError(f"e2m1 needs whole groups of {group}, it has {q.tile}")
    if group == _MX_GROUP:
        return MXFP4
    if q.scale.dtype != jnp.float8_e4m3fn or q.tensor_scale is None:
        raise ValueError("e2m1 in groups of 16 needs e4m3 scales under a tensor scale")
    return NVFP4


def one_scale(q: QTensor) -> bool:
    """Says whether the tile is the whole tensor, and that is not simply one column."""
    return q.tile == q.shape and q.shape[1] > 1


def block_size(q: QTensor) -> int | None:
    """Returns the side of the square blocks that share a scale; None: no such blocks.

    A block ends where its axis ends, so a tile may be shorter on an axis that is.
    """
    side = max(q.tile)
    square = all(t in (side, min(side, n)) for t, n in zip(q.tile, q.shape, strict=True))
    return side if square else None


def encode(q: QTensor) -> dict[str, PendingTensor]:
    """Returns the tensors of a layer by their suffix, to be computed when they are written.

    Integers with one scale for the whole tensor are written with equal scales a channel, because
    servers have no kernels for the former.
    """
    tensors = _of_weight(q)
    if q.input_scale is not None:
        tensors["input_scale"] = pending(_input_scale, q)
    return tensors


def _of_weight(q: QTensor) -> dict[str, PendingTensor]:
    match format_of(q):
        case "pack-quantized":
            tensors = {
                "weight_packed": pending(_packed_integers, q),
                "weight_scale": pending(_row_scales, q),
                "weight_shape": pending_array(np.array(q.shape[::-1], np.int64)),
            }
            if q.zero is not None:
                tensors["weight_zero_point"] = pending(_packed_zeros, q)
            return tensors
        case "int-quantized":
            tensors = {"weight": pending(_codes, q), "weight_scale": pending(_row_scales, q)}
            if q.zero is not None:
                tensors["weight_zero_point"] = pending(_row_zeros, q)
            return tensors
        case "float-quantized" | "naive-quantized":
            scale = _only_scale if one_scale(q) else _scales
            return {"weight": pending(_codes, q), "weight_scale": pending(scale, q)}
        case "mxfp8-quantized":
            return {"weight": pending(_codes, q), "weight_scale": pending(_scale_bytes, q)}
        case "mxfp4-pack-quantized":
            return {
                "weight_packed": pending(_packed_nibbles, q),
                "weight_scale": pending(_scale_bytes, q),
            }
        case "nvfp4-pack-quantized":
            return {
                "weight_packed": pending(_packed_nibbles, q),
                "weight_scale": pending(_scales, q),
                "weight_global_scale": pending(_divisor, q),
            }
        case other:
            raise AssertionError(other)


def pack_rows(codes: Int8[Array, "rows n"], bits: int) -> Int32[Array, "rows words"]:
    """Packs each row densely into int32 words, least bit first, as `code + 2^(bits-1)`.

    Example:
        >>> hex(pack_rows(jnp.array([[-8, 0, 7]], jnp.int8), 4)[0, 0])
        '0xf80'
    """
    unsigned = (codes.astype(jnp.int32) + 2 ** (bits - 1)).astype(jnp.uint8)
    octets = unsigned if bits == 8 else packing.pack(unsigned, bits)
    octets = jnp.pad(octets, [(0, 0), (0, -octets.shape[1] % 4)])
    return jax.lax.bitcast_convert_type(octets.reshape(octets.shape[0], -1, 4), jnp.int32)


def unpack_rows(words: Int32[Array, "rows words"], bits: int, n: int) -> Int8[Array, "rows n"]:
    """Inverse of `pack_rows`, for rows of `n` codes."""
    octets = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(words.shape[0], -1)
    if bits == 8:
        unsigned = octets[:, :n]
    else:
        octets = octets[:, : packing.packed_length(n, bits)]
        unsigned = packing.unpack(octets, bits, n, signed=False)
    return (unsigned.astype(jnp.int32) - 2 ** (bits - 1)).astype(jnp.int8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """What the tensors of a layer do not say of themselves.

    Attributes:
        format: of the codes.
        shape: `(in, out)`, as the model has it.
        tile: tile length for each axis of `shape`.
        symmetric: whether there are no zeros.
        dtype: the logical dtype.
        activations: how the layer's input is quantized.
    """

    format: Format
    shape: tuple[int, int]
    tile: tuple[int, int]
    symmetric: bool
    dtype: np.dtype
    activations: ActivationScheme | None

    def code_dtype(self, suffix: str) -> np.dtype:
        """Returns the dtype of the codes in `weight` or in `weight_packed`."""
        if suffix == "weight":
            return np.dtype(jnp.dtype(self.format.dtype))
        return np.dtype(np.uint8 if self.format == formats.E2M1 else np.int32)

    def stored_shape(self, suffix: str, dtype: np.dtype) -> tuple[int, ...]:
        """Returns the shape that one of the layer's tensors must have, scales in two axes.

        Args:
            suffix: which tensor.
            dtype: of the tensor; zeros that are int32 are packed.
        """
        rows, columns = self.shape[::-1]
        counts = tiles.counts(self.shape, self.tile)[::-1]
        match suffix:
            case "weight_packed" if self.format == formats.E2M1:
                return (rows, packing.packed_length(columns, 4))
            case "weight_packed":
                return (rows, _words(columns, self.format.bits))
            case "weight_zero_point" if dtype == np.int32:
                return (_words(counts[0], self.format.bits), counts[1])
            case "weight_scale" | "weight_zero_point":
                return counts
            case "weight_global_scale" | "input_scale":
                return (1,)
            case "weight_g_idx":
                return (columns,)
            case _:
                return (rows, columns)


def _words(count: int, bits: int) -> int:
    """How many int32 words hold a packed row."""
    return -(-count * bits // 32)


@functools.partial(jax.jit, static_argnames="spec")
def decode(tensors: Mapping[str, Shaped[Array, "..."]], spec: LayerSpec) -> QTensor:
    """Returns the QTensor that a layer's tensors hold; the inverse of `encode`.

    Args:
        tensors: the layer's by suffix, in the shapes of `spec.stored_shape`; which of `weight_packed`
            and `weight` is there tells the layout.
        spec: everything else.
    """
    rows, columns = spec.shape[::-1]
    if "weight" in tensors:
        codes = tensors["weight"]
    elif spec.format == formats.E2M1:
        codes = packing.unpack(tensors["weight_packed"], 4, columns, signed=False)
    else:
        codes = unpack_rows(tensors["weight_packed"], spec.format.bits, columns)
    scale = tensors["weight_scale"].T
    if scale.dtype == jnp.uint8:
        scale = jax.lax.bitcast_convert_type(scale, jnp.float8_e8m0fnu)
    zero = None
    if not spec.symmetric:
        zero = tensors["weight_zero_point"].T
        if zero.dtype == jnp.int32:
            zero = unpack_rows(zero, spec.format.bits, rows)
    codes, order = codes.T, None
    if "weight_g_idx" in tensors:
        order = jnp.argsort(tensors["weight_g_idx"], stable=True).astype(jnp.int32)
        codes = codes[order]
    divisor = tensors.get("weight_global_scale")
    input_scale = tensors.get("input_scale")
    q = QTensor.from_codes(
        codes,
        scale,
        zero,
        None if divisor is None else 1 / divisor.reshape(()),
        order=order,
        format=spec.format,
        axis=_CONTRACTION,
        tile=spec.tile,
        dtype=spec.dtype,
        activations=spec.activations,
    )
    if input_scale is None:
        return q
    return q.replaced(input_scale=input_scale.reshape(()).astype(jnp.float32))


def _codes(q: QTensor) -> Shaped[Array, "out in"]:
    return qtensor.unpacked(q).T


def _packed_integers(q: QTensor) -> Int32[Array, "out words"]:
    return pack_rows(qtensor.unpacked(q).T, q.format.bits)


def _packed_nibbles(q: QTensor) -> UInt8[Array, "out bytes"]:
    return packing.pack(qtensor.unpacked(q).T, 4)


def _scales(q: QTensor) -> Shaped[Array, "rows G"]:
    return q.scale.T


def _row_scales(q: QTensor) -> Shaped[Array, "out G"]:
    return jnp.broadcast_to(q.scale.T, (q.shape[1], q.scale.shape[0]))


def _row_zeros(q: QTensor) -> Int8[Array, "out G"]:
    return jnp.broadcast_to(q.zero.T, (q.shape[1], q.zero.shape[0]))


def _packed_zeros(q: QTensor) -> Int32[Array, "words G"]:
    return pack_rows(_row_zeros(q).T, q.format.bits).T


def _only_scale(q: QTensor) -> Shaped[Array, " one"]:
    return q.scale.reshape(1)


def _input_scale(q: QTensor) -> Float[Array, " one"]:
    return q.input_scale.reshape(1)


def _scale_bytes(q: QTensor) -> UInt8[Array, "out G"]:
    return jax.lax.bitcast_convert_type(q.scale.T, jnp.uint8)


def _divisor(q: QTensor) -> Float[Array, " one"]:
    return (1 / q.tensor_scale).reshape(1)
