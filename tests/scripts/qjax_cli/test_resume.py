# SPDX-License-Identifier: Apache-2.0
"""`qjax quantize` killed by the system, and gone on with by another process."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.one_version  # whole commands; the parts have tests of their own

PROGRAM = "from qjax_cli.main import entry; entry()"


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"},
    )


@pytest.fixture
def arguments(source, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog, again and again; " * 40)
    return (
        "--scheme", "w4a16-g32", "--method", "gptq", "--calib", text,
        "--samples", 12, "--seq-len", 32,
    )  # fmt: skip


def contents(out):
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    report = json.loads(files["qjax_report.json"])
    for entry in (report["totals"], *report["layers"]):
        entry.pop("seconds")
    return files | {"qjax_report.json": report}


def test_a_killed_command_goes_on_in_another_process(qjax, source, tmp_path, arguments):
    out, whole, first = tmp_path / "out", tmp_path / "whole", tmp_path / ".out.partial/finished"
    with start("quantize", source, out, *arguments) as process:
        while not list(first.glob("*.json")) and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert not out.exists() and [path.name for path in first.iterdir()] == ["model.layers.0.json"]

    again = qjax("quantize", source, out, *arguments)
    assert again.status == 1 and again.err.count("\n") == 1
    assert "unfinished run" in again.err and "--resume" in again.err

    # On the way through a file this time, which changes no bit either.
    for path, options in ((out, ("--resume", "--spill", tmp_path)), (whole, ())):
        done = qjax("quantize", source, path, *arguments, *options)
        assert done.status == 0, done.err
    assert contents(out) == contents(whole)
    assert {p.name for p in tmp_path.iterdir()} == {"model", "text.txt", "out", "whole"}


def test_a_finished_command_has_nothing_to_go_on_with(qjax, source, tmp_path, arguments):
    first = qjax("quantize", source, tmp_path / "out", *arguments, "--resume", "--json")
    assert first.status == 0, first.err
    before = contents(tmp_path / "out")
    again = qjax("quantize", source, tmp_path / "out", *arguments, "--resume", "--json")
    assert again.status == 0 and contents(tmp_path / "out") == before
    assert again.json | {"seconds": 0} == first.json | {"seconds": 0}
    assert again.err == first.err  # the layers that stay as they are
    other = qjax("quantize", source, tmp_path / "out", "--scheme", "w8a8", "--resume")
    assert other.status == 1 and "exists already" in other.err


def test_an_interrupt_says_what_stays(qjax, source, tmp_path, arguments, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("qjax_checkpoints.streaming.StreamedStorage.recall", interrupt)
    done = qjax("quantize", source, tmp_path / "out", *arguments)
    assert done.status == 130 and "--resume goes on" in done.err
    assert (tmp_path / ".out.partial").is_dir() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--resume", "--format", "orbax"), ("--resume", "compressed-tensors", "orbax")),
        (("--spill", "nowhere"), ("nowhere", "cannot hold activations")),
    ],
)
def test_what_cannot_be_is_one_line(qjax, source, tmp_path, arguments, options, words):
    done = qjax("quantize", source, tmp_path / "out", *arguments, *options)
    assert done.status == 1 and done.err.count("\n") == 1
    assert all(word in done.err for word in words), done.err
    assert {path.name for path in tmp_path.iterdir()} == {"model", "text.txt"}
