# SPDX-License-Identifier: Apache-2.0
"""The loop's progress on stderr: a bar on a terminal, a line now and then in a file."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from shipped_model_training.progress import Progress
from shipped_model_training.settings import TrainingSettings

_SECONDS_PER_LINE = 15.0


class ProgressBar:
    """Shows steps, loss, tokens per second and the time left."""

    def __init__(self, settings: TrainingSettings):
        """Prepare the display."""
        self._console = Console(stderr=True)
        self._tokens_per_step = settings.batch_size * settings.context
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total} steps"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=None)
        self._last: tuple[float, int] = (time.monotonic(), 0)
        self._line_due = time.monotonic()

    def __enter__(self) -> "ProgressBar":
        """Start the display."""
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop the display."""
        del kind, error, trace
        self._bar.stop()

    def show(self, progress: Progress, loss: float) -> None:
        """Report the state behind one dispatch and its mean loss."""
        now = time.monotonic()
        then, step_then = self._last
        rate = (
            (progress.step - step_then) * self._tokens_per_step / (now - then) if step_then else 0
        )
        self._last = (now, progress.step)
        text = f"loss {loss:.4f}  {rate / 1e6:.2f} M tokens/s"
        self._bar.update(
            self._task, description=text, completed=progress.step, total=progress.num_steps
        )
        if self._bar.disable and now >= self._line_due:
            self._line_due = now + _SECONDS_PER_LINE
            left = self._seconds_left(progress, rate)
            print_line = f"step {progress.step}/{progress.num_steps or '?'}  {text}  {left}"
            self._console.print(print_line, highlight=False)

    def _seconds_left(self, progress: Progress, rate: float) -> str:
        if progress.num_steps is None or not rate:
            return "time left unknown"
        steps = progress.num_steps - progress.step
        return f"{steps * self._tokens_per_step / rate:.0f} s left"
