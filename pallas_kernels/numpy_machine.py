# SPDX-License-Identifier: Apache-2.0
"""Runs a kernel of :mod:`pallas_kernels.machine` with numpy: block by block, all its threads at once."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Shaped, UInt32

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
      shared: float32 of shared memory.
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
        """A block whose shared memory holds NaN until it is written."""
        self.thread = np.arange(threads, dtype=np.uint32)
        self.warp = self.thread // np.uint32(32)
        self.block = (self.word(block[0]), self.word(block[1]))
        self.active = np.ones(threads, bool)
        self._shared = np.full(shared, np.nan, np.float32)
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

    def shared_store(self, index: Words, value: Reals) -> None:
        """Writes; refuses places that another thread has written since the last barrier."""
        for place, thread in zip(index.tolist(), self.thread.tolist(), strict=True):
            if self._writers.setdefault(place, thread) != thread:
                raise ValueError(
                    f"threads {self._writers[place]} and {thread} race for word {place}"
                )
        self._shared[index] = value

    def shared_load(self, index: Words) -> Reals:
        """Reads; refuses what was written since the last barrier, or never."""
        if self._writers.keys() & set(index.tolist()):
            raise ValueError("shared memory is read without a barrier after it was written")
        values = self._shared[index]
        if np.isnan(values).any():
            raise ValueError("shared memory is read that nobody has written")
        return values

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

    def half_pair_minus(self, half: Half, a: Words, b: Words) -> Words:
        """Pair by pair."""
        wide = _halves(half, a).astype(np.float32) - _halves(half, b).astype(np.float32)
        return _joined(half, wide)

    def twice(self, pair: Words, which: str) -> Words:
        """Low or high half, in both."""
        one = pair & np.uint32(0xFFFF) if which == "low" else pair >> np.uint32(16)
        return one | (one << np.uint32(16))

    def half_as_real(self, half: Half, pair: Words, which: str) -> Reals:
        """Low or high half."""
        return _halves(half, pair)[:, 0 if which == "low" else 1].astype(np.float32)

    def mma(
        self, half: Half, a: Sequence[Words], b: Sequence[Words], c: Sequence[Reals]
    ) -> list[Reals]:
        """Gathers the fragments of each warp, multiplies, scatters the result."""
        lane = self.thread.astype(np.int64) % 32
        warp, g, quad = self.warp.astype(np.int64), lane // 4, lane % 4
        warps = len(lane) // 32
        left = np.empty((warps, 16, 16), np.float32)
        right = np.empty((warps, 16, 8), np.float32)
        total = np.empty((warps, 16, 8), np.float32)
        for i in range(4):
            for e in range(2):
                left[warp, g + 8 * (i % 2), 2 * quad + e + 8 * (i // 2)] = _halves(half, a[i])[:, e]
        for i in range(2):
            for e in range(2):
                right[warp, 2 * quad + e + 8 * i, g] = _halves(half, b[i])[:, e]
        for i in range(4):
            total[warp, g + 8 * (i // 2), 2 * quad + i % 2] = c[i]
        total = total + left @ right
        return [total[warp, g + 8 * (i // 2), 2 * quad + i % 2] for i in range(4)]


def _halves(half: Half, pair: Words) -> Shaped[np.ndarray, "threads 2"]:
    return np.ascontiguousarray(pair).view(_DTYPES[half]).reshape(-1, 2)


def _joined(half: Half, values: Float32[np.ndarray, "threads 2"]) -> Words:
    return np.ascontiguousarray(values.astype(_DTYPES[half])).view(np.uint32).reshape(-1)
