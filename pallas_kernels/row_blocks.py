# SPDX-License-Identifier: Apache-2.0
"""The layouts in which weights stream from memory into tensor-core registers.

A weight ``[k, n]`` is cut into blocks of 16 outputs x 64 inputs. Their codes lie together, 16 bytes for
each lane of a warp, read in one instruction, and those are the lane's part of the A operand of
tensor-core products (``mma``, or ``wgmma``, whose A operand lies in the same registers). Blocks of the
same outputs follow one another along ``k``, so a warp reads straight on.

Of outputs 16 b + 8 r + g and inputs 64 t + 16 c + 8 u + 2 w + e (r, u, e in 0, 1; g in 0 to 7; c, w in 0
to 3) lane ``4 g + c`` holds, in word w of its 16 bytes,

    int4     512 bytes                  nibble 2 u + r + 4 e, unsigned: code + 8
    8 bits   two times 512, r = 0, 1    byte 2 u + e, bit by bit as its dtype has it

so a lane has 16 neighbouring inputs. The tensor core fixes which *row* an element belongs to; which
inputs meet in one instruction is free, as long as tokens follow. With this order they can in two ways:

- A lane that holds its own words multiplies word w: pair w of both eights of its neighbours. The tokens
  for all four words are the 32 bytes of its neighbours: two loads.
- ``ldmatrix`` hands word w of lane ``4 g + c`` to lane ``4 g + w``. Then a quad holds the 16 neighbours
  of lane c as an operand wants them: tokens stay in the order of memory.

The 16 bytes of lane ``4 g + c`` lie at place ``4 g + (c ^ g // 2)`` of the 512, :func:`place_of`, so that
the rows of each matrix that ``ldmatrix`` reads, those of one c, lie in different banks of shared memory.

Nibbles unpack with a shift and a mask for each *pair* of weights, because the two halves of a 32-bit
register are four nibbles apart. 8-bit tokens are put into the order of a lane's bytes by what quantizes
them: :func:`ordered_tokens`.

Scales and zeros are stored for output pairs, the halves of one word: output ``16 b + g`` in the low one,
``16 b + 8 + g`` in the high one.

``VERSION`` changes with the layouts; arrays of another version cannot be mixed up, for a QTensor names
it.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int8, Integer, Shaped, UInt32

VERSION = 2
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
    #                          k: t        c  u  w  e   n: b         r  g
    axes = unsigned.reshape(*layers, k // 64, 4, 2, 4, 2, n // 16, 2, 8)
    shifts = 4 * (2 * _along(2, 5) + _along(2, 1) + 4 * _along(2, 3))  # u, r, e
    words = jnp.sum(axes << shifts, axis=(-6, -4, -2), dtype=jnp.uint32)  # t c w b g
    first = len(layers)
    order = (3, 0, 4, 1, 2)  # b t g c w
    words = jnp.transpose(words, (*range(first), *(first + i for i in order)))
    return _placed(words).reshape(*layers, n // 16, k // 64, LANES, WORDS)


def untile_codes(words: UInt32[Array, "*layers blocks tiles 32 4"]) -> Int8[Array, "*layers k n"]:
    """Inverse of :func:`tile_codes`."""
    *layers, blocks, tiles, _, _ = words.shape
    first = len(layers)
    axes = _placed(words.reshape(*layers, blocks, tiles, 8, 4, 4))  # b t g c w
    order = (1, 3, 4, 0, 2)  # t c w b g
    axes = jnp.transpose(axes, (*range(first), *(first + i for i in order)))
    axes = axes[..., :, None, :, None, :, None, :]  # t c u w e b r g
    shifts = 4 * (2 * _along(2, 5) + _along(2, 1) + 4 * _along(2, 3))
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
    #                      k: t        c  u  w  e   n: b         r  g
    axes = bits.reshape(*layers, k // 64, 4, 2, 4, 2, n // 16, 2, 8)
    first = len(layers)
    order = (5, 0, 6, 7, 1, 3, 2, 4)  # b t r g c w u e
    axes = jnp.transpose(axes, (*range(first), *(first + i for i in order)))
    axes = axes.reshape(*axes.shape[:-2], 4)
    words = lax.bitcast_convert_type(axes, jnp.uint32)  # the byte 0 is the lowest
    return _placed(words).reshape(*layers, n // 16, k // 64, 2, LANES, WORDS)


def untile_bytes(
    words: UInt32[Array, "*layers blocks tiles 2 32 4"], dtype: Any
) -> Shaped[Array, "*layers k n"]:
    """Inverse of :func:`tile_bytes`, for codes of an 8-bit dtype."""
    *layers, blocks, tiles, _, _, _ = words.shape
    words = _placed(words.reshape(*layers, blocks, tiles, 2, 8, 4, 4))  # b t r g c w
    bits = lax.bitcast_convert_type(words, jnp.uint8)
    axes = bits.reshape(*layers, blocks, tiles, 2, 8, 4, 4, 2, 2)  # b t r g c w u e
    first = len(layers)
    order = (1, 4, 6, 5, 7, 0, 2, 3)  # t c u w e b r g
    axes = jnp.transpose(axes, (*range(first), *(first + i for i in order)))
    return lax.bitcast_convert_type(axes.reshape(*layers, tiles * 64, blocks * 16), dtype)


def place_of(lane: Any) -> Any:
    """Where the 16 bytes of a lane lie among those of a block, counted in 16 bytes."""
    return lane // 4 * 4 + ((lane % 4) ^ (lane // 8))


def ordered_tokens(
    tokens: Shaped[Array, "*batch k"], *, by_nibbles: bool = False
) -> Shaped[Array, "*batch k"]:
    """8-bit tokens in the order of a lane's bytes: input 8 u + 2 w + e of each 16 at 4 w + 2 u + e.

    Args:
      tokens: of any 8-bit dtype.
      by_nibbles: at 4 w + u + 2 e instead: the order in which the nibbles of an output lie in a word.

    Example:
      >>> ordered_tokens(jnp.arange(64, dtype=jnp.int8))[:8].tolist()
      [0, 1, 8, 9, 2, 3, 10, 11]
    """
    *batch, k = tokens.shape
    axes = tokens.reshape(*batch, k // 16, 2, 4, 2)  # c u w e
    first = len(batch)
    order = (0, 2, 3, 1) if by_nibbles else (0, 2, 1, 3)  # c w, and e u or u e
    return jnp.transpose(axes, (*range(first), *(first + i for i in order))).reshape(*batch, k)


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


def _placed(words: UInt32[Array, "*rest 8 4 4"]) -> UInt32[Array, "*rest 8 4 4"]:
    """The 16 bytes of lane (g, c) at (g, c ^ g // 2): its own inverse."""
    c = jnp.arange(4) ^ (jnp.arange(8)[:, None] // 2)
    return jnp.take_along_axis(words, c.reshape(*(1,) * (words.ndim - 3), 8, 4, 1), axis=-2)


def _along(length: int, axis_from_end: int) -> UInt32[Array, "..."]:
    """0 to length - 1 along one of the last axes (0 is the last), to broadcast against the others."""
    return jnp.arange(length, dtype=jnp.uint32).reshape(length, *(1,) * axis_from_end)
