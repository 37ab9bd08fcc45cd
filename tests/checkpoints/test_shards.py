# SPDX-License-Identifier: Apache-2.0
"""Writing: files that the safetensors package reads, in shards that our reader finds."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors.numpy

from qjax_checkpoints.directory import open_directory
from qjax_checkpoints.safetensors_file import open_safetensors
from qjax_checkpoints.shards import pending, pending_array, write_safetensors, write_weights


def test_the_package_reads_it(tmp_path):
    arrays = {
        "bytes": np.arange(7, dtype=np.uint8),
        "matrix": np.arange(6, dtype=np.float32).reshape(2, 3),
        "brain": np.arange(4).astype(ml_dtypes.bfloat16),
        "shape": np.array([2, 3], np.int64),
        "empty": np.zeros((0, 4), np.float16),
        "scalar": np.array(2.5, np.float32),
    }
    tensors = {name: pending_array(array) for name, array in arrays.items()}
    write_safetensors(tmp_path / "m.safetensors", tensors)
    back = safetensors.numpy.load_file(tmp_path / "m.safetensors")
    assert set(back) == set(arrays)
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype and back[name].shape == array.shape
        assert back[name].tobytes() == array.tobytes()


def test_every_tensor_is_aligned(tmp_path):
    tensors = {
        "a": pending_array(np.zeros(3, np.uint8)),
        "b": pending_array(np.zeros(3, np.float64)),
        "c": pending_array(np.zeros(3, np.float16)),
        "d": pending_array(np.zeros(3, np.float32)),
    }
    write_safetensors(tmp_path / "m", tensors)
    for entry in open_safetensors(tmp_path / "m").entries.values():
        assert entry.begin % entry.dtype.itemsize == 0


def test_pending_computes_late():
    calls = []

    def transpose(x):
        calls.append(x)
        return x.T

    tensor = pending(transpose, jnp.ones((2, 3), jnp.float8_e4m3fn))
    assert (tensor.shape, tensor.dtype) == ((3, 2), np.dtype(ml_dtypes.float8_e4m3fn))
    assert len(calls) == 1  # the abstract evaluation that gave the shape
    assert tensor.compute().tolist() == [[1, 1]] * 3


def test_one_file_below_the_limit(tmp_path):
    write_weights(tmp_path, {"a": pending_array(np.ones(10, np.float32))}, shard_bytes=40)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_shards_above_the_limit(tmp_path):
    arrays = {f"layer.{i}": np.full(10 + i, i, np.float32) for i in range(5)}
    arrays["large"] = np.full(100, 9, np.float32)
    tensors = {name: pending_array(array) for name, array in arrays.items()}
    write_weights(tmp_path, tensors, shard_bytes=100)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in arrays.values())
    assert sorted(set(index["weight_map"].values())) == [
        f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)
    ]
    for path in tmp_path.glob("*.safetensors"):
        file = open_safetensors(path)
        assert sum(e.nbytes for e in file.entries.values()) <= 100 or list(file.entries) == [
            "large"
        ]
    (tmp_path / "config.json").write_text("{}")
    directory = open_directory(tmp_path)
    assert set(directory) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(directory.tensor(name), array)
