# SPDX-License-Identifier: Apache-2.0
"""What threads of :mod:`pallas_kernels.numpy_machine` wait for: arrivals, and other threads."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Arrival:
    """What threads and copies are waited for through."""

    threads: int
    turns: int = 0
    arrived: int = 0
    expected: int = 0
    copies: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)

    reads: list[set[int]] = field(default_factory=list)
    loads: int = 0

    def arrive(self, threads: int, reads: list[set[int]], loads: int) -> None:
        """Counts threads; they are done with what products and so many loads have read."""
        self.arrived += threads
        self.reads, self.loads = [*reads], loads

    def refuse(self, turns: np.ndarray) -> None:
        """Says why a turn does not come."""
        if self.arrived:
            raise ValueError(f"{self.arrived} threads arrive where {self.threads} are waited for")
        raise ValueError(f"turn {turns} of an arrival that has had {self.turns} is waited for")

    def finish(self, bring: Callable[[np.ndarray, np.ndarray], None]) -> None:
        """Brings everything, and begins anew."""
        brought = 4 * sum(len(words) for _, words in self.copies)
        if brought != self.expected:
            raise ValueError(f"an arrival expects {self.expected} bytes, copies bring {brought}")
        for places, words in self.copies:
            bring(places, words)
        self.turns, self.arrived, self.expected, self.copies = self.turns + 1, 0, 0, []


@dataclass
class Turns:
    """Two programs, of which one runs until it waits for what the other does.

    Never do both run, and so all that happens is the same each time.

    Attributes:
      state: what a program must find again when it goes on.
      become: is given that.
    """

    state: Callable[[], Any]
    become: Callable[[Any], None]
    _own: tuple[threading.Semaphore, threading.Semaphore] = field(
        default_factory=lambda: (threading.Semaphore(1), threading.Semaphore(0))
    )
    _now: int = 0
    _over: list[bool] = field(default_factory=lambda: [False, False])
    _waits: list[bool] = field(
        default_factory=lambda: [False, False]
    )  # in vain, since either went on
    _error: BaseException | None = None

    def run(self, *programs: tuple[Any, Callable[[], None]]) -> None:
        """Runs both to their ends, each from its state on; raises what either raises."""
        other = threading.Thread(target=self._run, args=(1, *programs[1]), daemon=True)
        other.start()
        self._run(0, *programs[0])
        other.join()
        if self._error is not None:
            raise self._error

    def _run(self, own: int, state: Any, program: Callable[[], None]) -> None:
        self._own[own].acquire()
        try:
            if self._error is None:
                self.become(state)
                program()
        except BaseException as error:  # noqa: BLE001  raised where both have ended
            self._error = self._error or error
        self._over[own] = True
        self._hand_over()

    def pass_until(self, is_true: Callable[[], bool]) -> None:
        """Lets the other go on until something is true, or nobody is left who could make it so."""
        own = self._now
        while not is_true():
            if self._over[1 - own] or self._error is not None or all(self._waits):
                return
            self._waits[own] = True
            mine = self.state()
            self._hand_over()
            self._own[own].acquire()
            self.become(mine)
        self._waits = [False, False]

    def _hand_over(self) -> None:
        self._now = 1 - self._now
        self._own[self._now].release()
