# SPDX-License-Identifier: Apache-2.0
"""Model directories: whole ones, and each way of being incomplete with its one line."""

import json
import os
import shutil

import numpy as np
import pytest
import safetensors.numpy

from qjax_checkpoints.directory import fingerprint, open_directory
from qjax_checkpoints.load import load
from qjax_checkpoints.save import save


@pytest.fixture
def sharded(tmp_path):
    """A directory of two shards."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for i in (1, 2):
        arrays = {f"t{i}": np.full(3, i, np.float32)}
        safetensors.numpy.save_file(arrays, tmp_path / f"model-{i:05d}-of-00002.safetensors")
    weight_map = {f"t{i}": f"model-{i:05d}-of-00002.safetensors" for i in (1, 2)}
    write_index(tmp_path, weight_map)
    return tmp_path


def write_index(path, weight_map):
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def message(path) -> str:
    with pytest.raises(ValueError) as caught:
        open_directory(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_shards(sharded):
    directory = open_directory(sharded)
    assert directory.config == {"model_type": "llama"}
    assert list(directory) == ["t1", "t2"] and "t1" in directory and "t3" not in directory
    assert directory.tensor("t2").tolist() == [2, 2, 2]
    assert directory.entry("t2").shape == (3,)
    directory.release("t2")
    with pytest.raises(ValueError, match=r"no tensor 't3' \(it holds 2\)"):
        directory.tensor("t3")


def test_single_file(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    safetensors.numpy.save_file({"a": np.ones(2)}, tmp_path / "model.safetensors")
    assert list(open_directory(tmp_path)) == ["a"]


def test_no_directory(tmp_path):
    assert message(tmp_path / "absent") == f"{tmp_path / 'absent'}: no such directory"


def test_a_file(tmp_path):
    (tmp_path / "f").write_text("")
    assert "not a directory; give the directory that holds config.json" in message(tmp_path / "f")


def test_no_config(tmp_path):
    assert message(tmp_path) == f"{tmp_path}: not a model directory: it has no config.json"


@pytest.mark.parametrize("text", ["{", "[]", "\ud800".encode("utf-8", "surrogatepass")])
def test_broken_config(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert str(tmp_path / "config.json") in message(tmp_path)


def test_no_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert "has no weights: neither model.safetensors nor" in message(tmp_path)
    (tmp_path / "pytorch_model.bin").write_text("")
    assert "has only PyTorch .bin weights" in message(tmp_path)


def test_shards_without_index(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    assert "has weight shards but no model.safetensors.index.json" in message(sharded)


def test_index_names_an_absent_file(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    assert "names the file 'model-00002-of-00002.safetensors', which is not in" in message(sharded)


def test_index_names_a_file_elsewhere(sharded):
    write_index(sharded, {"t1": "../secret.safetensors"})
    assert "names the file '../secret.safetensors'" in message(sharded)


def test_index_names_an_absent_tensor(sharded):
    write_index(sharded, {"t9": "model-00001-of-00002.safetensors"})
    assert "says that model-00001-of-00002.safetensors holds 't9', but it does not" in message(
        sharded
    )


@pytest.mark.parametrize("weight_map", [None, [], {"a": 1}])
def test_index_without_a_map(sharded, weight_map):
    write_index(sharded, weight_map)
    assert "needs a weight_map" in message(sharded)


def flip(file, place):
    """Changes one byte, and neither the size of the file nor its time."""
    times = file.stat()
    with file.open("r+b") as opened:
        opened.seek(place)
        byte = opened.read(1)[0]
        opened.seek(place)
        opened.write(bytes([byte ^ 1]))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_a_fingerprint_is_of_what_makes_the_model(sharded, tmp_path_factory):
    (sharded / "tokenizer.json").write_text("{}")
    before = fingerprint(sharded)
    copied = tmp_path_factory.mktemp("elsewhere") / "copied"
    shutil.copytree(sharded, copied, copy_function=shutil.copyfile)  # with times of its own
    os.utime(sharded / "config.json")
    (sharded / "README.md").write_text("about it")
    (sharded / "out.training").mkdir()
    (sharded / "out.training" / "run.json").write_text("{}")
    assert fingerprint(copied) == fingerprint(sharded) == before
    assert before.startswith("5 files of ")
    (sharded / "tokenizer.json").write_text("[]")
    assert fingerprint(sharded) != before


def test_other_weights_of_the_same_size_and_time_have_another_fingerprint(sharded):
    small, large = (sharded / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    size = 5 * 2**20
    with large.open("ab") as file:
        file.write(bytes(size - large.stat().st_size))
    seen = {fingerprint(sharded)}
    for file, place in ((small, -1), (large, 0), (large, size // 3), (large, size - 1)):
        flip(file, place % file.stat().st_size)
        seen.add(fingerprint(sharded))
    assert len(seen) == 5


def test_a_fingerprint_has_the_arrays_of_a_directory_of_qjax(tiny_llama, tmp_path):
    source = load(tiny_llama()[0])
    save(source.model, source, tmp_path / "out", "orbax")
    arrays = [file for file in (tmp_path / "out" / "arrays").rglob("*") if file.is_file()]
    before = fingerprint(tmp_path / "out")
    assert before.startswith(f"{len(arrays) + 2} files of ")  # and config.json, qjax.json
    flip(max(arrays, key=lambda file: file.stat().st_size), 100)
    assert fingerprint(tmp_path / "out") != before
