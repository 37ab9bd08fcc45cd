# SPDX-License-Identifier: Apache-2.0
"""A long run whose output is not whole yet, and what the next run needs to go on with it.

    .OUT.partial/
      lock            held by the process at work; the system lets go of it when that ends
      run.json        what decides the result: a run in which it differs does not go on with this one
      choice.json     the schemes that a budget's measurements chose; not there without a budget
      model/          what becomes OUT, in one step, when it is whole
      finished/       a file for each finished part, written when its tensors are on the disk

A kill at any moment leaves a part either finished or not, and a part that is not finished is done
again; so is the writing of the last files and the renaming.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from qjax_checkpoints.atomic import check_writable, disk_full_reason, flush, flush_directory
from qjax_checkpoints.json_file import read_json, write_json

_LOCK, _RUN, _CHOICE = "lock", "run.json", "choice.json"
_MODEL, _FINISHED = "model", "finished"


def partial_path(out: Path) -> Path:
    """Returns where an output lies while it is not whole."""
    return out.absolute().parent / f".{out.name}.partial"


class UnfinishedRun:
    """The directory of a run; `unfinished_run` makes one.

    Args:
        folder: the directory.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.model = folder / _MODEL
        self._finished = folder / _FINISHED

    @property
    def has_finished_parts(self) -> bool:
        """Says whether there is work that would be lost."""
        return self.model.is_dir() and bool(self.finished_parts)

    @property
    def finished_parts(self) -> list[str]:
        """The parts that are finished, by name."""
        return sorted(path.stem for path in self._finished.glob("*.json"))

    def finished(self, part: str) -> dict[str, Any] | None:
        """Returns what was noted of a part when it was finished; None: it is not.

        Raises:
            ValueError: the note is broken.
        """
        path = self._note(part)
        return read_json(path) if path.exists() else None

    def finish(self, part: str, note: dict[str, Any]) -> None:
        """Notes that a part is finished; everything of it must be on the disk."""
        _write_durably(self._note(part), note)

    def choice(self) -> dict[str, Any] | None:
        """Returns what was chosen for the finished parts; None: nothing was.

        Raises:
            ValueError: the note is broken.
        """
        path = self.folder / _CHOICE
        return read_json(path) if path.exists() else None

    def choose(self, choice: dict[str, Any]) -> None:
        """Notes what is chosen for all parts, before the first of them is finished."""
        _write_durably(self.folder / _CHOICE, choice)

    def _note(self, part: str) -> Path:
        return self._finished / f"{part}.json"

    def begin(self, identity: Mapping[str, str]) -> None:
        """Makes the directory that of a run in which nothing is finished yet."""
        for path in (self._finished, self.model):
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
        (self.folder / _CHOICE).unlink(missing_ok=True)
        _write_durably(self.folder / _RUN, dict(identity))

    def difference(self, identity: Mapping[str, str]) -> str | None:
        """Returns in words in what another run differs; None: it has the same result."""
        ours = read_json(self.folder / _RUN)
        for key in identity:
            if ours.get(key) != identity[key]:
                return f"its {key} was {ours.get(key)}, now it is {identity[key]}"
        return None


@contextlib.contextmanager
def unfinished_run(
    out: Path, identity: Mapping[str, str], *, resume: bool
) -> Iterator[UnfinishedRun]:
    """Hands out the directory of a run whose `model` becomes `out` when the block ends well.

    When it ends otherwise, finished parts stay for a run with `resume`; without any, nothing stays.

    Args:
        out: the directory to make; it must not exist.
        identity: what decides the result, in words, each under what it is called.
        resume: whether to go on with what an earlier run has finished, if there is anything.

    Raises:
        ValueError: `out` exists or cannot be made; an unfinished run is there and `resume` is not
            wanted, or it is another run; another process is at work on it; the disk is full.
    """
    check_writable(out)
    run = UnfinishedRun(partial_path(out))
    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / _LOCK).open("w") as lock:
        _take(lock, out)
        if not run.has_finished_parts:
            resume = False
        elif not resume:
            raise ValueError(
                f"{out}: an unfinished run lies in {run.folder}: go on with it by --resume, or "
                "remove it"
            )
        elif different := run.difference(identity):
            raise ValueError(
                f"{out}: the unfinished run in {run.folder} is another one: {different}; go on with "
                "what it was, or remove it"
            )
        try:
            if not resume:
                run.begin(identity)
            yield run
            flush(run.model)
            check_writable(out)  # renaming onto an empty directory made meanwhile would replace it
            run.model.rename(out)
            flush_directory(out.absolute().parent)
        except BaseException as error:  # an interrupt must clean up too
            kept = run.has_finished_parts
            if not kept:
                shutil.rmtree(run.folder, ignore_errors=True)
            if reason := disk_full_reason(error):
                left = "go on by --resume" if kept else "nothing is left of it"
                raise ValueError(f"{out}: disk full while writing ({reason}); {left}") from error
            raise
        shutil.rmtree(run.folder, ignore_errors=True)


def _take(lock: IO[str], out: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"{out}: another process is writing it at this moment") from error


def _write_durably(path: Path, value: dict[str, Any]) -> None:
    """Writes a file that is there whole or not at all, whatever happens."""
    new = path.with_suffix(".new")
    write_json(new, value)
    with new.open("rb") as file:
        os.fsync(file.fileno())
    new.replace(path)
    flush_directory(path.parent)
