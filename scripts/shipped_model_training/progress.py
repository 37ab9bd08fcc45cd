# SPDX-License-Identifier: Apache-2.0
"""How far a training run has come, and what its log tells of each step."""

from dataclasses import dataclass

LOG_COLUMNS = ("step", "loss", "rate_factor", "seconds")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run has come."""

    step: int = 0  # optimizer steps done
    num_steps: int | None = None  # steps of the whole run; None until the throughput is known
    settled_by: str = ""  # what fixed `num_steps`, in words
    seconds: float = 0.0  # spent on steps, the first dispatch of each session left out
    sessions: int = 0  # how often the run was started
