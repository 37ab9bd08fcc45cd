# SPDX-License-Identifier: Apache-2.0
"""Runs a kernel of :mod:`pallas_kernels.machine` with numpy: block by block, all its threads at once."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Shaped, UInt8, UInt32

from pallas_kernels.machine import Half

_DTYPES = {"bfloat16": np.dtype(jnp.bfloat16), "float16": np.dtype(np.float16)}

Words = UInt32[np.ndarray, " threads"]
Reals = Float32[np.ndarray, " threads"]


def run(
    program: Callable[["NumpyMachine"], None],
    *,
    grid: tuple[int, int],
    threads: int,
    shared: int,
) -> None:
    """Runs a program on every block of a grid.

    Args:
      program: a kernel; global arrays are numpy arrays that it closes over.
      grid: blocks along each axis.
      threads: of a block; whole warps.
      shared: words of shared memory.
    """
    for y in range(grid[1]):
        for x in range(grid[0]):
            program(NumpyMachine(threads=threads, block=(x, y), shared=shared))


@dataclass
class NumpyPointer:
    """A place for each thread in a flat array of words."""

    array: UInt32[np.ndarray, " words"]
    index: Words
    machine: "NumpyMachine"

    def load(self, offset: int, count: int, *, once: bool = False) -> list[Words]:
        """Reads; refuses places outside the array and vectors that are not aligned."""
        del once  # a matter of caches
        places = self.index.astype(np.int64) + offset
        active = places[self.machine.active]
        if active.size and (active.min() < 0 or active.max() + count > self.array.size):
            raise IndexError(
                f"words {active.min()} to {active.max() + count - 1} of an array of {self.array.size}"
            )
        if np.any(active % count):
            raise IndexError(f"a vector of {count} words at {active[active % count != 0][0]}")
        places = np.where(self.machine.active, places, 0)
        return [self.array[places + i] for i in range(count)]

    def advanced(self, words: Words | int) -> "NumpyPointer":
        """Further on."""
        return NumpyPointer(self.array, self.index + np.uint32(words), self.machine)


class NumpyMachine:
    """One block of threads; see :class:`pallas_kernels.machine.Machine`."""

    def __init__(self, *, threads: int, block: tuple[int, int], shared: int):
        """A block whose shared memory nobody has written."""
        self.thread = np.arange(threads, dtype=np.uint32)
        self.warp = self.thread // np.uint32(32)
        self.block = (self.word(block[0]), self.word(block[1]))
        self.active = np.ones(threads, bool)
        self._shared = np.zeros(shared, np.uint32)
        self._written = np.zeros(shared, bool)
        self._writers: dict[int, int] = {}

    def pointer(self, array: np.ndarray, word: Words) -> NumpyPointer:
        """A place in the bits of an array."""
        return NumpyPointer(
            array.reshape(-1).view(np.uint32), np.broadcast_to(word, self.thread.shape), self
        )

    def store(self, array: np.ndarray, index: Words, value: Reals, where: Any) -> None:
        """Writes; refuses a place that was written before."""
        flat = array.reshape(-1)
        places = index[where].astype(np.int64)
        if len(set(places)) != len(places):
            raise ValueError("two threads store to one place")
        if not np.isnan(flat[places].astype(np.float32)).all():
            raise ValueError("a place is stored to twice; the output must begin as NaN")
        flat[places] = value[where].astype(array.dtype)

    def real_at(self, array: np.ndarray, index: Words) -> Reals:
        """Reads; refuses places outside the array."""
        if index.max() >= array.size:
            raise IndexError(f"element {index.max()} of an array of {array.size}")
        return array.reshape(-1)[index].astype(np.float32)

    def shared_store(self, index: Words, value: Words) -> None:
        """Writes; refuses places that another thread has written since the last barrier."""
        for place, thread in zip(index.tolist(), self.thread.tolist(), strict=True):
            if self._writers.setdefault(place, thread) != thread:
                raise ValueError(
                    f"threads {self._writers[place]} and {thread} race for word {place}"
                )
        self._shared[index] = value
        self._written[index] = True

    def shared_load(self, index: Words) -> Words:
        """Reads; refuses what was written since the last barrier, or never."""
        if self._writers.keys() & set(index.tolist()):
            raise ValueError("shared memory is read without a barrier after it was written")
        if not self._written[index].all():
            raise ValueError("shared memory is read that nobody has written")
        return self._shared[index]

    def barrier(self) -> None:
        """Makes writes visible."""
        self._writers.clear()

    def word(self, value: int) -> Words:
        """A constant."""
        return np.full(self.thread.shape, value, np.uint32)

    def real(self, value: float) -> Reals:
        """A constant."""
        return np.full(self.thread.shape, value, np.float32)

    def minimum(self, a: Words, b: Words | int) -> Words:
        """The lesser."""
        return np.minimum(a, np.asarray(b, np.uint32))

    def loop(
        self, count: Words, carry: Sequence[Any], body: Callable[[Words, list[Any]], Sequence[Any]]
    ) -> list[Any]:
        """Runs as often as the busiest thread needs; the others keep what they carry."""
        state = list(carry)
        for i in range(int(count.max(initial=0))):
            with self._only(i < count):
                new = body(self.word(i), state)
                state = [np.where(self.active, n, s) for n, s in zip(new, state, strict=True)]
        return state

    @contextlib.contextmanager
    def _only(self, where: Any) -> Iterator[None]:
        before = self.active
        self.active = before & where
        yield
        self.active = before

    def fma(self, a: Reals, b: Reals, c: Reals) -> Reals:
        """Rounded once."""
        return (a.astype(np.float64) * b + c).astype(np.float32)

    def plus(self, a: Reals, b: Reals) -> Reals:
        """The sum."""
        return a + b

    def times(self, a: Reals, b: Reals) -> Reals:
        """The product."""
        return a * b

    def as_word(self, value: Reals) -> Words:
        """The same bits."""
        return value.view(np.uint32)

    def as_real(self, bits: Words) -> Reals:
        """The same bits."""
        return bits.view(np.float32)

    def rounded(self, integer: Words) -> Reals:
        """To the nearest."""
        return integer.view(np.int32).astype(np.float32)

    def half_pair_minus(self, half: Half, a: Words, b: Words) -> Words:
        """Pair by pair."""
        wide = _halves(half, a).astype(np.float32) - _halves(half, b).astype(np.float32)
        return _joined(half, wide)

    def bytes_of(self, a: Words, b: Words, places: int) -> Words:
        """Gathers them."""
        given = np.concatenate([_bytes(a), _bytes(b)], axis=-1)
        chosen = given[:, [places >> 4 * i & 7 for i in range(4)]]
        return np.ascontiguousarray(chosen).view(np.uint32).reshape(-1)

    def lifted(self, word: Words, mask: int, unit: Words) -> Words:
        """Bit by bit."""
        return word & np.uint32(mask) ^ unit

    def e4m3_as_half(self, word: Words, which: str) -> Words:
        """Every value is one of float16 too."""
        values = _bytes(word).view(jnp.float8_e4m3fn).astype(np.float32)
        return _joined("float16", values[:, :2] if which == "low" else values[:, 2:])

    def half_as_real(self, half: Half, pair: Words, which: str) -> Reals:
        """Low or high half."""
        return _halves(half, pair)[:, 0 if which == "low" else 1].astype(np.float32)

    def mma(
        self, half: Half, a: Sequence[Words], b: Sequence[Words], c: Sequence[Reals]
    ) -> list[Reals]:
        """Products of float32 matrices."""
        left, right = ([_halves(half, w).astype(np.float32) for w in words] for words in (a, b))
        return self._multiplied(left, right, c, np.float32)

    def mma_int8(self, a: Sequence[Words], b: Sequence[Words], c: Sequence[Words]) -> list[Words]:
        """Products of integers; a sum beyond int32 wraps, as it does on the device."""
        left, right = ([_bytes(w).view(np.int8).astype(np.int32) for w in ws] for ws in (a, b))
        return self._multiplied(left, right, c, np.uint32)

    def _multiplied(
        self, a: Sequence[np.ndarray], b: Sequence[np.ndarray], c: Sequence[Any], dtype: Any
    ) -> list[Any]:
        """Gathers the fragments of each warp, multiplies, scatters the result.

        A fragment's words hold ``run`` neighbours along the summed axis: 2 halves or 4 bytes.
        """
        lane = self.thread.astype(np.int64) % 32
        warp, g, quad = self.warp.astype(np.int64), lane // 4, lane % 4
        warps, run = len(lane) // 32, a[0].shape[-1]
        left = np.empty((warps, 16, 8 * run), a[0].dtype)
        right = np.empty((warps, 8 * run, 8), b[0].dtype)
        total = np.empty((warps, 16, 8), dtype)
        for e in range(run):
            for i in range(4):
                left[warp, g + 8 * (i % 2), run * quad + e + 4 * run * (i // 2)] = a[i][:, e]
            for i in range(2):
                right[warp, run * quad + e + 4 * run * i, g] = b[i][:, e]
        for i in range(4):
            total[warp, g + 8 * (i // 2), 2 * quad + i % 2] = c[i]
        total = total + (left @ right).astype(dtype)
        return [total[warp, g + 8 * (i // 2), 2 * quad + i % 2] for i in range(4)]


def _bytes(word: Words) -> UInt8[np.ndarray, "threads 4"]:
    return np.ascontiguousarray(word).view(np.uint8).reshape(-1, 4)


def _halves(half: Half, pair: Words) -> Shaped[np.ndarray, "threads 2"]:
    return np.ascontiguousarray(pair).view(_DTYPES[half]).reshape(-1, 2)


def _joined(half: Half, values: Float32[np.ndarray, "threads 2"]) -> Words:
    return np.ascontiguousarray(values.astype(_DTYPES[half])).view(np.uint32).reshape(-1)
