# SPDX-License-Identifier: Apache-2.0
"""How codes in registers become operands of tensor-core products.

Codes come as :mod:`pallas_kernels.row_blocks` lays them out, and leave as the four words of an A
operand, ``[16 outputs, 16 inputs]`` of 16-bit floats or ``[16, 32]`` of int8. Every step is exact.
Instructions for eight codes of a lane, to 16-bit floats:

=====  ==================================================  ========================================
codes  bfloat16                                            float16
=====  ==================================================  ========================================
int4   3 shifts, 4 masks with exponents, 4 subtractions    the same
int8   4 permutations of bytes, 8 masks, 4 subtractions    2 sign flips, 4 permutations, 4 subtractions
e4m3   4 conversions to float16, 8 to float32, 4           4 conversions
       permutations
=====  ==================================================  ========================================
"""

from collections.abc import Sequence
from typing import Literal

from pallas_kernels.machine import Half, Machine, Word

Weights = Literal["int4", "int8", "float8_e4m3fn"]
WEIGHTS: tuple[Weights, ...] = ("int4", "int8", "float8_e4m3fn")
BITS: dict[Weights, int] = {"int4": 4, "int8": 8, "float8_e4m3fn": 8}

# 2 ** (mantissa bits) of the 16-bit float, in both halves of a word: the float whose last bits count
# ones: 128 and 1024.
_UNIT = {"bfloat16": 0x43004300, "float16": 0x64006400}

# What is subtracted from lifted codes whose zero is 0: that float's value, and what made the code
# unsigned. int8 has eight bits and bfloat16 seven of mantissa: there the sign is taken off by itself, and
# zeros after it.
LIFTS: dict[tuple[Weights, Half], int] = {
    ("int4", "bfloat16"): 128 + 8,
    ("int4", "float16"): 1024 + 8,
    ("int8", "bfloat16"): 0,
    ("int8", "float16"): 1024 + 128,
}
_LIFT_BITS = {136: 0x43084308, 1032: 0x64086408, 1152: 0x64806480}


# What products of int4 are too large by: as int8 they stand in the high nibble.
INT4_IN_INT8 = 16
# What they are too small by, as the reciprocal: as e4m3 they stand in the lowest bits of the mantissa.
INT4_IN_E4M3 = 2.0**-9


def constant_offset(machine: Machine, weights: Weights, half: Half) -> Word | None:
    """What is subtracted where zeros are 0, in both halves of a word; None: nothing."""
    lift = LIFTS.get((weights, half), 0)
    return machine.word(_LIFT_BITS[lift]) if lift else None


def each_twice(machine: Machine, pair: Word) -> tuple[Word, Word]:
    """The low half of a word in both halves of one, and the high half."""
    return machine.bytes_of(pair, pair, 0x1010), machine.bytes_of(pair, pair, 0x3232)


def half_operand(
    machine: Machine,
    weights: Weights,
    half: Half,
    words: Sequence[Word],
    offsets: tuple[Word | None, Word | None],
) -> list[Word]:
    """The A operand of one ``mma.m16n8k16``.

    Args:
      machine: emits the instructions.
      weights: what the codes are.
      half: dtype of the operand.
      words: of the layout, one of int4 or two (of rows g and g + 8) of 8 bits.
      offsets: lifted zeros of rows g and g + 8, in both halves of a word; see `LIFTS`.
    """
    if weights == "int4":
        return _from_int4(machine, half, words[0], offsets)
    convert = {"int8": _from_int8, "float8_e4m3fn": _from_e4m3}[weights]
    rows = [convert(machine, half, w, o) for w, o in zip(words, offsets, strict=True)]
    return [rows[0][0], rows[1][0], rows[0][1], rows[1][1]]


def int8_operand(machine: Machine, weights: Weights, words: Sequence[Word]) -> list[Word]:
    """The A operand of one ``mma.m16n8k32`` of int8: codes as they are, or int4 times `INT4_IN_INT8`.

    Args:
      machine: emits the instructions.
      weights: what the codes are.
      words: of the layout, four of int8 (of rows g and g + 8 in turns) or two of int4. Those hold a row
        in every second nibble: :func:`pallas_kernels.row_blocks.ordered_tokens` knows the order.
    """
    if weights == "int8":
        return list(words)
    sign = machine.word(0x80808080)  # unsigned to two's complement
    return [machine.lifted(row, 0xF0F0F0F0, sign) for word in words for row in (word << 4, word)]


def e4m3_operand(machine: Machine, weights: Weights, words: Sequence[Word]) -> list[Word]:
    """The A operand of one product of 16 outputs x 32 inputs of e4m3: int4 times `INT4_IN_E4M3`.

    ``m * 2**-9`` is the byte m for m up to 8, subnormal up to 7; the sign is the highest bit. A nibble is
    u = code + 8, negative where its highest bit is 0: then the byte is ``0x80 | 8 - u``, and
    ``8 - u = (u & 7 ^ 7) + 1``; else it is ``u & 7``.

    Args:
      machine: emits the instructions.
      weights: int4.
      words: of the layout, two, as in :func:`int8_operand`.
    """
    assert weights == "int4", "others are multiplied as they are"
    return [_e4m3_nibbles(machine, word, row) for word in words for row in (0, 4)]


def _e4m3_nibbles(machine: Machine, word: Word, shift: int) -> Word:
    """Every second nibble: 5 or 6 instructions for four codes."""
    negative = machine.lifted(word >> (shift + 3), 0x01010101, machine.word(0x01010101))
    magnitude = machine.lifted(word >> shift if shift else word, 0x07070707, negative * 7)
    return negative * 0x81 + magnitude


def e4m3_pairs(machine: Machine, word: Word) -> list[Word]:
    """Four float8_e4m3fn as two pairs of float16."""
    return [machine.e4m3_as_half(word, which) for which in ("low", "high")]


def _from_int4(
    machine: Machine, half: Half, word: Word, offsets: tuple[Word | None, Word | None]
) -> list[Word]:
    """``128 + u - (128 + 8 + zero)``: u under the exponent of 128 (1024) is that number plus u."""
    unit, pairs = machine.word(_UNIT[half]), []
    for i in range(4):
        lifted = machine.lifted(word >> (4 * i) if i else word, 0x000F000F, unit)
        pairs.append(machine.half_pair_minus(half, lifted, offsets[i % 2]))
    return pairs


def _from_int8(machine: Machine, half: Half, word: Word, offset: Word | None) -> list[Word]:
    """float16: ``1024 + (code + 128) - (1152 + zero)``.

    bfloat16: ``(128 + low 7 bits) - (128 or 256) - zero``: there the sign bit lands in the exponent of
    128 and makes it 256, which is what to subtract. The results are whole numbers of at most 255: both
    floats hold them.
    """
    unit = machine.word(_UNIT[half])
    if half == "float16":
        unsigned = word ^ 0x80808080
        lifted = [machine.bytes_of(unsigned, unit, places) for places in (0x5150, 0x5352)]
        return [machine.half_pair_minus(half, pair, offset) for pair in lifted]
    lifted = [machine.bytes_of(word, unit, places) for places in (0x5150, 0x5352)]
    pairs = [machine.half_pair_minus(half, pair & 0x437F437F, pair & 0x43804380) for pair in lifted]
    return pairs if offset is None else [machine.half_pair_minus(half, p, offset) for p in pairs]


def _from_e4m3(machine: Machine, half: Half, word: Word, offset: Word | None) -> list[Word]:
    """float16 by conversion; bfloat16 is the upper half of the same number in float32."""
    assert offset is None, "floats have no zero"
    pairs = e4m3_pairs(machine, word)
    if half == "float16":
        return pairs
    wide = [
        [machine.as_word(machine.half_as_real("float16", pair, which)) for which in ("low", "high")]
        for pair in pairs
    ]
    return [machine.bytes_of(low, high, 0x7632) for low, high in wide]
