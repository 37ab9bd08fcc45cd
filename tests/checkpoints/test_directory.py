# SPDX-License-Identifier: Apache-2.0
"""Model directories: whole ones, and each way of being incomplete with its one line."""

import json

import numpy as np
import pytest
import safetensors.numpy

from qjax_checkpoints.directory import open_directory


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
