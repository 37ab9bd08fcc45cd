# SPDX-License-Identifier: Apache-2.0
"""Sub-byte codes as bytes: a dense bit stream along the last axis, least significant bit first.

Code ``i`` of a row occupies bits ``[i * bits, (i + 1) * bits)`` of that row; each row is padded to
whole bytes. So two 4-bit codes share a byte with the first in the low nibble, four 2-bit codes share
one, and eight 3-bit codes fill three bytes with nothing left over. It is the order in which XLA
itself stores int4 and int2, so those unpack by a bitcast that costs nothing on the device.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int8, Integer, UInt8

# What XLA can reinterpret bytes as; 3-bit codes cross byte borders and are shifted out by hand.
_NATIVE = {(2, True): jnp.int2, (2, False): jnp.uint2, (4, True): jnp.int4, (4, False): jnp.uint4}


def packed_length(n: int, bits: int) -> int:
    """Bytes that hold a row of ``n`` codes: ``ceil(n * bits / 8)``.

    >>> packed_length(5, 3)
    2
    """
    return -(-n * bits // 8)


def pack(codes: Integer[Array, "*batch n"], bits: int) -> UInt8[Array, "*batch bytes"]:
    """Packs the low ``bits`` bits of each code, ``ceil(n * bits / 8)`` bytes a row.

    Args:
      codes: signed or unsigned integers; only their low ``bits`` bits are kept.
      bits: 2, 3 or 4.

    Returns:
      Bytes along the last axis; the bits beyond code ``n`` are zero.

    Raises:
      ValueError: ``bits`` is not 2, 3 or 4.

    Example:
      >>> pack(jnp.array([1, 2, 3], jnp.int8), 4).tolist()
      [33, 3]
    """
    codes_per_word, bytes_per_word = _word(bits)
    n = codes.shape[-1]
    fields = codes.astype(jnp.uint32) & (2**bits - 1)
    fields = _pad_last(fields, codes_per_word)
    fields = _split_last(fields, codes_per_word)
    # The fields of a word do not overlap, so their sum is their bitwise or.
    word = jnp.sum(fields << (bits * jnp.arange(codes_per_word, dtype=jnp.uint32)), axis=-1)
    word = word.astype(jnp.uint32)[..., None]
    octets = (word >> (8 * jnp.arange(bytes_per_word, dtype=jnp.uint32))) & 0xFF
    return _merge_last(octets.astype(jnp.uint8))[..., : packed_length(n, bits)]


def unpack(
    packed: UInt8[Array, "*batch bytes"], bits: int, n: int, *, signed: bool
) -> Integer[Array, "*batch n"]:
    """Inverse of :func:`pack`.

    Args:
      packed: bytes as :func:`pack` lays them out.
      bits: 2, 3 or 4.
      n: codes in a row.
      signed: whether a code is two's complement (int2, int3, int4) or an index (nf4, e2m1).

    Returns:
      int8 codes.

    Raises:
      ValueError: ``bits`` is not 2, 3 or 4, or the rows do not have ``ceil(n * bits / 8)`` bytes.

    Example:
      >>> unpack(jnp.array([33, 15], jnp.uint8), 4, 3, signed=True).tolist()
      [1, 2, -1]
    """
    _word(bits)
    if packed.shape[-1] != packed_length(n, bits):
        raise ValueError(
            f"{n} codes of {bits} bits take {packed_length(n, bits)} bytes, got {packed.shape[-1]}"
        )
    if (bits, signed) in _NATIVE:
        # XLA folds this bitcast of a constant wrongly (openxla/xla issue 38964, jax 0.10.2): without
        # the barrier a jitted function that closes over packed codes would compute with others.
        packed = jax.lax.optimization_barrier(packed)
        fields = jax.lax.bitcast_convert_type(packed, _NATIVE[bits, signed])
        return _merge_last(fields)[..., :n].astype(jnp.int8)
    return _shift_out(packed, bits, signed)[..., :n]


def _shift_out(
    packed: UInt8[Array, "*batch bytes"], bits: int, signed: bool
) -> Int8[Array, "*batch padded"]:
    codes_per_word, bytes_per_word = _word(bits)
    octets = _pad_last(packed.astype(jnp.uint32), bytes_per_word)
    octets = _split_last(octets, bytes_per_word)
    word = jnp.sum(octets << (8 * jnp.arange(bytes_per_word, dtype=jnp.uint32)), axis=-1)
    word = word.astype(jnp.uint32)[..., None]
    fields = (word >> (bits * jnp.arange(codes_per_word, dtype=jnp.uint32))) & (2**bits - 1)
    fields = _merge_last(fields.astype(jnp.int8))
    sign_bit = 2 ** (bits - 1)
    return (fields ^ sign_bit) - sign_bit if signed else fields


def _word(bits: int) -> tuple[int, int]:
    """Codes and bytes of the smallest run in which both come out whole."""
    if bits not in (2, 3, 4):
        raise ValueError(f"codes of 2, 3 or 4 bits can be packed, got {bits=}")
    common = math.gcd(bits, 8)
    return 8 // common, bits // common


def _split_last(x: Array, length: int) -> Array:
    return x.reshape(*x.shape[:-1], x.shape[-1] // length, length)


def _merge_last(x: Array) -> Array:
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def _pad_last(x: Array, multiple: int) -> Array:
    missing = -x.shape[-1] % multiple
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
