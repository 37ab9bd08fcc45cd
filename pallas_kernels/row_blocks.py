# SPDX-License-Identifier: Apache-2.0
"""The layouts in which weights stream from memory into tensor-core registers.

A weight ``[k, n]`` is cut into blocks of 16 outputs x 64 inputs. Their codes lie together, 16 bytes for
each lane of a warp, read in one instruction, and those are the lane's part of the A operand of
tensor-core products (``mma``, or ``wgmma``, whose A operand lies in the same registers). Blocks of the
same outputs follow one another along ``k``, so a warp reads straight on.

int4: a block is 512 bytes, for four ``mma.m16n8k16``. Lane ``4 g + c`` holds word ``2 h + j`` (h, j in 0,
1), and nibble ``i + 4 e`` of that word, with ``i = 2 p + r``, is the code of

    output  16 b + 8 r + g          input  64 t + 32 h + 8 c + 4 j + 2 p + e

A word unpacks with a shift and a mask for each *pair* of weights, because the two halves of a 32-bit
register are four nibbles apart. Codes are stored unsigned, ``code + 8``.

8 bits: a block is two halves s of 512 bytes, each for one ``mma.m16n8k32`` of 8-bit operands or two
``mma.m16n8k16`` (p = 0, 1) of 16-bit ones. Lane ``4 g + c`` holds word ``2 p + r`` (p, r in 0, 1) of each
half, and byte ``e`` of that word is the code, bit by bit as its dtype has it, of

    output  16 b + 8 r + g          input  64 t + 16 c + 8 s + 4 p + e

The tensor core fixes which *row* an element belongs to; which inputs meet in one instruction is free,
as long as activations follow the same order. These orders give each lane neighbouring inputs of a token,
8 or 16 of them: 16-byte loads.

Scales and zeros are stored for output pairs, the halves of one word: output ``16 b + g`` in the low one,
``16 b + 8 + g`` in the high one.

``VERSION`` changes with the layouts; arrays of another version cannot be mixed up, for a QTensor names
it.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int8, Integer, Shaped, UInt32

VERSION = 1
ROWS, COLUMNS = 16, 64  # outputs and inputs of a block
LANES, WORDS = 32, 4  # of 32 bits, for each lane of a warp


def fits(k: int, n: int) -> bool:
    """Whether a ``[k, n]`` weight consists of whole blocks."""
    return k % COLUMNS == 0 and n % ROWS == 0


def tile_codes(codes: Integer[Array, "*layers k n"]) -> UInt32[Array, "*layers blocks tiles 32 4"]:
    """Puts int4 codes into row blocks.

    Args:
      codes: -8 to 7, of any integer dtype.

    Raises:
      ValueError: the weight does not consist of whole blocks.

    Example:
      >>> tile_codes(jnp.zeros((64, 32), jnp.int8)).shape
      (2, 1, 32, 4)
    """
    *layers, k, n = _whole_blocks(codes.shape)
    unsigned = (codes.astype(jnp.int8) + 8).astype(jnp.uint32)
    #                          k: t        h  c  j  p  e   n: b         r  g
    axes = unsigned.reshape(*layers, k // 64, 2, 4, 2, 2, 2, n // 16, 2, 8)
    shifts = 4 * (2 * _along(2, 4) + _along(2, 1) + 4 * _along(2, 3))  # p, r, e
    words = jnp.sum(axes << shifts, axis=(-5, -4, -2), dtype=jnp.uint32)  # t h c j b g
    first = len(layers)
    order = (4, 0, 5, 2, 1, 3)  # b t g c h j
    words = jnp.transpose(words, (*range(first), *(first + i for i in order)))
    return words.reshape(*layers, n // 16, k // 64, LANES, WORDS)


def untile_codes(words: UInt32[Array, "*layers blocks tiles 32 4"]) -> Int8[Array, "*layers k n"]:
    """Inverse of :func:`tile_codes`."""
    *layers, blocks, tiles, _, _ = words.shape
    first = len(layers)
    axes = words.reshape(*layers, blocks, tiles, 8, 4, 2, 2)  # b t g c h j
    order = (1, 4, 3, 5, 0, 2)  # t h c j b g
    axes = jnp.transpose(axes, (*range(first), *(first + i for i in order)))
    axes = axes[..., None, None, :, None, :]  # t h c j p e b r g
    shifts = 4 * (2 * _along(2, 4) + _along(2, 1) + 4 * _along(2, 3))
    nibbles = (axes >> shifts) & jnp.uint32(15)
    return (nibbles.astype(jnp.int8) - 8).reshape(*layers, tiles * 64, blocks * 16)


def tile_bytes(
    codes: Shaped[Array, "*layers k n"],
) -> UInt32[Array, "*layers blocks tiles 2 32 4"]:
    """Puts 8-bit codes into row blocks, bit by bit as they are.

    Args:
      codes: int8 or float8_e4m3fn.

    Raises:
      ValueError: the weight does not consist of whole blocks.

    Example:
      >>> tile_bytes(jnp.zeros((64, 32), jnp.int8)).shape
      (2, 1, 2, 32, 4)
    """
    *layers, k, n = _whole_blocks(codes.shape)
    bits = lax.bitcast_convert_type(codes, jnp.uint8)
    #                      k: t        c  s  p  e   n: b         r  g
    axes = bits.reshape(*layers, k // 64, 4, 2, 2, 4, n // 16, 2, 8)
    first = len(layers)
    order = (5, 0, 2, 7, 1, 3, 6, 4)  # b t s g c p r e
    axes = jnp.transpose(axes, (*range(first), *(first + i for i in order)))
    words = lax.bitcast_convert_type(axes, jnp.uint32)  # the byte 0 is the lowest
    return words.reshape(*layers, n // 16, k // 64, 2, LANES, WORDS)


def untile_bytes(
    words: UInt32[Array, "*layers blocks tiles 2 32 4"], dtype: Any
) -> Shaped[Array, "*layers k n"]:
    """Inverse of :func:`tile_bytes`, for codes of an 8-bit dtype."""
    *layers, blocks, tiles, _, _, _ = words.shape
    bits = lax.bitcast_convert_type(words, jnp.uint8)
    axes = bits.reshape(*layers, blocks, tiles, 2, 8, 4, 2, 2, 4)  # b t s g c p r e
    first = len(layers)
    order = (1, 4, 2, 5, 7, 0, 6, 3)  # t c s p e b r g
    axes = jnp.transpose(axes, (*range(first), *(first + i for i in order)))
    return lax.bitcast_convert_type(axes.reshape(*layers, tiles * 64, blocks * 16), dtype)


def tile_pairs(
    values: Shaped[Array, "*layers groups n"],
) -> UInt32[Array, "*layers blocks groups 8"]:
    """Puts 16-bit values, one for each group of inputs and output, two into a word.

    >>> tile_pairs(jnp.ones((3, 32), jnp.bfloat16)).shape
    (2, 3, 8)
    """
    *layers, groups, n = values.shape
    bits = lax.bitcast_convert_type(values, jnp.uint16).astype(jnp.uint32)
    bits = bits.reshape(*layers, groups, n // 16, 2, 8)
    return jnp.swapaxes(bits[..., 0, :] | (bits[..., 1, :] << 16), -3, -2)


def untile_pairs(
    words: UInt32[Array, "*layers blocks groups 8"], dtype: Any
) -> Float[Array, "*layers groups n"]:
    """Inverse of :func:`tile_pairs`, for values of a 16-bit float dtype."""
    *layers, blocks, groups, _ = words.shape
    halves = jnp.stack([words & 0xFFFF, words >> 16], axis=-2).astype(jnp.uint16)  # b G r g
    halves = jnp.swapaxes(halves, -4, -3).reshape(*layers, groups, blocks * 16)
    return lax.bitcast_convert_type(halves, dtype)


def _whole_blocks(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a weight, which consists of whole blocks."""
    *_, k, n = shape
    if not fits(k, n):
        raise ValueError(f"{k} x {n} weights are no whole blocks of {COLUMNS} x {ROWS}")
    return shape


def _along(length: int, axis_from_end: int) -> UInt32[Array, "..."]:
    """0 to length - 1 along one of the last axes (0 is the last), to broadcast against the others."""
    return jnp.arange(length, dtype=jnp.uint32).reshape(length, *(1,) * axis_from_end)
