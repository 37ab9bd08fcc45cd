# SPDX-License-Identifier: Apache-2.0
"""The whole way in miniature: a tiny corpus, a tiny Llama, a few steps."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

import train_shipped_model
from qjax_checkpoints.training_run import TrainingRun
from qjax_models import config_from_hf

pytestmark = pytest.mark.one_version  # the program of one training, which is over

SCRIPT = Path(train_shipped_model.__file__)
SHAPE = (
    "--vocab-size 300 --hidden-size 32 --num-layers 2 --mlp-size 48 --num-heads 2 "
    "--num-kv-heads 1 --head-size 16 --max-positions 64"
).split()
TRAINING = (
    "--batch-size 2 --context 16 --steps-per-dispatch 2 --warmup-steps 4 "
    "--compute-dtype float32 --attention by_row --checkpoint-every 4"
).split()


def run(*arguments: object) -> int:
    return train_shipped_model.main([str(argument) for argument in arguments])


def train(work: Path, run_path: Path, *more: object) -> int:
    return run("train", "--work", work, "--run", run_path, *SHAPE, *TRAINING, *more)


def losses(run_path: Path) -> list[tuple[str, str]]:
    rows = (run_path / "log.csv").read_text().splitlines()
    assert rows[0] == "step,loss,rate_factor,seconds"
    return [tuple(row.split(",")[:2]) for row in rows[1:]]  # pyright: ignore[reportReturnType]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shipped") / "work"
    packages = SCRIPT.parent / "shipped_model_training"
    prepare = ["prepare", "--work", folder, "--packages", packages, "--workers", 1]
    assert run(*prepare, "--vocab-size", 300, "--max-positions", 64) == 0
    return folder


@pytest.fixture(scope="module")
def finished(work: Path) -> Path:
    """A run of 20 steps without interruption."""
    path = work.parent / "finished"
    assert train(work, path, "--steps", 20) == 0
    return path


def test_prepare_records_the_data(work: Path) -> None:
    data = json.loads((work / "data.json").read_text())
    tokens = np.load(work / "tokens.npy")
    assert tokens.dtype == np.uint16 and tokens.max() < 300
    assert data["tokens"] == len(tokens)
    assert data["documents"] == data["files_by_fate"]["kept"] == (tokens == 0).sum()
    assert 0 <= data["held_out_lines_in_corpus"] < 0.1


def test_prepare_encodes_with_a_tokenizer_that_is_there(work: Path, tmp_path: Path, capsys) -> None:
    packages = SCRIPT.parent / "shipped_model_training"
    prepare = ["prepare", "--packages", packages, "--workers", 1, "--work", tmp_path / "again"]
    assert run(*prepare, "--tokenizer", work / "tokenizer.json") == 0
    tokens = [np.load(folder / "tokens.npy") for folder in (work, tmp_path / "again")]
    assert np.array_equal(*tokens)
    for file, line in (
        (tmp_path / "none.json", "no such file"),
        (work / "data.json", "not a tokenizer"),
    ):
        assert run(*prepare, "--tokenizer", file) == 1
        assert line in capsys.readouterr().err


def test_training_learns(finished: Path) -> None:
    values = [float(loss) for _, loss in losses(finished)]
    assert len(values) == 20
    assert np.mean(values[-4:]) < np.mean(values[:4]) - 0.1


def test_paused_run_resumes_step_for_step(work: Path, finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    assert train(work, path, "--steps", 20, "--pause-after", 0) == 0
    assert len(losses(path)) == 2
    assert train(work, path, "--steps", 20, "--resume") == 0
    assert losses(path) == losses(finished)


def test_killed_run_resumes_step_for_step(work: Path, finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    more = ["--steps", "20", "--checkpoint-every", "6"]
    arguments = ["train", "--work", str(work), "--run", str(path), *SHAPE, *TRAINING, *more]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, str(SCRIPT), *arguments], env=environment)
    try:
        deadline = time.monotonic() + 300
        # A checkpoint is renamed into place when whole; the run is then a few steps from its end.
        while not (path / "checkpoints" / "6").is_dir():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert train(work, path, *more, "--resume") == 0
    assert losses(path) == losses(finished)


def test_seconds_become_steps_in_the_warmup(work: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    assert train(work, path, "--seconds", 0.05, "--checkpoint-every", 2) == 0
    checkpoint = max(int(folder.name) for folder in (path / "checkpoints").iterdir())
    assert checkpoint == len(losses(path)) >= 4
    assert checkpoint % 2 == 0


def test_export_writes_what_was_trained(work: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    export = ["export", "--work", work, "--run", finished, "--out", out]
    assert run(*export, "--window", 32, "--max-characters", 5000) == 0
    config = json.loads((out / "config.json").read_text())
    assert config_from_hf(config).vocab_size == 300
    tensors = load_file(out / "model.safetensors")
    assert tensors["model.layers.1.mlp.down_proj.weight"].shape == (32, 48)
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert "lm_head.weight" not in tensors
    training = importlib.import_module("shipped_model_training.training")
    network_module = importlib.import_module("shipped_model_training.network")
    progress = importlib.import_module("shipped_model_training.progress")
    begun = TrainingRun(finished, progress.LOG_COLUMNS)
    parameters, network, _ = training.restored_parameters(begun)
    kernel = network_module.unstacked(network, parameters)["model/layers/1/mlp/down_proj/kernel"]
    exported = tensors["model.layers.1.mlp.down_proj.weight"].T
    assert np.array_equal(np.asarray(kernel).astype(ml_dtypes.bfloat16), exported)
    summary = json.loads((out / "training_summary.json").read_text())
    assert summary["steps"] == summary["planned_steps"] == 20
    assert summary["tokens"] == 20 * 2 * 16
    assert summary["evaluation"]["window"] == 32
    assert 0 < summary["evaluation"]["bits_per_byte"] < 8
    assert summary["data"]["documents"] > 0 and summary["sessions"] == 1
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training_summary.json",
    }


@pytest.mark.interop
def test_transformers_computes_the_same(work: Path, finished: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "model"
    export = ["export", "--work", work, "--run", finished, "--out", out]
    assert run(*export, "--window", 32, "--max-characters", 4000) == 0
    theirs = transformers.LlamaForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    shipped = importlib.import_module("qjax_checkpoints.shipped")
    ids = torch.tensor(tokenizer(shipped.evaluation_text()[:4000])["input_ids"])
    windows = ids[: len(ids) // 32 * 32].reshape(-1, 32)
    with torch.no_grad():
        log_probabilities = theirs(windows[:, :-1]).logits.log_softmax(-1)
    nll = -log_probabilities.gather(2, windows[:, 1:, None]).mean().item()
    summary = json.loads((out / "training_summary.json").read_text())
    assert summary["evaluation"]["nll"] == pytest.approx(nll, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--steps", 3), "must be a multiple"),
        (("--steps", 20, "--warmup-steps", 2), "must hold two dispatches"),
        (("--steps", 20, "--vocab-size", 280), "lies beyond a vocabulary of 280"),
        (("--steps", 20, "--context", 10**7), "are fewer than one window"),
        (("--steps", 20, "--resume"), "holds no training run"),
    ],
)
def test_bad_arguments_are_one_line(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple, message: str
) -> None:
    assert train(work, tmp_path / "run", *arguments) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("train_shipped_model: ") and message in last


def test_runs_are_not_mixed_up(
    work: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(work, finished, "--steps", 20) == 1
    assert "holds a run already" in capsys.readouterr().err
    assert train(work, finished, "--steps", 20, "--resume", "--seed", 5) == 1
    assert "begun with another training" in capsys.readouterr().err


def test_missing_work_folder_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path, tmp_path / "run", "--steps", 20) == 1
    assert "run `prepare` first" in capsys.readouterr().err


def test_help_shows_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        run("--help")
    assert "prepare" in capsys.readouterr().out
