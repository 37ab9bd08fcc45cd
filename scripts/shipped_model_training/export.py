# SPDX-License-Identifier: Apache-2.0
"""From a run's last checkpoint to a Hugging Face directory with bfloat16 weights, and its score."""

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from qjax_checkpoints.json_file import read_json, write_json
from qjax_checkpoints.shipped import evaluation_text
from qjax_checkpoints.training_run import TrainingRun
from qjax_models.names import hf_name, layout
from shipped_model_training.bits_per_byte import Score, score
from shipped_model_training.network import Network, Parameters, logits, unstacked
from shipped_model_training.progress import LOG_COLUMNS, Progress
from shipped_model_training.settings import ModelShape
from shipped_model_training.tokenizer import bytes_of_tokens
from shipped_model_training.training import restored_parameters

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def export(
    work: Path,
    run_path: Path,
    out: Path,
    *,
    window: int,
    batch_size: int,
    max_characters: int | None,
) -> dict[str, Any]:
    """Write the model directory and return what its `training_summary.json` holds.

    Args:
        work: the folder that `prepare` wrote.
        run_path: the run's folder.
        out: the directory to write; made if it is not there, its files are replaced.
        window: tokens of an evaluation window.
        batch_size: windows evaluated at once.
        max_characters: how much of the evaluation text to score; None: all of it.

    Raises:
        ValueError: there is no run, or it has no checkpoint.
    """
    run = TrainingRun(run_path, LOG_COLUMNS)
    parameters, network, progress = restored_parameters(run)
    rounded = jax.tree.map(lambda array: array.astype(jnp.bfloat16), parameters)
    out.mkdir(parents=True, exist_ok=True)
    description = run.description()
    _write_model(out, network, rounded, ModelShape(**description["shape"]).hf_config())
    for name in TOKENIZER_FILES:
        shutil.copyfile(work / name, out / name)
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    text = evaluation_text()[:max_characters]
    result = _score(network, rounded, tokenizer, text, window, batch_size)
    summary = {
        **_run_facts(run, progress, description),
        "parameters": network.num_parameters,
        "evaluation": {"text": "qjax_checkpoints.shipped.evaluation_text()", **asdict(result)},
        "data": read_json(work / "data.json"),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    write_json(out / "training_summary.json", summary)
    run.close()
    return summary


def _write_model(
    out: Path, network: Network, parameters: Parameters, hf_config: Mapping[str, Any]
) -> None:
    tensors = {}
    for path, array in unstacked(network, parameters).items():
        tensor = np.asarray(array).astype(ml_dtypes.bfloat16)
        # The format stores rows behind each other, so a transposed view has to be laid out anew.
        tensors[hf_name(path)] = np.ascontiguousarray(
            tensor.T if layout(path) == "linear" else tensor
        )
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # the package makes it readable by its owner only
    write_json(out / "config.json", dict(hf_config))
    ends = {key: hf_config[key] for key in ("bos_token_id", "eos_token_id")}
    write_json(out / "generation_config.json", ends)


def _score(
    network: Network,
    parameters: Parameters,
    tokenizer: Tokenizer,
    text: str,
    window: int,
    batch_size: int,
) -> Score:
    """Score the rounded weights with float32 arithmetic, so that only the rounding is seen."""
    tokens = np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
    exact = jax.tree.map(lambda array: array.astype(jnp.float32), parameters)
    with jax.default_matmul_precision("highest"):
        return score(
            lambda batch: logits(network, exact, batch),
            tokens,
            bytes_of_tokens(tokenizer),
            window,
            batch_size,
        )


def _run_facts(run: TrainingRun, progress: Progress, description: dict[str, Any]) -> dict[str, Any]:
    """Return what the run's own files say about it."""
    training = description["training"]
    losses = [float(row.split(",")[1]) for row in run.log_rows()]
    tokens_per_step = training["batch_size"] * training["context"]
    last = losses[-100:]
    return {
        **description,
        "steps": progress.step,
        "planned_steps": progress.num_steps,
        "steps_settled_by": progress.settled_by,
        "sessions": progress.sessions,
        "tokens": progress.step * tokens_per_step,
        "final_loss": sum(last) / len(last),  # nats per token, mean of the last 100 steps
        "seconds": progress.seconds,
    }
