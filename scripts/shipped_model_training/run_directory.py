# SPDX-License-Identifier: Apache-2.0
"""What a training run keeps on disk: its settings, its checkpoints and its log.

run.json       shape and settings; a resumed run must have the same
checkpoints/   Orbax: parameters, optimizer state and progress, the last two
log.csv        one row per step
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

_LOG_HEADER = "step,loss,rate_factor,seconds"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run has come."""

    step: int = 0  # optimizer steps done
    num_steps: int | None = None  # steps of the whole run; None until the throughput is known
    settled_by: str = ""  # what fixed `num_steps`, in words
    seconds: float = 0.0  # spent on steps, the first dispatch of each session left out
    sessions: int = 0  # how often the run was started


class RunDirectory:
    """A folder that belongs to one run."""

    def __init__(self, path: Path):
        """Open the folder; nothing is written yet."""
        self.path = path
        self._checkpoints = ocp.CheckpointManager(
            (path / "checkpoints").absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=2, create=True),
        )

    def begin(self, description: dict[str, Any], resume: bool) -> None:
        """Write `run.json`, or compare it when the run is resumed.

        Raises:
            ValueError: a new run would overwrite one, or a resumed run differs from what was begun.
        """
        file = self.path / "run.json"
        if not resume:
            if file.exists():
                raise ValueError(
                    f"{self.path}: holds a run already: --resume it or name another folder"
                )
            file.write_text(json.dumps(description, indent=2) + "\n")
            return
        begun = self.description()
        changed = sorted(
            key for key in begun | description if begun.get(key) != description.get(key)
        )
        if changed:
            raise ValueError(f"{file}: the run was begun with other {', '.join(changed)}")

    def description(self) -> dict[str, Any]:
        """Return what `run.json` holds.

        Raises:
            ValueError: there is no run.
        """
        file = self.path / "run.json"
        if not file.is_file():
            raise ValueError(f"{file}: not there, so this folder holds no training run")
        return json.loads(file.read_text())

    def save(self, state: PyTree, progress: Progress) -> None:
        """Write a checkpoint, whole or not at all."""
        self._checkpoints.save(
            progress.step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(asdict(progress))
            ),
        )

    def latest(self, like: PyTree) -> tuple[PyTree, Progress]:
        """Read the last checkpoint.

        Args:
            like: arrays or shapes of the state, in its structure.

        Raises:
            ValueError: there is none.
        """
        step = self._checkpoints.latest_step()
        if step is None:
            raise ValueError(f"{self.path}: holds no checkpoint")
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        restored = self._checkpoints.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(target), progress=ocp.args.JsonRestore()
            ),
        )
        return restored["state"], Progress(**restored["progress"])

    def close(self) -> None:
        """Wait until the last checkpoint is on the disk."""
        self._checkpoints.close()

    def rewind_log(self, step: int) -> None:
        """Keep the log's rows of the first `step` steps, and those only."""
        rows = self.log_rows()[:step]
        self._log.write_text("\n".join([_LOG_HEADER, *rows]) + "\n")

    def append_log(self, rows: Sequence[str]) -> None:
        """Add rows of further steps."""
        with self._log.open("a") as file:
            file.write("".join(f"{row}\n" for row in rows))

    def log_rows(self) -> list[str]:
        """Return the rows behind the header."""
        return self._log.read_text().splitlines()[1:] if self._log.exists() else []

    @property
    def _log(self) -> Path:
        return self.path / "log.csv"
