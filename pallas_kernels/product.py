# SPDX-License-Identifier: Apache-2.0
"""What a quantized product is: shapes, dtypes, scales; which of them the kernels take."""

from dataclasses import dataclass
from typing import Any, Literal, cast

from pallas_kernels import operands, row_blocks
from pallas_kernels.machine import Half, Machine, Pointer, Word
from pallas_kernels.operands import Weights

CHUNK = 128  # inputs that products consist of
GROUP_SIZES = (32, 64, 128)
BLOCK = 128  # inputs and outputs that share a scale where 8-bit floats meet; inputs of a token, too

Tokens = Literal["bfloat16", "float16", "int8", "float8_e4m3fn"]
Out = Literal["bfloat16", "float16", "float32"]
OUT: tuple[Out, ...] = ("bfloat16", "float16", "float32")
TOKENS: tuple[Tokens, ...] = ("bfloat16", "float16", "int8", "float8_e4m3fn")
_BYTE_TOKENS: dict[Weights, tuple[Tokens, ...]] = {
    "int4": ("int8", "float8_e4m3fn"), "int8": ("int8",), "float8_e4m3fn": ("float8_e4m3fn",),
}  # fmt: skip
# Of integers: 2**17 products of two int8 are the first that may not fit an int32.
_MOST_INPUTS = 2**17
MOST_RESULTS = 2**32 - 1  # that a word can count

SHARED_BYTES = 227 * 1024  # of a block on Hopper


@dataclass(frozen=True, kw_only=True)
class Product:
    """What is to be computed.

    Attributes:
      m: tokens.
      k: inputs.
      n: outputs.
      group_size: inputs that share a scale; None: all.
      weights: dtype of the codes.
      tokens: dtype of the tokens.
      has_zeros: whether groups have a zero of their own, instead of 0.
      scales: dtype of the scales of groups, with 8-bit tokens.
      one_scale: whether one scale serves all outputs; with 8-bit tokens only.
      one_token_scale: whether one serves all tokens; likewise.
      out: dtype of the result.
    """

    m: int
    k: int
    n: int
    group_size: int | None
    weights: Weights = "int4"
    tokens: Tokens = "bfloat16"
    has_zeros: bool = False
    scales: Half = "bfloat16"
    one_scale: bool = False
    one_token_scale: bool = False
    out: Out = "bfloat16"

    @property
    def groups(self) -> int:
        """Scales of an output."""
        return 1 if self.group_size is None else self.k // self.group_size

    @property
    def half(self) -> Half:
        """Dtype of 16-bit tensor-core operands: 8-bit floats are multiplied as float16, exactly."""
        return "bfloat16" if self.tokens == "bfloat16" else "float16"

    @property
    def has_half_tokens(self) -> bool:
        """Whether tokens have 16 bits; the scales of weights then come in pairs of their dtype."""
        return self.tokens == self.half

    @property
    def has_blocks(self) -> bool:
        """Whether tokens and weights have float32 scales for each 128 inputs."""
        return self.tokens == self.weights and self.group_size is not None

    @property
    def has_pairs(self) -> bool:
        """Whether the scales of weights come in pairs of 16 bits, for each group."""
        return self.has_half_tokens or (self.group_size is not None and not self.has_blocks)

    @property
    def pair(self) -> Half:
        """Dtype of those pairs."""
        return self.half if self.has_half_tokens else self.scales

    @property
    def has_group_sums(self) -> bool:
        """Whether products of 8-bit tokens are added up by group, and each sum scaled by itself."""
        return not self.has_half_tokens and self.group_size is not None

    @property
    def is_whole(self) -> bool:
        """Whether sums are int32."""
        return self.tokens == "int8"


def why_not(
    m: int, k: int, n: int, *, weights: str, tokens: str, group_size: int | None, has_zeros: bool
) -> str | None:
    """Why the kernel cannot take a product, in words with the numbers; None if it can."""
    if weights not in operands.WEIGHTS:
        return f"weights are {weights}, must be one of {', '.join(operands.WEIGHTS)}"
    halves = TOKENS[:2]
    allowed = (*halves, *_BYTE_TOKENS[cast(Weights, weights)])
    if tokens not in allowed:
        return f"tokens are {tokens}, must be {' or '.join(allowed)} for {weights} weights"
    if k % CHUNK:
        return f"{k=} must be divisible by {CHUNK}"
    if n % row_blocks.ROWS:
        return f"{n=} must be divisible by {row_blocks.ROWS}"
    if tokens == "int8" and k >= _MOST_INPUTS:
        return f"{k=} must be below {_MOST_INPUTS}, or the sum of products may not fit an int32"
    sizes = GROUP_SIZES if tokens in halves else () if tokens == "int8" else (BLOCK,)
    if group_size is not None and group_size not in sizes:
        needed = f"one of {sizes}, or a scale a channel" if sizes else "None: a scale a channel"
        return f"{group_size=} must be {needed}, with {tokens} tokens and {weights} weights"
    if has_zeros and (weights not in ("int4", "int8") or tokens not in halves):
        return f"zeros go with integer weights and 16-bit tokens, these are {weights} and {tokens}"
    if m * n > MOST_RESULTS:
        return f"{m} x {n} results are more than {MOST_RESULTS}"
    return None if m and k and n else f"there are no tokens, inputs or outputs: {m=}, {k=}, {n=}"


@dataclass(frozen=True, kw_only=True)
class Arrays:
    """Global arrays, as the arguments of `quantized_matmul`; None: absent."""

    x: Any
    codes: Any
    scale: Any
    out: Any
    zero: Any = None
    token_scale: Any = None
    bias: Any = None
    residual: Any = None
    layer: Any = None

    def start(self, machine: Machine, count: int) -> Word:
        """Where the layer begins in an array of weights that has so many entries for each."""
        if self.layer is None:
            return machine.word(0)
        (layer,) = machine.pointer(self.layer, machine.word(0)).load(0, 1)
        return layer * count

    def pointer(self, machine: Machine, array: Any, word: Word, count: int) -> Pointer:
        """A place in the layer's part of such an array, of so many words: all may be more than 2**32."""
        pointer = machine.pointer(array, word)
        return pointer if self.layer is None else pointer.advanced(self.start(machine, 1), count)
