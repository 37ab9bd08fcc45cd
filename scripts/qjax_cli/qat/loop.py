# SPDX-License-Identifier: Apache-2.0
"""The steps of a training run, with its log, its checkpoints and its progress bar."""

import contextlib
import math
import time
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int

from qjax.qat import windows
from qjax.qat.training import State, Trainer
from qjax_checkpoints.training_run import TrainingRun
from qjax_cli.console import Console

LOG_COLUMNS = ("step", "loss", "seconds")
_LOG_EVERY = 10  # steps: looking at a loss makes the device wait


def train(
    trainer: Trainer,
    run: TrainingRun,
    tokens: Int[np.ndarray, "n length"],
    *,
    checkpoint_every: int,
    console: Console,
) -> tuple[State, dict[str, Any]]:
    """Trains from the last checkpoint, or from the start, to the last step.

    Args:
      trainer: what to train.
      run: where checkpoints and log go; already begun.
      tokens: all windows.
      checkpoint_every: steps between two checkpoints.
      console: for the progress bar.

    Returns:
      The last state, and in plain types how the training went.

    Raises:
      ValueError: a loss or the weights are not finite. Checkpoints are taken only of what was seen to be.
    """
    settings, state, done, seconds = trainer.settings, trainer.start(), 0, 0.0
    if run.step is not None:
        state, notes = run.latest(state)
        done, seconds = notes["step"], notes["seconds"]
    run.rewind_log(done)
    size, total = settings.batch * tokens.shape[1], settings.steps
    with contextlib.closing(run), console.progress("training", total) as bar:
        bar.reach(done)
        while done < total:
            ends = (done + every - done % every for every in (_LOG_EVERY, checkpoint_every))
            before, done = done, min(total, *ends)
            begun, losses = time.perf_counter(), []
            for step in range(before, done):
                batch = windows.batch(tokens, step, settings.batch, settings.seed)
                state, loss = trainer.step(state, batch)
                losses.append(loss)
            losses = np.asarray(jnp.stack(losses))
            took = time.perf_counter() - begun
            seconds += took
            due = done == total or done % checkpoint_every == 0
            if not np.isfinite(losses).all() or (due and not _is_finite(state)):
                raise ValueError(_not_finite(losses, before, run))
            loss = float(losses.mean())
            run.append_log([f"{done - 1},{loss!r},{seconds:.3f}"])
            rate = (done - before) * size / took
            bar.reach(done, f"training: loss {loss:.4f}, {rate / 1000:.1f} k tokens/s")
            if due:
                run.save(done, state, {"step": done, "seconds": seconds})
    return state, _summary(run, total, total * size, seconds)


def _is_finite(state: State) -> bool:
    return math.isfinite(float(optax.tree.norm(state.parameters)))


def _not_finite(losses: Float[np.ndarray, " steps"], before: int, run: TrainingRun) -> str:
    """What was not finite first, in steps whose losses are given; `before` of them had been taken."""
    bad = np.flatnonzero(~np.isfinite(losses))
    if bad.size:
        what = f"the loss of step {before + bad[0]} (the first is 0) is {losses[bad[0]]:g}"
    else:
        last = before + len(losses) - 1
        what = (
            f"the norm of the weights is not finite after step {last} (the first is 0), which every "
            f"loss was until then, {losses[-1]:.4g} the last"
        )
    kept = "it has no checkpoint yet"
    if run.step is not None:
        kept = f"its checkpoint of step {run.step} is whole"
    return (
        f"{run.path}: {what}; {kept}; "
        "without this folder the command begins anew, with a smaller --rate perhaps"
    )


def _summary(run: TrainingRun, steps: int, tokens: int, seconds: float) -> dict[str, Any]:
    """How a training went; the last loss is the mean of the last twentieth of the log."""
    losses = [float(row.split(",")[1]) for row in run.log_rows()]
    last = losses[-max(1, len(losses) // 20) :]
    mean = sum(last) / len(last) if last else None
    return {"steps": steps, "tokens": tokens, "last_loss": mean, "seconds": seconds}
