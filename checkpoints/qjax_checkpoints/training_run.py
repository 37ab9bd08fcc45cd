# SPDX-License-Identifier: Apache-2.0
"""What a training run keeps on disk: what it was begun with, its checkpoints and its log.

run.json       what decides the result; a resumed run must have the same
checkpoints/   Orbax: the state and what else is to be remembered of a step, the last two
log.csv        a row for each step that was logged

A checkpoint appears whole or not at all, so a kill at any moment leaves the one before it.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from qjax_checkpoints.json_file import read_json

_CHECKPOINTS = "checkpoints"


class TrainingRun:
    """A folder that belongs to one run.

    Args:
        path: the folder; made if it is not there.
        columns: of the log; the first is the number of the step, from 0.
    """

    def __init__(self, path: Path, columns: Sequence[str]):
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._header = ",".join(columns)
        self._checkpoints = ocp.CheckpointManager(
            (path / _CHECKPOINTS).absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=2, create=True),
        )

    @property
    def has_begun(self) -> bool:
        """Whether there is a run in the folder."""
        return (self.path / "run.json").is_file()

    def begin(self, description: dict[str, Any], resume: bool) -> None:
        """Writes `run.json`, or compares it when the run is resumed.

        Args:
            description: plain JSON types.
            resume: whether the folder must hold a run of this description.

        Raises:
            ValueError: a new run would overwrite one or go on from what another has left, there is none
                to resume, or it was begun with another description; the message says in what.
        """
        file = self.path / "run.json"
        if not resume:
            self._check_new()
            _write(file, json.dumps(description, indent=2) + "\n")
            return
        begun, wanted = self.description(), json.loads(json.dumps(description))
        changed = sorted(key for key in begun | wanted if begun.get(key) != wanted.get(key))
        if changed:
            told = "; ".join(
                f"{key} {_short(begun.get(key))}, not {_short(wanted.get(key))}" for key in changed
            )
            raise ValueError(f"{file}: the run was begun with another {', '.join(changed)}: {told}")

    def _check_new(self) -> None:
        """Refuses a folder that has been a run's: checkpoints do not say whose they are."""
        if self.has_begun:
            raise ValueError(
                f"{self.path}: holds a run already: --resume it, choose another output, or remove the "
                "whole folder"
            )
        # Hidden files are of writing that was killed; the manager makes its folder itself.
        left = {file.name for file in self.path.iterdir() if not file.name.startswith(".")}
        if not any((self.path / _CHECKPOINTS).iterdir()):
            left.discard(_CHECKPOINTS)
        if left:
            raise ValueError(
                f"{self.path}: holds {', '.join(sorted(left))} of a run that cannot be told (run.json is "
                "gone): choose another output, or remove the whole folder"
            )

    def description(self) -> dict[str, Any]:
        """Returns what `run.json` holds.

        Raises:
            ValueError: there is no run.
        """
        file = self.path / "run.json"
        if not file.is_file():
            raise ValueError(f"{file}: not there, so this folder holds no training run")
        return read_json(file)

    def save(self, step: int, state: PyTree, notes: dict[str, Any]) -> None:
        """Writes a checkpoint, whole or not at all.

        Args:
            step: how many steps are done.
            state: arrays.
            notes: plain JSON types to be remembered with them.
        """
        self._checkpoints.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(notes)
            ),
        )

    @property
    def step(self) -> int | None:
        """How many steps the last checkpoint has; None: there is none."""
        return self._checkpoints.latest_step()

    def latest(self, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """Reads the last checkpoint.

        Args:
            like: arrays or shapes of the state, in its structure.

        Returns:
            The state, and the notes that were saved with it.

        Raises:
            ValueError: there is none, or it cannot be read: which it is, and which is the one before.
        """
        step = self.step
        if step is None:
            raise ValueError(f"{self.path}: holds no checkpoint")
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        try:
            restored = self._checkpoints.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(target), progress=ocp.args.JsonRestore()
                ),
            )
        except Exception as error:  # Orbax and TensorStore raise many kinds, plain Exception too
            raise ValueError(self._why_unreadable(step, error)) from error
        return restored["state"], restored["progress"]

    def _why_unreadable(self, step: int, error: Exception) -> str:
        before = [other for other in self._checkpoints.all_steps() if other < step]
        then = f"step {max(before)}" if before else "the start"
        first = str(error).strip().partition("\n")[0].partition(". See full")[0][:200]
        # Removing it is left to the user: what fails may be the disk or the memory of this moment.
        return (
            f"{self.path / _CHECKPOINTS / str(step)}: this checkpoint cannot be read "
            f"({first or type(error).__name__}); if it is damaged, remove it, and --resume goes on from "
            f"{then}"
        )

    def close(self) -> None:
        """Waits until the last checkpoint is on the disk."""
        self._checkpoints.close()

    def rewind_log(self, step: int) -> None:
        """Keeps the rows of the first so many steps, and those only.

        Raises:
            ValueError: as `log_rows` does.
        """
        rows = [row for row in self.log_rows() if int(row.split(",", 1)[0]) < step]
        _write(self._log, "\n".join([self._header, *rows]) + "\n")

    def append_log(self, rows: Sequence[str]) -> None:
        """Adds rows of further steps."""
        with self._log.open("a") as file:
            file.write("".join(f"{row}\n" for row in rows))

    def log_rows(self) -> list[str]:
        """Returns the rows behind the header; a last one that was not written to its end is none.

        Raises:
            ValueError: the header or a row is damaged.
        """
        if not self._log.exists():
            return []
        lines = self._log.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
        for number, line in enumerate(lines, 1):
            if not (self._is_row(line) if number > 1 else line == self._header):
                right = f"numbers: {self._header}" if number > 1 else self._header
                raise ValueError(
                    f"{self._log}: line {number} is {_short(line)}, and should be {right}; mend it, or "
                    "remove the file, which training goes on without"
                )
        return lines[1:]

    def _is_row(self, line: str) -> bool:
        step, *values = line.split(",")
        try:
            numbers = [int(step), *map(float, values)]
        except ValueError:
            return False
        return len(numbers) == 1 + self._header.count(",")

    @property
    def _log(self) -> Path:
        return self.path / "log.csv"


def _write(file: Path, text: str) -> None:
    """Writes a file, whole or not at all."""
    beside = file.with_name(f".{file.name}.partial")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, file)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
