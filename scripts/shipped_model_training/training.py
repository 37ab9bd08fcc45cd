# SPDX-License-Identifier: Apache-2.0
"""The training loop: several optimizer steps per call of the device, checkpoints, resumption."""

import contextlib
import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree, UInt16

from qjax_checkpoints.training_run import TrainingRun
from shipped_model_training.bits_per_byte import sum_of_nll
from shipped_model_training.network import (
    Network,
    Parameters,
    initial_parameters,
    logits,
    make_network,
)
from shipped_model_training.optimizer import make_optimizer, schedule_factor
from shipped_model_training.progress import LOG_COLUMNS, Progress
from shipped_model_training.progress_bar import ProgressBar
from shipped_model_training.settings import ModelShape, TrainingSettings
from shipped_model_training.windows import training_windows

# Stands for the number of steps until it is settled: the warmup does not depend on it.
_UNSETTLED = 2**30


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long to train, and when to pause. Exactly one of `steps` and `seconds` is given."""

    steps: int | None = None  # optimizer steps
    seconds: float | None = None  # of steps; turned into steps once the throughput is known
    pause_after: float = math.inf  # seconds of this session, compilation included
    checkpoint_every: int = 1000  # steps

    def __post_init__(self) -> None:
        """Refuse a run without an end, or with two."""
        if (self.steps is None) == (self.seconds is None):
            raise ValueError(f"exactly one of {self.steps=} and {self.seconds=} must be given")


def train(
    work: Path,
    run_path: Path,
    *,
    shape: ModelShape,
    settings: TrainingSettings,
    budget: Budget,
    resume: bool,
) -> Progress:
    """Train until the budget is spent, the session is to pause, or SIGTERM or SIGINT comes.

    In each case a checkpoint is left from which `resume` goes on, with the same windows and the
    same arithmetic as without the interruption.

    Args:
        work: the folder that `prepare` wrote.
        run_path: the run's folder.
        shape: of the model.
        settings: of the training.
        budget: how long.
        resume: go on from the last checkpoint instead of beginning.

    Returns:
        How far the run has come.

    Raises:
        ValueError: there are no tokens or no checkpoint, the run was begun with other settings, or
            the loss is not finite.
    """
    begun = time.monotonic()
    if budget.steps is not None and budget.steps % settings.steps_per_dispatch:
        raise ValueError(f"{budget.steps=} must be a multiple of {settings.steps_per_dispatch=}")
    tokens = jnp.asarray(load_tokens(work, shape.vocab_size, settings.context + 1))
    network = make_network(shape.hf_config(), settings.compute_dtype, settings.attention)
    run = TrainingRun(run_path, LOG_COLUMNS)
    run.begin({"shape": asdict(shape), "training": asdict(settings)}, resume)
    state, progress = _initial_state(network, settings), _begun(budget)
    if resume:
        state, notes = run.latest(state)
        progress = Progress(**notes)
    run.rewind_log(progress.step)
    progress = replace(progress, sessions=progress.sessions + 1)
    take_steps = _compiled_steps(network, settings)
    durations: list[float] = []  # seconds of this session's dispatches
    with contextlib.closing(run), _stop_signals() as stop, ProgressBar(settings) as bar:
        while progress.num_steps is None or progress.step < progress.num_steps:
            num_steps = jnp.int32(progress.num_steps or _UNSETTLED)
            before = time.monotonic()
            state, losses = take_steps(state, tokens, jnp.int32(progress.step), num_steps)
            losses = np.asarray(losses)
            durations.append(time.monotonic() - before)
            if not np.isfinite(losses).all():
                raise ValueError(f"{run_path}: the loss is not finite behind step {progress.step}")
            run.append_log(_log_rows(progress, losses, settings))
            progress = _advanced(progress, durations, settings, budget)
            bar.show(progress, float(losses.mean()))
            paused = stop.is_set() or time.monotonic() - begun > budget.pause_after
            done = progress.step == progress.num_steps
            if paused or done or progress.step % budget.checkpoint_every == 0:
                run.save(progress.step, state, asdict(progress))
            if paused:
                break
    return progress


def load_tokens(work: Path, vocab_size: int, window: int) -> UInt16[np.ndarray, " n"]:
    """Read the tokens of a work folder.

    Raises:
        ValueError: they are missing, fewer than one window, or beyond the vocabulary.
    """
    file = work / "tokens.npy"
    if not (work / "data.json").is_file() or not file.is_file():
        raise ValueError(f"{work}: has no tokens.npy and data.json: run `prepare` first")
    tokens = np.load(file)
    if len(tokens) < window:
        raise ValueError(f"{file}: {len(tokens)} tokens are fewer than one window of {window}")
    if tokens.max() >= vocab_size:
        raise ValueError(f"{file}: token {tokens.max()} lies beyond a vocabulary of {vocab_size}")
    return tokens


def restored_parameters(run: TrainingRun) -> tuple[Parameters, Network, Progress]:
    """Read the parameters of a run's last checkpoint, with the network computing in float32."""
    description = run.description()
    settings = TrainingSettings(**description["training"])
    network = make_network(ModelShape(**description["shape"]).hf_config(), "float32", "batched")
    state, notes = run.latest(_initial_state(network, settings))
    return state["parameters"], network, Progress(**notes)


def _initial_state(network: Network, settings: TrainingSettings) -> PyTree:
    def make() -> PyTree:
        parameters = initial_parameters(network, settings.seed)
        return {"parameters": parameters, "optimizer": make_optimizer(settings).init(parameters)}

    return jax.jit(make)()  # as one program: one by one, the draws take seconds to compile


def _begun(budget: Budget) -> Progress:
    settled_by = "" if budget.steps is None else f"{budget.steps} steps"
    return Progress(num_steps=budget.steps, settled_by=settled_by)


def _compiled_steps(
    network: Network, settings: TrainingSettings
) -> Callable[[PyTree, Array, Array, Array], tuple[PyTree, Array]]:
    """Return the jitted function that takes `steps_per_dispatch` steps and returns their losses."""
    optimizer = make_optimizer(settings)

    def loss_of(parameters: Parameters, windows: Int[Array, "B length"]) -> Float[Array, ""]:
        inputs, targets = windows[:, :-1], windows[:, 1:]
        return sum_of_nll(logits(network, parameters, inputs), targets) / targets.size

    def take_steps(state, tokens, first_step, num_steps):
        def one_step(state, step):
            windows = training_windows(
                tokens, settings.seed, step, settings.batch_size, settings.context + 1
            )
            parameters = state["parameters"]
            loss, gradients = jax.value_and_grad(loss_of)(parameters, windows)
            updates, optimizer_state = optimizer.update(gradients, state["optimizer"], parameters)
            factor = schedule_factor(step, num_steps, settings.warmup_steps)
            updates = jax.tree.map(lambda update: factor * update, updates)
            parameters = optax.apply_updates(parameters, updates)
            return {"parameters": parameters, "optimizer": optimizer_state}, loss

        steps = first_step + jnp.arange(settings.steps_per_dispatch)
        return jax.lax.scan(one_step, state, steps)

    return jax.jit(take_steps, donate_argnums=0)


def _advanced(
    progress: Progress, durations: list[float], settings: TrainingSettings, budget: Budget
) -> Progress:
    """Return the progress one dispatch later; the end of the warmup settles the number of steps."""
    measured = durations[1:]  # the first dispatch of a session compiles
    per_dispatch = settings.steps_per_dispatch
    progress = replace(
        progress,
        step=progress.step + per_dispatch,
        seconds=progress.seconds + sum(measured[-1:]),
    )
    warm = progress.step + per_dispatch <= settings.warmup_steps
    if budget.seconds is None or progress.num_steps is not None or warm or not measured:
        return progress
    dispatch_seconds = statistics.median(measured)
    remaining = max(1, int((budget.seconds - progress.seconds) / dispatch_seconds))
    return replace(
        progress,
        num_steps=progress.step + remaining * per_dispatch,
        settled_by=f"{budget.seconds} s at {per_dispatch / dispatch_seconds:.2f} steps per second",
    )


def _log_rows(
    progress: Progress, losses: Float[np.ndarray, " n"], settings: TrainingSettings
) -> list[str]:
    steps = progress.step + np.arange(len(losses))
    factors = schedule_factor(steps, progress.num_steps or _UNSETTLED, settings.warmup_steps)
    return [
        f"{step},{loss!r},{factor:.6f},{progress.seconds:.2f}"
        for step, loss, factor in zip(steps, losses.tolist(), np.asarray(factors), strict=True)
    ]


@contextlib.contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """Turn SIGTERM and SIGINT into an event, so that the step under way is finished and saved."""
    stop = threading.Event()
    signals = (signal.SIGTERM, signal.SIGINT)
    previous = {number: signal.signal(number, lambda *_: stop.set()) for number in signals}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
