# SPDX-License-Identifier: Apache-2.0
"""Where output goes: results to stdout, progress and warnings to stderr."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)


class Console:
    """Output of one command.

    Args:
      json_only: stdout carries one JSON object and nothing else.
    """

    def __init__(self, *, json_only: bool):
        self._json_only = json_only
        self._err = RichConsole(stderr=True, soft_wrap=True, highlight=False)

    def result(self, values: dict[str, Any], *shown: str) -> None:
        """Prints the result once: as JSON, or as lines for a person.

        Args:
          values: what `--json` prints.
          *shown: what a person reads instead.
        """
        if self._json_only:
            print(json.dumps(values))
            return
        for item in shown:
            print(item)

    def text(self, piece: str) -> None:
        """Writes a piece of what a person reads at once, unless stdout is for JSON."""
        if not self._json_only:
            sys.stdout.write(piece)
            sys.stdout.flush()

    def note(self, line: str) -> None:
        """Tells something on stderr, where it does not mix with results."""
        self._err.print(line, markup=False)

    @contextmanager
    def progress(self, what: str, total: int, *, beside_text: bool = False) -> Iterator["Bar"]:
        """A progress bar on stderr; silent where stderr is no terminal.

        Args:
          what: the bar's text.
          total: steps.
          beside_text: whether `text` tells as much, so that the bar is for JSON alone.
        """
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        quiet = not self._err.is_terminal or (beside_text and not self._json_only)
        with Progress(*columns, console=self._err, transient=True, disable=quiet) as progress:
            yield Bar(progress, progress.add_task(what, total=total))


class Bar:
    """One running progress bar; `Console.progress` makes it."""

    def __init__(self, progress: Progress, task: TaskID):
        self._progress, self._task = progress, task

    def advance(self, what: str | None = None) -> None:
        """One step further; `what` replaces the bar's text."""
        self._progress.update(self._task, advance=1, description=what)

    def reach(self, done: int, what: str | None = None) -> None:
        """Sets how many steps are done; `what` replaces the bar's text."""
        self._progress.update(self._task, completed=done, description=what)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Text in columns as wide as they need to be, in a terminal and in a pipe alike.

    Args:
      headings: one a column.
      rows: cells.
      left: how many of the first columns are words; the others are numbers, set to the right.

    >>> print(table(["name", "bits"], [["int4", "4.125"], ["nf4", "4.25"]]))
    name   bits
    int4  4.125
    nf4    4.25
    """
    columns = list(zip(headings, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    return "\n".join(line(row, widths, left=left) for row in (headings, *rows))


def line(cells: Sequence[str], widths: Sequence[int], *, left: int = 1) -> str:
    """One line of a :func:`table` whose widths are known before all of its cells are.

    Args:
      cells: one a column.
      widths: characters of each.
      left: as in :func:`table`.

    >>> line(["int4", "4.125"], [6, 7])
    'int4      4.125'
    """
    set_ = [
        cell.ljust(width) if i < left else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(set_).rstrip()
