# SPDX-License-Identifier: Apache-2.0
"""A model quantized part by part: the bytes are those of one piece, after any kill, in little memory."""

import errno
import fcntl
import gc
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from qjax import Method, Recipe, quantize_sequentially
from qjax.algorithms import gptq, learned_rounding
from qjax.method import names as method_names
from qjax.storage import Storage
from qjax_checkpoints import shards, streaming, unfinished
from qjax_checkpoints.load import load, open_plain
from qjax_checkpoints.parameters import abstract_plain
from qjax_checkpoints.save import save
from qjax_checkpoints.streaming import StreamedStorage
from qjax_models import blockwise, rotatable

# Files; what depends on jax, test_sequential asks of every version.
pytestmark = pytest.mark.one_version

RULES = [["lm_head", "w8a16-channel"], [".*layers/1/mlp.*", None], [".*", "w4a16-g16"]]
ALL_LINKS = replace(
    Method.parse("rotation+awq+gptq"), learned=learned_rounding.Options(steps=5, batch=1)
)
TOKENS = np.random.default_rng(0).integers(0, 97, (6, 16)).astype(np.int32)


@pytest.fixture
def llama(tiny_llama):
    def write(**changes) -> Path:
        path, _ = tiny_llama(**({"intermediate_size": 64} | changes))
        (path / "tokenizer.json").write_text("{}")
        return path

    return write


def stream(
    source: Path, out: Path, method="gptq", rules=RULES, tokens=TOKENS, resume=False, spill=None,
           experts="routed", true_sequential=False, **options):  # fmt: skip
    directory, recipe = open_plain(source), Recipe.from_json(rules)
    method = Method.parse(method) if isinstance(method, str) else method
    how = {"experts": experts, "true_sequential": true_sequential}
    identity = streaming.identify(directory, recipe, method, tokens, **how)
    model = abstract_plain(directory)
    if method.rotated is not None:
        model = rotatable(model, recipe)
    with streaming.streamed_output(
        directory, model, recipe, out, identity, resume=resume, **options
    ) as storage:
        _, report = quantize_sequentially(
            model, blockwise, tokens, recipe,
            method=method, batch_size=4, storage=storage, spill=spill, **how,
        )  # fmt: skip
        storage.complete(report.as_json() | {"run": identity})
    return report


def contents(out: Path) -> dict[str, bytes | dict]:
    """The files of a directory, the report without its seconds."""
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    report = json.loads(files["qjax_report.json"])
    for entry in (report["totals"], *report["layers"]):
        entry.pop("seconds")
    return files | {"qjax_report.json": report}


class Stopped(BaseException):
    """What ends a run here."""


@pytest.mark.parametrize(
    ("scheme", "method", "dtype", "in_turn"),
    [
        ("nvfp4", "rtn", np.float32, False),
        ("w3a16-g16-asym", "awq", jax.numpy.bfloat16, False),
        ("w8a8", "smoothquant+gptq", jax.numpy.bfloat16, False),
        ("w4a16-g16", "gptq", jax.numpy.bfloat16, True),
        ("w8a8-static", "awq+gptq", jax.numpy.bfloat16, True),
        pytest.param("w4a16-g16", ALL_LINKS, jax.numpy.bfloat16, False, id="all links"),
    ],
)
def test_the_bytes_of_one_piece_however_they_came(
    llama, tmp_path, monkeypatch, scheme, method, dtype, in_turn
):
    options = {"true_sequential": in_turn, "shard_bytes": 20_000}
    rotated = method is ALL_LINKS
    source, rules = llama(dtype=dtype, tie_word_embeddings=rotated), [[".*", scheme]]
    stream(source, tmp_path / "streamed", method, rules, **options)
    streamed = contents(tmp_path / "streamed")

    with monkeypatch.context() as patch:
        patch.setattr(StreamedStorage, "release", stop_at(StreamedStorage.release, "layers/0"))
        with pytest.raises(Stopped):
            stream(source, tmp_path / "stopped", method, rules, **options)
    assert not (tmp_path / "stopped").exists() and (tmp_path / ".stopped.partial").exists()
    stream(source, tmp_path / "stopped", method, rules, resume=True, spill=tmp_path, **options)  # fmt: skip
    assert contents(tmp_path / "stopped") == streamed

    checkpoint = load(source)
    model, report = quantize_sequentially(
        rotatable(checkpoint.model, Recipe.from_json(rules)) if rotated else checkpoint.model,
        blockwise,
        TOKENS,
        Recipe.from_json(rules),
        method=method,
        batch_size=4,
        true_sequential=in_turn,
    )
    save(
        model, checkpoint, tmp_path / "whole", "compressed-tensors", report.as_json(),
        shard_bytes=20_000,
    )  # fmt: skip
    name = method if isinstance(method, str) else method.name
    assert streamed["qjax_report.json"].pop("run")["method"] == name
    whole = contents(tmp_path / "whole")
    assert streamed.keys() == whole.keys() and len(whole) > 4
    # The file has the reciprocal of nvfp4's scale of a tensor, and later blocks see what the file says.
    assert streamed == whole or scheme == "nvfp4"
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"llama", "streamed", "stopped", "whole"}


@pytest.mark.parametrize("in_turn", [False, True])
def test_experts_by_parts_too(tiny_mixtral, tmp_path, monkeypatch, in_turn):
    """Some of them see too few of the tokens: what is said of those, in the report, comes back, too."""
    rules, how = [[".*", "w4a16-g16"]], {"true_sequential": in_turn}
    with monkeypatch.context() as patch:
        patch.setattr(StreamedStorage, "release", stop_at(StreamedStorage.release, "layers/0"))
        with pytest.raises(Stopped):
            stream(tiny_mixtral, tmp_path / "stopped", rules=rules, **how)
    refused(
        tiny_mixtral, tmp_path / "stopped", "tokens of experts was routed, now it is all",
        rules=rules, experts="all", resume=True, **how,
    )  # fmt: skip
    report = stream(tiny_mixtral, tmp_path / "stopped", rules=rules, resume=True, **how)
    assert any("tokens for 48 inputs: filled up" in line for line in report.warnings())

    checkpoint = load(tiny_mixtral)
    model, whole = quantize_sequentially(
        checkpoint.model,
        blockwise,
        TOKENS,
        Recipe.from_json(rules),
        method="gptq",
        batch_size=4,
        **how,
    )
    save(model, checkpoint, tmp_path / "whole", "compressed-tensors", whole.as_json())
    streamed = contents(tmp_path / "stopped")
    del streamed["qjax_report.json"]["run"]
    assert streamed == contents(tmp_path / "whole")
    assert len(whole.quantized) == 2 * (4 + 3 * 4) and "block_sparse_moe/gate" in {
        layer.path.split("/", 3)[-1] for layer in whole.unquantized
    }


def stop_at(method, part: str):
    def wrapper(self, path, *args):
        method(self, path, *args)
        if path.endswith(part):
            raise Stopped

    return wrapper


class Snapshots:
    """What lies on the disk at every step of a run, and between the tensors of a part."""

    def __init__(self, folder: Path, partial: Path, monkeypatch):
        self.folder, self.partial, self.seen = folder, partial, {}
        for module, name in ((os, "fsync"), (shards, "_checked"), (shutil, "copyfile"),
                             (unfinished, "write_json"), (streaming, "write_json")):  # fmt: skip
            monkeypatch.setattr(module, name, self.watched(getattr(module, name)))
        for name in ("load", "recall", "release", "complete"):
            watched = self.watched(getattr(StreamedStorage, name))
            monkeypatch.setattr(StreamedStorage, name, watched)
        for name in ("rename", "replace", "mkdir"):
            monkeypatch.setattr(Path, name, self.watched(getattr(Path, name)))

    def watched(self, function):
        def wrapper(*args, **options):
            result = function(*args, **options)
            self.take()
            return result

        return wrapper

    def take(self) -> None:
        files = {
            str(path.relative_to(self.partial)): path.read_bytes() if path.is_file() else None
            for path in sorted(self.partial.rglob("*"))
        }
        self.seen.setdefault(repr(files), files)

    def restore(self, files: dict[str, bytes | None]) -> None:
        self.partial.mkdir()
        for name, content in files.items():
            path = self.partial / name
            path.mkdir(parents=True) if content is None else path.write_bytes(content)


def test_a_kill_at_any_moment_shows_in_no_byte(llama, tmp_path, method="gptq"):
    source, out = llama(), tmp_path / "out"
    with pytest.MonkeyPatch.context() as monkeypatch:
        snapshots = Snapshots(tmp_path, tmp_path / ".out.partial", monkeypatch)
        stream(source, out, method)
    expected = contents(out)
    states = list(snapshots.seen.values())
    assert len(states) > 40
    finished = [sum(name.startswith("finished/") and name.endswith(".json") for name in state)
                for state in states]  # fmt: skip
    assert set(finished) == {0, 1, 2, 3, 4}  # two blocks, the head, the table of tokens
    # All around each moment at which a part becomes finished, and some of the others.
    turns = [i for i, (a, b) in enumerate(zip(finished, finished[1:], strict=False)) if a != b]
    chosen = {0, 5, len(states) - 1}
    chosen |= {i + j for i in turns for j in (0, 1)}
    for i in sorted(chosen):
        shutil.rmtree(out)
        snapshots.restore(states[i])
        stream(source, out, method, resume=True)
        assert contents(out) == expected, i
        assert not snapshots.partial.exists()


def peak_of_live_arrays(monkeypatch, run) -> int:
    """The most bytes of arrays alive whenever a part was brought or taken."""
    before, peak = live_bytes(), [0]

    def watched(method):
        def wrapper(self, path, module, *reports):
            peak[0] = max(peak[0], live_bytes() - before)
            method(self, path, module, *reports)
            peak[0] = max(peak[0], live_bytes() - before)

        return wrapper

    with monkeypatch.context() as patch:
        for kind in (Storage, StreamedStorage):
            for name in ("load", "keep", "recall", "release"):
                patch.setattr(kind, name, watched(getattr(kind, name)))
        gc.freeze()  # what tests before left: to look through it each time would take minutes
        try:
            run()
        finally:
            gc.unfreeze()
    return peak[0]


def live_bytes() -> int:
    gc.collect()  # what waits for it is no use of memory, and when it comes depends on tests before
    return sum(array.nbytes for array in jax.live_arrays())


def test_memory_does_not_grow_with_the_number_of_blocks(llama, tmp_path, monkeypatch):
    peaks, whole = [], []
    for layers in (2, 4):
        source = llama(num_hidden_layers=layers)

        def streamed(source=source, layers=layers):
            stream(source, tmp_path / f"out{layers}", rules=[[".*", "w4a16-g16"]])

        def in_one_piece(source=source):
            quantize_sequentially(
                load(source).model, blockwise, TOKENS, "w4a16-g16", method="gptq", batch_size=4
            )

        peaks.append(peak_of_live_arrays(monkeypatch, streamed))
        whole.append(peak_of_live_arrays(monkeypatch, in_one_piece))
        shutil.rmtree(source)
    block = 4 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32)
    assert peaks[1] < peaks[0] + block / 10
    assert whole[1] > whole[0] + 1.5 * block  # that is seen when it happens
    hessians, activations, table = 4 * (3 * 32**2 + 64**2), 4 * 96 * 32, 4 * 97 * 32
    assert peaks[1] < 3 * (block + hessians) + 2 * activations + table


def refused(source, out, *words, **options):
    before = {path: path.stat().st_mtime_ns for path in out.parent.rglob("*")}
    with pytest.raises(ValueError) as caught:
        stream(source, out, **options)
    line = str(caught.value)
    assert "\n" not in line and all(word in line for word in words), line
    after = {path: path.stat().st_mtime_ns for path in out.parent.rglob("*")}
    assert {p: t for p, t in after.items() if p.name != "lock"} == {
        p: t for p, t in before.items() if p.name != "lock"
    }


@pytest.mark.parametrize("resume", [False, True])
def test_nothing_is_written_that_no_format_holds(llama, tmp_path, resume):
    """What is regrouped by hand, for the command has no method that does it."""
    method = Method(rounding=gptq.Options(order="regrouped"))
    with pytest.raises(ValueError) as caught:
        stream(llama(), tmp_path / "out", method=method, resume=resume)
    line = str(caught.value)
    assert line.startswith("layer model.layers.0.") and "its inputs are regrouped" in line
    assert "--format orbax" in line and "\n" not in line
    assert not (tmp_path / "out").exists()
    recipe = Recipe.uniform("w4a16")
    methods = [Method.parse(name, recipe=recipe) for name in method_names()]
    assert all(m.rounding is None or m.rounding.order != "regrouped" for m in methods)


@pytest.fixture
def stopped(llama, tmp_path, monkeypatch) -> tuple[Path, Path]:
    """The source and the output of a run that was stopped after its first block."""
    source, out = llama(), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(StreamedStorage, "release", stop_at(StreamedStorage.release, "layers/0"))
        with pytest.raises(Stopped):
            stream(source, out)
    return source, out


def test_only_the_same_run_goes_on(stopped, monkeypatch):
    source, out = stopped
    refused(source, out, "unfinished run", ".out.partial", "--resume", "remove")
    refused(source, out, "method was gptq, now it is awq", method="awq", resume=True)
    rules = [["lm_head", "w8a16-channel"], [".*", "w4a16-g32"]]
    refused(
        source, out, "true-sequential was False, now it is True", true_sequential=True, resume=True
    )
    refused(source, out, "recipe was", "w4a16-g16", "w4a16-g32", rules=rules, resume=True)
    refused(
        source, out, "calibration was 6 windows of 16 tokens", "now it is 5 windows",
        tokens=TOKENS[:5], resume=True,
    )  # fmt: skip
    changed = TOKENS.copy()
    changed[3, 3] += 1
    refused(source, out, "calibration was 6 windows", tokens=changed, resume=True)
    with monkeypatch.context() as patch:
        patch.setattr("qjax.__version__", "0.0.0")
        refused(source, out, "qjax was", "now it is 0.0.0", resume=True)
    weights = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 0x80]))
    refused(source, out, "source was 3 files", resume=True)


def test_two_processes_do_not_write_one_output(stopped):
    source, out = stopped
    with (out.parent / ".out.partial" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(source, out, "another process is writing it", resume=True)


def test_without_a_finished_part_nothing_stays_and_nothing_is_refused(llama, tmp_path, monkeypatch):
    source, out = llama(), tmp_path / "out"
    (tmp_path / ".out.partial" / "model").mkdir(parents=True)  # of a process that was killed early
    with monkeypatch.context() as patch:
        patch.setattr(StreamedStorage, "keep", stop_at(lambda *_: None, "layers/0"))
        with pytest.raises(Stopped):
            stream(source, out)
    assert {path.name for path in tmp_path.iterdir()} == {"llama"}
    stream(source, out, resume=True)  # nothing to go on with: it begins
    assert {path.name for path in tmp_path.iterdir()} == {"llama", "out"}


@pytest.mark.parametrize("resume", [False, True])
def test_an_existing_output_is_refused(llama, tmp_path, resume):
    source = llama()
    (tmp_path / "out").mkdir()
    refused(source, tmp_path / "out", "out: exists already", resume=resume)


def test_a_run_that_is_whole_says_so(llama, tmp_path):
    source, out = llama(), tmp_path / "out"
    report = stream(source, out)
    directory, recipe = open_plain(source), Recipe.from_json(RULES)
    (tmp_path / ".out.partial" / "finished").mkdir(parents=True)  # killed while removing it
    same = streaming.identify(directory, recipe, Method.parse("gptq"), TOKENS)
    other = streaming.identify(directory, recipe, Method.parse("awq"), TOKENS)
    assert streaming.completed(out, other) is None
    assert streaming.completed(tmp_path / "nowhere", same) is None
    assert streaming.completed(out, same) == report
    assert {path.name for path in tmp_path.iterdir()} == {"llama", "out"}


def test_a_disk_that_fills_up_keeps_what_is_finished(llama, tmp_path, monkeypatch):
    source, out = llama(), tmp_path / "out"
    with monkeypatch.context() as patch:
        written = []

        def full(name, tensor):
            written.append(name)
            if name.startswith("model.layers.1."):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return checked(name, tensor)

        checked = shards._checked
        patch.setattr(shards, "_checked", full)
        with pytest.raises(ValueError, match="out: disk full while writing .*go on by --resume$"):
            stream(source, out)
        assert written[0].startswith("model.layers.0.")
    stream(source, out, resume=True)
    stream(source, tmp_path / "other")
    assert contents(out) == contents(tmp_path / "other")


def test_nan_in_the_last_block_is_told_before_the_first(llama, tmp_path):
    source = llama()
    tensors = dict(safetensors.numpy.load_file(source / "model.safetensors"))
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    safetensors.numpy.save_file(tensors, source / "model.safetensors")
    out = tmp_path / "out"
    refused(source, out, "model.layers.1.mlp.up_proj.weight", "NaN")
