# SPDX-License-Identifier: Apache-2.0
"""What a kernel for single threads is written against: words, pointers, tensor-core products.

Where Pallas' own block operations are too coarse (they know no product of one warp that takes codes from
memory straight into registers), a kernel is a Python function of a :class:`Machine`. Two machines run it:

- :class:`pallas_kernels.mosaic_machine.MosaicMachine` emits it into a Mosaic GPU kernel;
- :class:`pallas_kernels.numpy_machine.NumpyMachine` executes it with numpy, all threads of a block at
  once, and refuses what a GPU would do silently: reads outside an array, of unwritten shared memory,
  and so on.

So the tests check on any computer the program that the GPU runs, but for the compiler.

A *word* is a 32-bit unsigned integer, one for each thread; words have the operators of integers, with
plain integers or words on the other side. A *real* is a float32, one for each thread.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

Word = Any  # + * // % & | ^ << >> <, as uint32
Real = Any  # opaque: only a machine computes with it
Half = Literal["bfloat16", "float16"]  # the 16-bit floats of tensor-core products


@runtime_checkable
class Pointer(Protocol):
    """A place in a global array, counted in words."""

    def load(self, offset: int, count: int, *, once: bool = False) -> list[Word]:
        """Reads neighbouring words.

        Args:
          offset: words from here, the same for all threads.
          count: 1, 2 or 4; more than one must lie at a multiple of their size.
          once: nobody will read them again: they bypass the first-level cache.
        """
        ...

    def advanced(self, words: Word) -> "Pointer":
        """The place so many words on."""
        ...


@runtime_checkable
class Machine(Protocol):
    """One block of threads."""

    thread: Word  # 0 to threads - 1
    warp: Word  # thread // 32, the same for a whole warp
    block: tuple[Word, Word]  # of the grid

    def pointer(self, array: Any, word: Word) -> Pointer:
        """A place in a global array of words."""
        ...

    def store(self, array: Any, index: Word, value: Real, where: Word) -> None:
        """Rounds to the array's float dtype and writes, where the condition holds."""
        ...

    def real_at(self, array: Any, index: Word) -> Real:
        """Reads an element of a global array of floats."""
        ...

    def shared_store(self, index: Word, value: Word) -> None:
        """Writes to the block's shared memory, an array of words."""
        ...

    def shared_load(self, index: Word) -> Word:
        """Reads from it."""
        ...

    def barrier(self) -> None:
        """Waits for all threads of the block; what they wrote to shared memory is visible then."""
        ...

    def word(self, value: int) -> Word:
        """A constant."""
        ...

    def real(self, value: float) -> Real:
        """A constant."""
        ...

    def minimum(self, a: Word, b: Word | int) -> Word:
        """The lesser."""
        ...

    def loop(
        self,
        count: Word,
        carry: Sequence[Word | Real],
        body: Callable[[Word, list[Word | Real]], Sequence[Word | Real]],
    ) -> list[Word | Real]:
        """``for i in range(count): carry = body(i, carry)``; the count is the same for a whole warp."""
        ...

    def fma(self, a: Real, b: Real, c: Real) -> Real:
        """``a * b + c``."""
        ...

    def plus(self, a: Real, b: Real) -> Real:
        """``a + b``."""
        ...

    def times(self, a: Real, b: Real) -> Real:
        """``a * b``."""
        ...

    def as_word(self, value: Real) -> Word:
        """The bits of a float32."""
        ...

    def as_real(self, bits: Word) -> Real:
        """The float32 of these bits."""
        ...

    def rounded(self, integer: Word) -> Real:
        """The float32 nearest to an int32."""
        ...

    def half_pair_minus(self, half: Half, a: Word, b: Word) -> Word:
        """The difference of two pairs of 16-bit floats, pair by pair."""
        ...

    def bytes_of(self, a: Word, b: Word, places: int) -> Word:
        """Four bytes out of eight.

        Args:
          a: bytes 0 to 3, the lowest first.
          b: bytes 4 to 7.
          places: four hexadecimal digits, which byte comes where, the lowest last: 0x3210 is ``a``.
        """
        ...

    def lifted(self, word: Word, mask: int, unit: Word) -> Word:
        """``word & mask ^ unit``, as one instruction."""
        ...

    def e4m3_as_half(self, word: Word, which: Literal["low", "high"]) -> Word:
        """Two of the four float8_e4m3fn in a word, as a pair of float16."""
        ...

    def half_as_real(self, half: Half, pair: Word, which: Literal["low", "high"]) -> Real:
        """One of two 16-bit floats, as float32."""
        ...

    def mma(
        self, half: Half, a: Sequence[Word], b: Sequence[Word], c: Sequence[Real]
    ) -> list[Real]:
        """One warp's product ``A [16, 16] . B [16, 8] + C [16, 8]``, ``mma.m16n8k16`` of PTX.

        Args:
          half: dtype of A and B.
          a: four pairs: lane ``4 g + c`` holds rows g, g + 8, g, g + 8 at columns 2 c and 2 c + 1, the
            last two 8 columns further on.
          b: two pairs: column g at rows 2 c and 2 c + 1, the second 8 rows further on.
          c: four float32: rows g, g, g + 8, g + 8 at columns 2 c, 2 c + 1, 2 c, 2 c + 1.
        """
        ...

    def mma_int8(self, a: Sequence[Word], b: Sequence[Word], c: Sequence[Word]) -> list[Word]:
        """One warp's product ``A [16, 32] . B [32, 8] + C [16, 8]`` of int8, ``mma.m16n8k32`` of PTX.

        Args:
          a: four times four int8: lane ``4 g + c`` holds rows g, g + 8, g, g + 8 at columns 4 c to
            4 c + 3, the last two 16 columns further on.
          b: twice four: column g at rows 4 c to 4 c + 3, the second 16 rows further on.
          c: four int32, placed as those of :meth:`mma`.
        """
        ...
