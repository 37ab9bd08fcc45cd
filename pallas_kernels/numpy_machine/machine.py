# SPDX-License-Identifier: Apache-2.0
"""Runs a kernel of :mod:`pallas_kernels.machine` with numpy: block by block, all its threads at once."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int64, UInt32

from pallas_kernels.machine import Half, Machine, Operand, Pointer, Rows
from pallas_kernels.numpy_machine import products
from pallas_kernels.numpy_machine.products import Pending
from pallas_kernels.numpy_machine.reals import NumpyReals, Reals
from pallas_kernels.numpy_machine.waiting import Arrival, Turns
from pallas_kernels.numpy_machine.words import (
    Words,
    bytes_in,
    elements,
    halves,
    inside_rows,
    inside_tokens,
    joined,
)


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
class NumpyPointer(Pointer):
    """A place for each thread in a flat array of words."""

    array: UInt32[np.ndarray, " _words"]
    index: Int64[np.ndarray, " _threads"]
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

    def load_where(self, offset: int, where: Any) -> Words:
        """Reads; refuses places outside the array where the condition holds."""
        places = self.index.astype(np.int64) + offset
        active = self.machine.active & where
        if np.any(places[active] >= self.array.size):
            raise IndexError(f"word {places[active].max()} of an array of {self.array.size}")
        return np.where(active, self.array[np.where(active, places, 0)], np.uint32(0))

    def advanced(self, count: Words | int, each: int = 1) -> "NumpyPointer":
        """Further on."""
        far = np.asarray(count, np.int64) * each
        return NumpyPointer(self.array, self.index + far, self.machine)


class NumpyMachine(NumpyReals, Machine):
    """One block of threads; see :class:`pallas_kernels.machine.Machine`."""

    def __init__(self, *, threads: int, block: tuple[int, int], shared: int):
        """A block whose shared memory nobody has written."""
        self.thread = np.arange(threads, dtype=np.uint32)
        self.warp = self.thread // np.uint32(32)
        self.block = (self.word(block[0]), self.word(block[1]))
        self.active = np.ones(threads, bool)
        self._shared = np.zeros(shared, np.uint32)
        self._written = np.zeros(shared, bool)
        self._writers: dict[int, int] = {}  # of words that only they see: since the last barrier
        self._seen: dict[int, int] = {}  # words that only the threads of a warpgroup see, likewise
        self._going_out: set[int] = set()  # words that copies out may still be reading
        self._gone: set[int] = set()  # of those what who began the copies has waited for
        self._arrivals: dict[int, Arrival] = {}  # by their place
        self._loads = 0  # loads of shared memory so far, one of all threads counted once
        self._done_loads = 0  # those that all threads are known to have done with
        self._loaded = np.zeros(shared, np.int64)  # the last load of each word
        self._stored: set[int] = set()  # words that threads wrote, and no copy: not for wgmma
        self._under_way: list[set[int]] = []  # what each product reads that is not waited for
        self._waited: list[
            set[int]
        ] = []  # by the threads themselves; by all of them after a barrier
        self._turns: Turns | None = None  # where there are two parts

    def pointer(self, array: np.ndarray, word: Words) -> NumpyPointer:
        """A place in the bits of an array."""
        return NumpyPointer(
            array.reshape(-1).view(np.uint32),
            np.broadcast_to(word, self.thread.shape).astype(np.int64),
            self,
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

    def shared_store(self, index: Words, value: Words, offset: int = 0) -> None:
        """Writes; refuses places that another thread has written since the last barrier."""
        index = index + np.uint32(offset)
        self._check_free(index)
        self._write(index, value, self.thread)

    def _check_free(self, index: np.ndarray) -> None:
        places = set(index.reshape(-1).tolist())
        if any(places & read for read in (*self._under_way, *self._waited)):
            raise ValueError("shared memory is written that a wgmma may still be reading")
        if places & self._going_out:
            raise ValueError("shared memory is written that a copy out may still be reading")

    def _write(self, index: np.ndarray, word: np.ndarray, threads: np.ndarray) -> None:
        for place, thread in zip(index.tolist(), threads.tolist(), strict=True):
            if self._seen.pop(place, thread // 128) != thread // 128:
                raise ValueError(f"thread {thread} overwrites word {place} of another warpgroup")
            if self._writers.setdefault(place, thread) != thread:
                raise ValueError(
                    f"threads {self._writers[place]} and {thread} race for word {place}"
                )
        self._stored.update(index.tolist())
        self._shared[index] = word
        self._written[index] = True

    def shared_load(self, index: Words, offset: int = 0) -> Words:
        """Reads; refuses what was written since the last barrier, or never."""
        index = index + np.uint32(offset)
        self._check_readable(index, self.thread // 128)
        self._loads += 1
        self._loaded[index] = self._loads
        return self._shared[index]

    def _check_readable(self, index: np.ndarray, warpgroups: np.ndarray) -> None:
        places = index.reshape(-1).tolist()
        if self._writers.keys() & set(places):
            raise ValueError("shared memory is read without a barrier after it was written")
        if self._seen and any(
            self._seen.get(place, warpgroup) != warpgroup
            for place, warpgroup in zip(places, warpgroups.tolist(), strict=True)
        ):
            raise ValueError("shared memory is read that another warpgroup has written for itself")
        if not self._written[index].all():
            raise ValueError("shared memory is read that nobody has written")

    def shared_load_row(self, index: Words, count: int, offset: int = 0) -> list[Words]:
        """Reads; refuses rows that are not aligned."""
        index = index + np.uint32(offset)
        if np.any(index % count):
            raise IndexError(f"a row of {count} words of shared memory at {index[0]}")
        return [self.shared_load(index + np.uint32(i)) for i in range(count)]

    def shared_load_matrices(self, index: Words) -> list[Words]:
        """Reads the rows that other lanes name."""
        if np.any(index % 4):
            raise IndexError(f"a row of 4 words of shared memory at {index[index % 4 != 0][0]}")
        lane = self.thread % 32
        rows = [index[self.thread - lane + 8 * i + lane // 4] for i in range(4)]
        return [self.shared_load(row + lane % 4) for row in rows]

    def shared_store_matrices(self, index: Words, words: Sequence[Words]) -> None:
        """Writes the columns that lanes name; of two matrices the upper lanes name none."""
        if np.any(index % 4):
            raise IndexError(f"a row of 4 words of shared memory at {index[index % 4 != 0][0]}")
        warps, column = np.arange(len(index) // 32)[:, None], np.arange(8)
        for i, word in enumerate(words):
            # [warp, g, 2 c + e] to a row of eight elements for each column 2 c + e.
            halves = np.ascontiguousarray(word).view(np.uint16).reshape(-1, 8, 8)
            rows = np.ascontiguousarray(halves.swapaxes(1, 2)).view(np.uint32)  # warp, column, 4
            threads = 32 * warps + 8 * i + column
            places = index[threads][:, :, None] + np.arange(4)
            self._check_free(places)
            named = np.broadcast_to(threads[:, :, None], places.shape)
            self._write(places.reshape(-1), rows.reshape(-1), named.reshape(-1))

    def start_arrivals(self, place: Words, count: int, threads: int) -> None:
        """Refuses places that differ: one thread does it."""
        if np.any(place != place[0]):
            raise ValueError("threads start arrivals at different places")
        for arrival in range(int(place[0]), int(place[0]) + 2 * count, 2):
            self._arrivals[arrival] = Arrival(threads)

    def one_thread(self, where: Any, body: Callable[[], None]) -> None:
        """The first of each warp; refuses a condition that parts a warp."""
        where = np.ones_like(self.active) if where is None else where
        if np.any(where != np.repeat(where[::32], 32)):
            raise ValueError("a condition for one thread of a warp parts the warp")
        with self._only(where & (self.thread % 32 == 0)):
            body()

    def arrive(self, arrival: Words) -> None:
        """Notes what the threads have waited for: it may be written over once the turn is waited for."""
        places = arrival[self.active]
        for place, count in zip(*np.unique(places, return_counts=True), strict=True):
            self._arrivals[int(place)].arrive(int(count), self._waited, self._loads)

    def expect(self, arrival: Words, nbytes: int) -> None:
        """Refuses an arrival whose last turn nobody has waited for."""
        for place in arrival[self.active].tolist():
            if self._arrivals[place].expected:
                raise ValueError("an arrival is told again what to expect before it was waited for")
            self._arrivals[place].expected = nbytes
            self._arrivals[place].arrive(1, [], 0)

    def copy_words(self, place: Words, source: NumpyPointer, count: int, arrival: Words) -> None:
        """Reads at once; writes when it is waited for."""
        for thread in np.flatnonzero(self.active):
            first, start = int(source.index[thread]), int(place[thread])
            if start % 4 or first % 4 or count % 4:
                raise IndexError(f"{count} words from {first} to {start} of shared memory")
            if first + count > source.array.size:
                raise IndexError(f"words to {first + count} of an array of {source.array.size}")
            self._begin(
                arrival[thread], start + np.arange(count), source.array[first : first + count]
            )

    def copy_tokens(
        self, place: Words, array: np.ndarray, token: Words, column: Words, tokens: int,
        arrival: Words,
    ) -> None:  # fmt: skip
        """Reads at once; writes when it is waited for."""
        words = np.ascontiguousarray(array).view(np.uint32)
        for thread in np.flatnonzero(self.active):
            start, first = int(place[thread]), int(token[thread])
            if start % 256:
                raise IndexError(f"tokens at {start} of shared memory, must be a multiple of 256")
            left = int(column[thread]) * array.dtype.itemsize // 4
            rows = np.zeros((tokens, 32), np.uint32)
            present = words[first : first + tokens, left : left + 32]
            rows[: len(present)] = present
            places = start + inside_tokens(tokens, 0, 32)
            self._begin(arrival[thread], places.reshape(-1), rows.reshape(-1))

    def copy_out(
        self, place: Words, array: np.ndarray, token: Words, output: Words, tokens: int
    ) -> None:
        """Writes at once; refuses what is not there yet, and places that were written before."""
        for thread in np.flatnonzero(self.active):
            start, first, left = (int(word[thread]) for word in (place, token, output))
            if start % 256:
                raise IndexError(f"results at {start} of shared memory, must be a multiple of 256")
            places = start + inside_tokens(tokens, 0, 32)
            self._check_readable(places, np.full(places.size, thread // 128))
            self._going_out.update(places.reshape(-1).tolist())
            rows = self._shared[places].view(array.dtype)
            there = array[first : first + tokens, left : left + rows.shape[1]]
            if not np.isnan(there.astype(np.float32)).all():
                raise ValueError("a place is stored to twice; the output must begin as NaN")
            there[:] = rows[: there.shape[0], : there.shape[1]]

    def wait_for_copies_out(self) -> None:
        """The threads that began them know; others do after a barrier."""
        self._gone |= self._going_out

    def _begin(self, arrival: Any, places: np.ndarray, words: np.ndarray) -> None:
        self._check_free(places)
        if np.any(self._loaded[places] > self._done_loads):
            raise ValueError("a copy begins to where threads may still be loading from")
        self._written[places] = False
        self._arrivals[int(arrival)].copies.append((places, words))

    def wait_for(self, arrival: Words, turn: Words) -> None:
        """The other part goes on meanwhile, if there is one; refuses to wait for ever."""
        for place in np.unique(arrival):
            turns = np.unique(turn[arrival == place] % 2)
            waited = self._arrivals[int(place)]

            def is_over(turns: np.ndarray = turns, waited: Arrival = waited) -> bool:
                if waited.arrived == waited.threads:
                    waited.finish(self.arrived)
                return len(turns) == 1 and waited.turns % 2 != int(turns[0])

            if self._turns is not None:
                self._turns.pass_until(is_over)
            if not is_over():
                waited.refuse(turns)
            self._done_loads = max(self._done_loads, waited.loads)
            free = [id(read) for read in waited.reads]
            self._waited = [read for read in self._waited if id(read) not in free]

    def parted(
        self,
        threads: int,
        registers: tuple[int, int],
        first: Callable[[Machine], None],
        rest: Callable[[Machine], None],
    ) -> None:
        """One runs until it waits for the other, or is done."""
        given = sum(
            r * t for r, t in zip(registers, (threads, len(self.thread) - threads), strict=True)
        )
        if threads % 128 or any(count % 8 for count in registers) or given > 65536:
            raise ValueError(f"{registers} registers for {threads} of {len(self.thread)} threads")
        whole, block = self._state(), (int(self.block[0][0]), int(self.block[1][0]))
        parts = []
        for part in (slice(0, threads), slice(threads, None)):
            self._become((*(values[part] for values in whole[:3]), self.block))
            self.block = (self.word(block[0]), self.word(block[1]))
            parts.append(self._state())
        self._turns = Turns(state=self._state, become=self._become)
        try:
            self._turns.run((parts[0], lambda: first(self)), (parts[1], lambda: rest(self)))
        finally:
            self._turns = None
            self._become(whole)

    def _state(self) -> tuple[Any, ...]:
        """Whose threads these are, and which of them run."""
        return self.thread, self.warp, self.active, self.block

    def _become(self, state: tuple[Any, ...]) -> None:
        self.thread, self.warp, self.active, self.block = state

    def arrived(self, places: np.ndarray, words: np.ndarray) -> None:
        """What a copy brought, all threads that waited for it see."""
        self._check_free(places)
        self._shared[places] = words
        self._written[places] = True
        self._stored.difference_update(places.tolist())

    def barrier(self) -> None:
        """Makes writes visible, and frees what loads, and products that were waited for, have read."""
        self._done_loads = self._loads
        self._writers.clear()
        self._seen.clear()
        self._waited.clear()
        self._forget_gone()

    def _forget_gone(self) -> None:
        self._going_out -= self._gone
        self._gone.clear()

    def warpgroup_barrier(self) -> None:
        """Makes writes visible to the warpgroup of who wrote."""
        self._seen.update({place: thread // 128 for place, thread in self._writers.items()})
        self._writers.clear()
        self._forget_gone()

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
                state = [self._chosen(n, s) for n, s in zip(new, state, strict=True)]
        return state

    def _chosen(self, new: Any, old: Any) -> Any:
        """The new value for active threads; sums under way are the same for all of them."""
        return new if isinstance(new, Pending) else np.where(self.active, new, old)

    @contextlib.contextmanager
    def _only(self, where: Any) -> Iterator[None]:
        before = self.active
        self.active = before & where
        try:
            yield
        finally:
            self.active = before

    def from_lane(self, value: Reals, lane: Words) -> Reals:
        """Gathers; refuses lanes that there are not, and threads that do not run."""
        if np.any(lane >= 32) or not self.active.all():
            raise IndexError(f"lane {lane.max()} of a warp of 32, of which {self.active.sum()} run")
        return value[self.thread // 32 * 32 + lane - self.thread[0]]

    def as_word(self, value: Reals) -> Words:
        """The same bits."""
        return value.view(np.uint32)

    def as_real(self, bits: Words) -> Reals:
        """The same bits."""
        return bits.view(np.float32)

    def rounded(self, integer: Words) -> Reals:
        """To the nearest."""
        return integer.view(np.int32).astype(np.float32)

    def half_pair(self, half: Half, low: Reals, high: Reals) -> Words:
        """To the nearest."""
        return joined(half, np.stack([low, high], axis=-1))

    def half_pair_minus(self, half: Half, a: Words, b: Words) -> Words:
        """Pair by pair."""
        wide = halves(half, a).astype(np.float32) - halves(half, b).astype(np.float32)
        return joined(half, wide)

    def half_pair_times(self, half: Half, a: Words, b: Words) -> Words:
        """Pair by pair."""
        wide = halves(half, a).astype(np.float32) * halves(half, b).astype(np.float32)
        return joined(half, wide)

    def bytes_of(self, a: Words, b: Words, places: int) -> Words:
        """Gathers them."""
        given = np.concatenate([bytes_in(a), bytes_in(b)], axis=-1)
        chosen = given[:, [places >> 4 * i & 7 for i in range(4)]]
        return np.ascontiguousarray(chosen).view(np.uint32).reshape(-1)

    def lifted(self, word: Words, mask: int, unit: Words) -> Words:
        """Bit by bit."""
        return word & np.uint32(mask) ^ unit

    def e4m3_as_half(self, word: Words, which: str) -> Words:
        """Every value is one of float16 too."""
        values = bytes_in(word).view(jnp.float8_e4m3fn).astype(np.float32)
        return joined("float16", values[:, :2] if which == "low" else values[:, 2:])

    def half_as_real(self, half: Half, pair: Words, which: str) -> Reals:
        """Low or high half."""
        return halves(half, pair)[:, 0 if which == "low" else 1].astype(np.float32)

    def mma(
        self, half: Half, a: Sequence[Words], b: Sequence[Words], c: Sequence[Reals]
    ) -> list[Reals]:
        """Products of float32 matrices."""
        left, right = ([halves(half, w).astype(np.float32) for w in words] for words in (a, b))
        return products.of_warps(self.thread, left, right, c, np.float32)

    def mma_int8(self, a: Sequence[Words], b: Sequence[Words], c: Sequence[Words]) -> list[Words]:
        """Products of integers; a sum beyond int32 wraps, as it does on the device."""
        left, right = ([bytes_in(w).view(np.int8).astype(np.int32) for w in ws] for ws in (a, b))
        return products.of_warps(self.thread, left, right, c, np.uint32)

    def wgmma(
        self,
        kind: Operand,
        a: Sequence[Sequence[Words]] | Sequence[Rows],
        tile: Words,
        step: int,
        sums: Sequence[Sequence[Any]] | None,
        tokens: int,
    ) -> list[list[Pending]]:
        """Multiplies at once, and remembers what must not change until it is waited for."""
        if tokens % 8 or (kind == "int8" and tokens > 32 and tokens % 16):
            raise ValueError(f"there is no product of {tokens} tokens of {kind}")
        if sums is None:
            nothing = self.word(0) if kind == "int8" else self.real(0.0)
            sums = [[nothing] * (tokens // 2) for _ in a]
        places = self._operand(tile, 256, inside_tokens(tokens, 2 * step, 8))
        right = elements(kind, self._shared[places].reshape(-1))
        right = np.repeat(right.reshape(len(places), tokens, -1), 4, axis=0).swapaxes(1, 2)
        read, results = set(places.reshape(-1).tolist()), []
        for part, values in zip(a, sums, strict=True):
            if isinstance(part, Rows):
                places = self._operand(part.place + part.words, 128, inside_rows(part.part))
                read.update(places.reshape(-1).tolist())
                left = elements(kind, self._shared[places].reshape(-1))
                left = left.reshape(4 * len(places), 16, -1)
            else:
                words = [elements(kind, word) for word in part]
                left = products.rows_of(self.thread, words)
            product = products.of_warpgroups(self.thread, kind, left, right, values)
            results.append(product)
        self._under_way.append(read)
        return results

    def _operand(
        self, start: Words, multiple: int, inside: Int64[np.ndarray, "_rows _words"]
    ) -> Int64[np.ndarray, "_warpgroups _rows _words"]:
        """The words of an operand in shared memory, that copies have brought there."""
        starts = start.reshape(-1, 128)  # a warpgroup a row
        if np.any(starts != starts[:, :1]) or np.any(starts % multiple):
            raise IndexError(
                f"tiles begin at {starts[:, 0]}: one multiple of {multiple} a warpgroup"
            )
        places = starts[:, :1, None] + inside
        if set(places.reshape(-1).tolist()) & self._stored:
            raise ValueError("wgmma reads shared memory that threads wrote: it sees copies alone")
        if not self._written[places].all():
            raise ValueError("wgmma reads shared memory that nobody has written")
        return places

    def wait(self, pending: int, sums: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """Turns sums into numbers once nothing is under way."""
        done = max(len(self._under_way) - pending, 0)
        self._waited += self._under_way[:done]
        self._under_way = self._under_way[done:]
        if pending:
            return [list(values) for values in sums]
        return [[v.value if isinstance(v, Pending) else v for v in values] for values in sums]
