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

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Word = Any  # + * // % & | ^ << >> <, as uint32
Real = Any  # opaque: only a machine computes with it
Half = Literal["bfloat16", "float16"]  # the 16-bit floats of tensor-core products
Operand = Literal["bfloat16", "float16", "int8", "float8_e4m3fn"]  # what wgmma multiplies
Sum = Any  # a real, or a word that is an int32


@dataclass(frozen=True)
class Rows:
    """64 rows of 32 bytes in shared memory: an A operand of :meth:`Machine.wgmma`.

    They are a half of rows of 64 bytes. Row r of those begins at word ``16 r``; its j-th 16 bytes are the
    four words from ``4 * (j ^ r % 8 // 2)`` there.

    Attributes:
      place: of shared memory.
      words: further on; the two together are a multiple of 128.
      part: 0 or 1, which 32 bytes of the rows.
    """

    place: Word
    words: int
    part: int


class Pointer(ABC):
    """A place in a global array, counted in words."""

    @abstractmethod
    def load(self, offset: int, count: int, *, once: bool = False) -> list[Word]:
        """Reads neighbouring words.

        Args:
          offset: words from here, the same for all threads.
          count: 1, 2 or 4; more than one must lie at a multiple of their size.
          once: nobody will read them again: they bypass the first-level cache.
        """
        ...

    @abstractmethod
    def load_where(self, offset: int, where: Word) -> Word:
        """Reads a word where a condition holds; elsewhere it is 0."""
        ...

    @abstractmethod
    def advanced(self, count: Word, each: int = 1) -> "Pointer":
        """The place so many times so many words on: further than a word can count, too."""
        ...


class Machine(ABC):
    """One block of threads."""

    thread: Word  # 0 to threads - 1
    warp: Word  # thread // 32, the same for a whole warp
    block: tuple[Word, Word]  # of the grid

    @abstractmethod
    def pointer(self, array: Any, word: Word) -> Pointer:
        """A place in a global array of words."""
        ...

    @abstractmethod
    def store(self, array: Any, index: Word, value: Real, where: Word) -> None:
        """Rounds to the array's float dtype and writes, where the condition holds."""
        ...

    @abstractmethod
    def real_at(self, array: Any, index: Word) -> Real:
        """Reads an element of a global array of floats."""
        ...

    @abstractmethod
    def shared_store(self, index: Word, value: Word, offset: int = 0) -> None:
        """Writes to the block's shared memory, an array of words, at ``index + offset``."""
        ...

    @abstractmethod
    def shared_load(self, index: Word, offset: int = 0) -> Word:
        """Reads from it."""
        ...

    @abstractmethod
    def shared_load_row(self, index: Word, count: int, offset: int = 0) -> list[Word]:
        """Reads 2 or 4 neighbours from it, at a multiple of their number: ``index + offset``."""
        ...

    @abstractmethod
    def shared_load_matrices(self, index: Word) -> list[Word]:
        """Reads four 8 x 8 matrices of 16-bit elements, ``ldmatrix.x4`` of PTX.

        Args:
          index: lane ``8 i + row`` says where that row of matrix i begins: 4 words, at a multiple of 4.

        Returns:
          For each matrix i a word: lane ``4 g + c`` gets word c of its row g.
        """
        ...

    @abstractmethod
    def shared_store_matrices(self, index: Word, words: Sequence[Word]) -> None:
        """Writes two or four 8 x 8 matrices of 16-bit elements, turned around: ``stmatrix.trans`` of PTX.

        Args:
          index: lane ``8 i + column`` says where that column of matrix i is to begin: 4 words, at a
            multiple of 4.
          words: for each matrix i one: of lane ``4 g + c`` the elements 2 c and 2 c + 1 of row g.
        """
        ...

    @abstractmethod
    def start_arrivals(self, place: Word, count: int, threads: int) -> None:
        """Makes so many arrivals of two words of shared memory each; used after the next barrier.

        An arrival has taken a turn when so many threads have arrived at it, and copies have brought it
        as many bytes as it was told to expect. Then it begins anew.
        """
        ...

    @abstractmethod
    def one_thread(self, where: Word | None, body: Callable[[], None]) -> None:
        """Runs something on one thread of each warp for which a condition holds.

        Args:
          where: the same for a whole warp; None: every warp.
          body: of :meth:`arrive`, :meth:`expect` and copies.
        """
        ...

    @abstractmethod
    def arrive(self, arrival: Word) -> None:
        """The thread arrives, with all that it has done so far."""
        ...

    @abstractmethod
    def expect(self, arrival: Word, nbytes: int) -> None:
        """The thread arrives, and tells what copies bring in all."""
        ...

    @abstractmethod
    def copy_words(self, place: Word, source: Any, count: int, arrival: Word) -> None:
        """Begins to copy neighbouring words of a global array to shared memory.

        Args:
          place: of shared memory; it and the source are multiples of 4.
          source: a pointer of this very machine, into the global array.
          count: of words, a multiple of 4.
          arrival: counts them off.
        """
        ...

    @abstractmethod
    def copy_tokens(
        self,
        place: Word,
        array: Any,
        token: Word,
        column: Word,
        tokens: int,
        arrival: Word,
    ) -> None:
        """Begins to copy 128 bytes of so many tokens, as :meth:`wgmma` takes them.

        Args:
          place: of shared memory, a multiple of 256.
          array: global ``[m, k]``; tokens beyond m are zeros.
          token: the first.
          column: element of a token where the 128 bytes begin.
          tokens: how many.
          arrival: counts off 128 bytes for each.
        """
        ...

    @abstractmethod
    def copy_out(self, place: Word, array: Any, token: Word, output: Word, tokens: int) -> None:
        """Begins to copy 64 outputs of so many tokens from shared memory to a global ``[m, n]``.

        Args:
          place: of shared memory, a multiple of 256, which the warpgroup has written before its last
            barrier: rows of 16-bit floats, which lie as :meth:`copy_tokens` lays them.
          array: what lies beyond its edges is left out.
          token: the first.
          output: the first.
          tokens: how many.
        """
        ...

    @abstractmethod
    def wait_for_copies_out(self) -> None:
        """Waits until those that this thread began have read what they copy."""
        ...

    @abstractmethod
    def wait_for(self, arrival: Word, turn: Word) -> None:
        """Waits for a turn of an arrival: the last one or the one before, so it is given modulo 2."""
        ...

    @abstractmethod
    def barrier(self) -> None:
        """Waits for all threads of the machine; what they wrote to shared memory is visible then."""
        ...

    @abstractmethod
    def parted(
        self,
        threads: int,
        registers: tuple[int, int],
        first: Callable[["Machine"], None],
        rest: Callable[["Machine"], None],
    ) -> None:
        """Two programs beside each other: of the first threads, and of those that follow.

        Args:
          threads: of the first; whole warpgroups.
          registers: of a thread of either, multiples of 8: one side gives what the other takes.
          first: is given the machine of these threads, whose barriers are theirs alone.
          rest: likewise; they keep their numbers.
        """
        ...

    @abstractmethod
    def warpgroup_barrier(self) -> None:
        """Waits for the threads of the warpgroup; they, and what they copy out, see what they wrote."""
        ...

    @abstractmethod
    def word(self, value: int) -> Word:
        """A constant."""
        ...

    @abstractmethod
    def real(self, value: float) -> Real:
        """A constant."""
        ...

    @abstractmethod
    def minimum(self, a: Word, b: Word | int) -> Word:
        """The lesser."""
        ...

    @abstractmethod
    def loop(
        self,
        count: Word,
        carry: Sequence[Word | Real],
        body: Callable[[Word, list[Word | Real]], Sequence[Word | Real]],
    ) -> list[Word | Real]:
        """``for i in range(count): carry = body(i, carry)``; the count is the same for a whole warp."""
        ...

    @abstractmethod
    def fma(self, a: Real, b: Real, c: Real) -> Real:
        """``a * b + c``."""
        ...

    @abstractmethod
    def plus(self, a: Real, b: Real) -> Real:
        """``a + b``."""
        ...

    @abstractmethod
    def times(self, a: Real, b: Real) -> Real:
        """``a * b``."""
        ...

    @abstractmethod
    def quotient(self, a: Real, b: Real) -> Real:
        """``a / b``."""
        ...

    @abstractmethod
    def nearest_whole(self, a: Real) -> Real:
        """The nearest whole number, of two the even one."""
        ...

    @abstractmethod
    def clipped(self, a: Real, low: float, high: float) -> Real:
        """What is nearest to it from low to high."""
        ...

    @abstractmethod
    def from_lane(self, value: Real, lane: Word) -> Real:
        """What another lane of the warp has, each thread of its own choice: ``shfl.idx`` of PTX."""
        ...

    @abstractmethod
    def as_word(self, value: Real) -> Word:
        """The bits of a float32."""
        ...

    @abstractmethod
    def as_real(self, bits: Word) -> Real:
        """The float32 of these bits."""
        ...

    @abstractmethod
    def rounded(self, integer: Word) -> Real:
        """The float32 nearest to an int32."""
        ...

    @abstractmethod
    def half_pair(self, half: Half, low: Real, high: Real) -> Word:
        """Two floats, rounded, as a pair."""
        ...

    @abstractmethod
    def half_pair_minus(self, half: Half, a: Word, b: Word) -> Word:
        """The difference of two pairs of 16-bit floats, pair by pair."""
        ...

    @abstractmethod
    def half_pair_times(self, half: Half, a: Word, b: Word) -> Word:
        """The product of two pairs of 16-bit floats, pair by pair."""
        ...

    @abstractmethod
    def bytes_of(self, a: Word, b: Word, places: int) -> Word:
        """Four bytes out of eight.

        Args:
          a: bytes 0 to 3, the lowest first.
          b: bytes 4 to 7.
          places: four hexadecimal digits, which byte comes where, the lowest last: 0x3210 is ``a``.
        """
        ...

    @abstractmethod
    def lifted(self, word: Word, mask: int, unit: Word) -> Word:
        """``word & mask ^ unit``, as one instruction."""
        ...

    @abstractmethod
    def e4m3_as_half(self, word: Word, which: Literal["low", "high"]) -> Word:
        """Two of the four float8_e4m3fn in a word, as a pair of float16."""
        ...

    @abstractmethod
    def half_as_real(self, half: Half, pair: Word, which: Literal["low", "high"]) -> Real:
        """One of two 16-bit floats, as float32."""
        ...

    @abstractmethod
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

    @abstractmethod
    def mma_int8(self, a: Sequence[Word], b: Sequence[Word], c: Sequence[Word]) -> list[Word]:
        """One warp's product ``A [16, 32] . B [32, 8] + C [16, 8]`` of int8, ``mma.m16n8k32`` of PTX.

        Args:
          a: four times four int8: lane ``4 g + c`` holds rows g, g + 8, g, g + 8 at columns 4 c to
            4 c + 3, the last two 16 columns further on.
          b: twice four: column g at rows 4 c to 4 c + 3, the second 16 rows further on.
          c: four int32, placed as those of :meth:`mma`.
        """
        ...

    @abstractmethod
    def wgmma(
        self,
        kind: Operand,
        a: Sequence[Sequence[Word]] | Sequence[Rows],
        tile: Word,
        step: int,
        sums: Sequence[Sequence[Sum]] | None,
        tokens: int,
    ) -> list[list[Sum]]:
        """Begins a warpgroup's products ``A_i [64, 32 bytes] . B [32 bytes, tokens] + C_i``, ``wgmma``.

        What it returns may be C of further products at once, and is for other use after :meth:`wait`.
        The same holds for the place of B.

        Args:
          kind: dtype of A and B: 16 inputs of 16 bits or 32 of 8. int8 has int32 sums.
          a: for each i four words, as in :meth:`mma` and :meth:`mma_int8`; warp w of the four holds rows
            16 w to 16 w + 15. Or, of 8 bits, where they lie in shared memory.
          tile: word of shared memory, a multiple of 256, where 128 bytes of each token begin, of which B
            is a part, transposed. Token t has 32 words; its j-th 16 bytes are the four words from
            ``4 * (j ^ t % 8)``.
          step: B is bytes 32 step to 32 step + 31.
          sums: for each i the C; None: nothing. Lane ``4 g + c`` holds, for each 8 tokens, rows g, g,
            g + 8, g + 8 at tokens 2 c, 2 c + 1, 2 c, 2 c + 1.
          tokens: how many, a multiple of 8 up to 256; of int8 beyond 32 a multiple of 16.
        """
        ...

    @abstractmethod
    def wait(self, pending: int, sums: Sequence[Sequence[Sum]]) -> list[list[Sum]]:
        """Waits until at most so many of the last :meth:`wgmma` are under way; returns their sums."""
        ...
