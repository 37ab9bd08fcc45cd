# SPDX-License-Identifier: Apache-2.0
"""`qjax qat` as users and scripts call it, killed and gone on with too."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from qjax import nnx_layers, qtensor
from qjax.qat.training import Settings, State, Trainer
from qjax_checkpoints import load
from qjax_checkpoints.training_run import TrainingRun
from qjax_cli.console import Console
from qjax_cli.qat.loop import LOG_COLUMNS, train

pytestmark = pytest.mark.one_version  # whole commands; the parts have tests of their own

PROGRAM = "from qjax_cli.main import entry; entry()"


@pytest.fixture
def tokens(tmp_path):
    """Windows in which each token names the next."""
    first = np.random.default_rng(0).integers(0, 256, (24, 1))
    path = tmp_path / "tokens.npy"
    np.save(path, ((first + 7 * np.arange(33)) % 256).astype(np.int32))
    return path


@pytest.fixture
def start(qjax, source, tmp_path):
    path = tmp_path / "start"
    assert qjax("quantize", source, path, "--scheme", "w4a16-g32").status == 0
    return path


@pytest.fixture
def arguments(start, tokens):
    return (
        "--scheme", "w4a16-g32", "--start", start, "--text", tokens, "--seq-len", 33, "--batch", 4,
        "--steps", 30, "--rate", 0.2, "--checkpoint-every", 10,
    )  # fmt: skip


def rows(out):
    lines = (out.parent / f"{out.name}.training" / "log.csv").read_text().splitlines()
    return [tuple(line.split(",")[:2]) for line in lines[1:]]


def weights(out):
    return (out / "model.safetensors").read_bytes()


def test_trains_and_writes_what_was_trained(qjax, source, tmp_path, tokens, arguments):
    out = tmp_path / "out"
    done = qjax("qat", source, out, *arguments, "--json")
    assert done.status == 0, done.err
    told = json.loads(done.out)
    assert told["steps"] == 30 and told["tokens"] == 30 * 4 * 33 and told["method"] == "lsq"
    report = json.loads((out / "qjax_report.json").read_text())
    assert report["training"]["last_loss"] == told["last_loss"]
    reported = {layer["path"]: layer for layer in report["layers"] if layer["scheme"]}
    assert {(entry["scheme"], entry["method"]) for entry in reported.values()} == {
        ("w4a16-g32", "qat-lsq")
    }
    assert report["totals"]["bytes_after"] < report["totals"]["bytes_before"]
    losses = [float(loss) for _, loss in rows(out)]
    assert [int(step) for step, _ in rows(out)] == [9, 19, 29] and losses[-1] < 0.8 * losses[0]

    model, before = load(out).model, load(source).model
    held = nnx_layers.quantized_layers(model)
    assert len(held) == 14 and held.keys() == reported.keys()
    assert all(q.dtype == "bfloat16" and q.scale.dtype == "bfloat16" for q in held.values())
    first = nnx_layers.quantized_layers(load(tmp_path / "start").model)
    changed = [(qtensor.unpacked(held[p]) != qtensor.unpacked(first[p])).any() for p in held]
    assert all(changed)
    assert (model.model.norm.weight[...] != before.model.norm.weight[...]).any()
    worth = [
        json.loads(qjax("eval", path, "--tokens", tokens, "--json").out)["nll"]
        for path in (out, tmp_path / "start")
    ]
    assert worth[0] < worth[1] - 0.5


def test_killed_and_resumed_it_goes_the_same_way(qjax, source, tmp_path, arguments):
    out, whole = tmp_path / "out", tmp_path / "whole"
    options = (*arguments, "--teacher", source, "--distillation", 0.5)
    command = [sys.executable, "-c", PROGRAM, "qat", source, out, *options]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    checkpoints = tmp_path / "out.training/checkpoints"
    with subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        while not (checkpoints / "10").exists() and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert not out.exists()
    again = qjax("qat", source, out, *options)
    assert again.status == 1 and "holds a run already: --resume it" in again.err
    for path, more in ((out, ("--resume",)), (whole, ())):
        done = qjax("qat", source, path, *options, *more)
        assert done.status == 0, done.err
    assert rows(out) == rows(whole) and len(rows(out)) == 3
    assert weights(out) == weights(whole)


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (("--distillation", 0.5), "--distillation 0.5 needs a --teacher"),
        (
            ("--scheme", "w4a16-g64"),
            "model/layers/0/mlp/down_proj is w4a16-g32, but --scheme asks for w4a16-g64",
        ),
        (("--scheme", "w4a16-g48"), "group size 48 does not divide"),
        (
            ("--rate", 1e30, "--steps", 10),
            " (the first is 0) is nan; it has no checkpoint yet; without this folder the command begins",
        ),
    ],
)
def test_bad_input(qjax, source, tmp_path, arguments, more, line):
    out = tmp_path / "out"
    done = qjax("qat", source, out, *arguments, *more)
    assert done.status == 1 and done.err.count("\n") == 1 and line in done.err
    assert not out.exists()


@pytest.mark.parametrize(
    ("losses", "norm", "line"),
    [
        ([2.0, 1.5, 1.0], 1.0, None),
        ([2.0, 1.5, 1.0, np.nan, np.inf], 1.0, "the loss of step 3 (the first is 0) is nan"),
        (
            [2.0, 1.5, 1.0, 0.5, 0.25],
            np.inf,
            "the norm of the weights is not finite after step 4 (the first is 0), which every loss was "
            "until then, 0.25 the last",
        ),
    ],
)
def test_what_was_not_finite_first_is_said(tmp_path, losses, norm, line):
    class Scripted(Trainer):
        def __init__(self):
            self.settings = Settings(steps=len(losses), batch=1, distillation=0.0)

        def start(self):
            return State({"w": jnp.ones(1)}, (), jnp.int32(0))

        def step(self, state, tokens):
            done = int(state.step) + 1
            w = norm if done > 3 else 1.0
            return State({"w": jnp.full(1, w)}, (), jnp.int32(done)), jnp.float32(losses[done - 1])

    begun = TrainingRun(tmp_path / "run", LOG_COLUMNS)
    begun.begin({}, resume=False)
    tokens, console = np.zeros((4, 8), np.int32), Console(json_only=True)
    if line is None:
        assert (
            train(Scripted(), begun, tokens, checkpoint_every=3, console=console)[1]["steps"] == 3
        )
        return
    with pytest.raises(ValueError) as caught:
        train(Scripted(), begun, tokens, checkpoint_every=3, console=console)
    assert f"run: {line}; its checkpoint of step 3 is whole; without" in str(caught.value)


def test_a_start_that_cannot_train_leaves_no_run(qjax, source, tmp_path, arguments):
    recipe = [["model/embed_tokens", "w8a16-channel"], [".*", "w4a16-g32"]]
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    made = ("quantize", source, tmp_path / "tables", "--recipe", tmp_path / "recipe.json")
    assert qjax(*made, "--format", "orbax").status == 0
    done = qjax("qat", source, tmp_path / "out", *arguments, "--start", tmp_path / "tables")
    assert done.status == 1 and done.err.count("\n") == 1
    assert f"{tmp_path / 'tables'}: model/embed_tokens: a table of embeddings" in done.err
    assert not (tmp_path / "out.training").exists()


def test_windows_are_not_longer_than_the_model_takes(qjax, source, tmp_path, tokens, arguments):
    def with_positions(path, positions):
        shutil.copytree(source, path)
        config = json.loads((source / "config.json").read_text())
        (path / "config.json").write_text(
            json.dumps(config | {"max_position_embeddings": positions})
        )
        return path

    short = with_positions(tmp_path / "short", 32)
    line = "windows of 33 tokens go beyond the 32 that {} was made for; --seq-len 32 would do"
    exact = with_positions(tmp_path / "exact", 33)
    for src, more, said in (
        (short, (), line.format("the model")),
        (source, ("--teacher", short), line.format(f"the teacher {short}")),
        # Windows of a token file may be shorter than what was asked for: on to what is checked next.
        (exact, ("--seq-len", 1000, "--teacher", tmp_path / "none"), "no such directory"),
    ):
        start = tmp_path / f"start of {src.name}"
        assert qjax("quantize", src, start, "--scheme", "w4a16-g32").status == 0
        done = qjax("qat", src, tmp_path / "out", *arguments, "--start", start, *more)
        assert done.status == 1 and done.err.endswith(f": {said}\n"), done.err
    assert not (tmp_path / "out.training").exists()


def test_a_start_that_turns_inputs_at_run_time_trains(qjax, source, tmp_path, tokens):
    out, begin = tmp_path / "out", tmp_path / "begin"
    made = qjax(
        "quantize",
        source,
        begin,
        "--scheme",
        "w4a4-g32",
        "--method",
        "rotation",
        "--format",
        "orbax",
    )
    assert made.status == 0, made.err
    common = (
        "qat", source, out, "--scheme", "w4a4-g32", "--start", begin, "--text", tokens, "--seq-len", 33,
        "--batch", 4, "--steps", 30, "--rate", 0.2,
    )  # fmt: skip
    done = qjax(*common)  # known before there is a run
    assert done.status == 1 and done.err.count("\n") == 1
    assert (
        f"{begin}: rotated for activations of 4 bits" in done.err and "--format orbax" in done.err
    )
    assert not (tmp_path / "out.training").exists()
    done = qjax(*common, "--format", "orbax")
    assert done.status == 0, done.err
    assert load(out).model.config.online_hadamard
    worth = [
        json.loads(qjax("eval", path, "--tokens", tokens, "--json").out)["nll"]
        for path in (out, begin)
    ]
    assert worth[0] < worth[1] - 0.5


def test_what_was_read_with_a_difference_is_told(qjax, source, tmp_path, arguments):
    start = arguments[arguments.index("--start") + 1]
    config = json.loads((start / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8, "type": "int"}
    (start / "config.json").write_text(json.dumps(config))
    teacher = tmp_path / "teacher"
    shutil.copytree(start, teacher)
    done = qjax("qat", source, tmp_path / "out", *arguments, "--steps", 1, "--teacher", teacher)
    assert done.status == 0, done.err
    note = "kv_cache_scheme is not used: the cache stays unquantized; only static e4m3 is read"
    assert done.err.splitlines() == [f"{start}: {note}", f"{teacher}: {note}"]


def test_other_models(qjax, source, tmp_path, tokens, arguments):
    out, other = tmp_path / "out", tmp_path / "other"
    shutil.copytree(source, other)
    config = json.loads((source / "config.json").read_text()) | {"num_hidden_layers": 1}
    (other / "config.json").write_text(json.dumps(config))
    tensors = safetensors.numpy.load_file(source / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "layers.1." not in name}
    safetensors.numpy.save_file(kept, other / "model.safetensors", {"format": "pt"})
    foreign, part = tmp_path / "foreign", tmp_path / "part"
    assert qjax("quantize", other, foreign, "--scheme", "w4a16-g32").status == 0
    (tmp_path / "recipe.json").write_text('[[".*q_proj", "w4a16-g32"]]')
    assert qjax("quantize", source, part, "--recipe", tmp_path / "recipe.json").status == 0
    start = arguments[arguments.index("--start") + 1]
    for src, more, line in (
        (
            source,
            ("--start", foreign),
            "is of another model than SRC: num_layers is 1 there and 2 here",
        ),
        (source, ("--start", part), "down_proj is not quantized, but --scheme asks for w4a16-g32"),
        (start, (), "is quantized; train from the model as it was, with this as --start"),
        (
            source,
            ("--text", source / "config.json", "--seq-len", 4000),
            "less than one window of 4000",
        ),
    ):
        done = qjax("qat", src, out, *arguments, *more)
        assert done.status == 1 and done.err.count("\n") == 1 and line in done.err, done.err
    assert not out.exists() and not (tmp_path / "out.training").exists()


def test_a_run_of_another_description_is_not_gone_on_with(qjax, source, tmp_path, arguments):
    out = tmp_path / "out"
    short = (*arguments, "--steps", 10)
    assert qjax("qat", source, out, *short).status == 0
    kept = sorted((tmp_path / "out.training/checkpoints").iterdir())
    other = tmp_path / "moved"
    out.rename(other)
    for more, what in ((("--seed", 1), "seed: seed 0, not 1"), (("--method", "ste"), "method")):
        done = qjax("qat", source, out, *short, *more, "--resume")
        assert done.status == 1 and f"the run was begun with another {what}" in done.err
    assert sorted((tmp_path / "out.training/checkpoints").iterdir()) == kept
    done = qjax("qat", source, out, *short, "--resume")  # all steps are done: it writes OUT again
    assert done.status == 0 and weights(out) == weights(other)


def test_schemes_that_cannot_learn_scales_train_weights(qjax, source, tmp_path, tokens):
    made = ("quantize", source, tmp_path / "mx", "--scheme", "mxfp4", "--format", "orbax")
    assert qjax(*made).status == 0
    out = tmp_path / "out"
    common = (
        "qat", source, out, "--scheme", "mxfp4", "--start", tmp_path / "mx", "--text", tokens, "--seq-len", 33,
        "--batch", 4, "--steps", 10, "--format", "orbax",
    )  # fmt: skip
    done = qjax(*common)
    assert done.status == 1 and "powers of two, which no small step moves: --method ste" in done.err
    done = qjax(*common, "--method", "ste")  # nothing stands in its way
    assert done.status == 0, done.err
    held = nnx_layers.quantized_layers(load(out).model)
    assert {q.scheme.name for q in held.values()} == {"mxfp4"}


def test_static_scales_train_from_where_calibration_ended(qjax, source, tmp_path, tokens):
    out, begin = tmp_path / "out", tmp_path / "begin"
    made = qjax("quantize", source, begin, "--scheme", "w8a8-static", "--calib", tokens)
    assert made.status == 0, made.err
    done = qjax(
        "qat", source, out, "--scheme", "w8a8-static", "--start", begin, "--text", tokens, "--seq-len", 33,
        "--batch", 4, "--steps", 10, "--scale-rate", 0.02,
    )  # fmt: skip
    assert done.status == 0, done.err
    start, end = (nnx_layers.quantized_layers(load(path).model) for path in (begin, out))
    assert {q.scheme.name for q in end.values()} == {"w8a8-static"} and len(end) == 14
    assert all(q.input_scale != start[path].input_scale for path, q in end.items())
    # Queries, keys and values; gate and up: what one product will have to multiply.
    assert len({float(q.input_scale) for q in end.values()}) == 2 * 4
    report = json.loads((out / "qjax_report.json").read_text())
    told = {layer["path"]: layer["input_scale"] for layer in report["layers"] if layer["scheme"]}
    assert told == {path: float(q.input_scale) for path, q in end.items()}
    losses = [float(loss) for _, loss in rows(out)]
    assert np.isfinite(losses).all()


def test_begins_with_the_best_post_training_result(qjax, source, tmp_path, tokens):
    out = tmp_path / "out"
    done = qjax(
        "qat", source, out, "--scheme", "w4a8", "--text", tokens, "--seq-len", 33, "--steps", 2,
        "--teacher", source,
    )  # fmt: skip
    assert done.status == 0, done.err
    report = json.loads((tmp_path / "out.training/start/qjax_report.json").read_text())
    methods = {entry["method"] for entry in report["layers"] if entry["scheme"]}
    assert methods == {"smoothquant+gptq+learned"}
