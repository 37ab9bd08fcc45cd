# SPDX-License-Identifier: Apache-2.0
"""What a kernel for single threads is written against: words, pointers, tensor-core products.

Where Pallas' own block operations are too coarse (they know no product of one warp that takes int4 from
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

Word = Any  # + - * // % & | << >> <, as uint32
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

    def shared_store(self, index: Word, value: Real) -> None:
        """Writes to the block's shared memory, an array of float32."""
        ...

    def shared_load(self, index: Word) -> Real:
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

    def half_pair_minus(self, half: Half, a: Word, b: Word) -> Word:
        """The difference of two pairs of 16-bit floats, pair by pair."""
        ...

    def twice(self, pair: Word, which: Literal["low", "high"]) -> Word:
        """One half of a word, in both halves."""
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
