# SPDX-License-Identifier: Apache-2.0
"""Weights on their way to the disk: one tensor in memory at a time, one file or several.

The safetensors package wants every tensor of a file in memory at once, in its final layout; for a
model whose matrices are stored transposed that is a second copy of the model. Here a tensor's shape
and dtype are known beforehand, so the header is written first, and each tensor is computed,
written to its place and forgotten: in one go, or part by part as a long run gets them.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np

from qjax_checkpoints.directory import INDEX_FILE, WEIGHTS_FILE
from qjax_checkpoints.json_file import write_json
from qjax_checkpoints.safetensors_file import SafetensorsFile, dtype_name, open_safetensors

SHARD_BYTES = 5_000_000_000  # what Hugging Face's own writer has used for years


@dataclasses.dataclass(frozen=True, kw_only=True)
class PendingTensor:
    """A tensor that is known by shape and dtype, and computed when it is written.

    Attributes:
        shape: the shape in the file.
        dtype: the dtype in the file.
        compute: makes the array.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    compute: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def pending(function: Callable[..., jax.Array], *arguments: object) -> PendingTensor:
    """Returns `function(*arguments)` as a tensor still to be computed.

    Example:
        >>> transposed = pending(jax.numpy.transpose, jax.numpy.ones((2, 3)))
        >>> transposed.shape
        (3, 2)
    """
    result = jax.eval_shape(function, *arguments)
    return PendingTensor(
        shape=result.shape,
        dtype=np.dtype(result.dtype),
        compute=lambda: np.asarray(jax.jit(function)(*arguments)),
    )


def pending_array(array: np.ndarray) -> PendingTensor:
    """Returns an array that exists already."""
    return PendingTensor(shape=array.shape, dtype=array.dtype, compute=lambda: array)


def write_weights(
    folder: Path, tensors: Mapping[str, PendingTensor], *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes `model.safetensors`, or numbered shards and their index if that file were too large.

    Args:
        folder: an existing directory.
        tensors: every tensor by its name.
        shard_bytes: upper limit of a file; one tensor alone may exceed it.
    """
    for name, shard in _files(folder, tensors, shard_bytes).items():
        write_safetensors(folder / name, shard)


def lay_out_weights(
    folder: Path, tensors: Mapping[str, PendingTensor], *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes what `write_weights` does, with zeros in place of the tensors: nothing is computed."""
    for name, shard in _files(folder, tensors, shard_bytes).items():
        _lay_out(folder / name, shard)


def write_safetensors(path: Path, tensors: Mapping[str, PendingTensor]) -> None:
    """Writes one safetensors file, computing one tensor at a time.

    Raises:
        ValueError: the format cannot hold a tensor's dtype.
    """
    _lay_out(path, tensors)
    write_tensors(open_safetensors(path), tensors)


def write_tensors(file: SafetensorsFile, tensors: Mapping[str, PendingTensor]) -> None:
    """Computes tensors, one at a time, and writes each to its place in a file that has one for it.

    When this returns they are on the disk.
    """
    with file.path.open("r+b") as out:
        for name, tensor in tensors.items():
            entry = file.entry(name)
            assert (entry.dtype, entry.shape) == (tensor.dtype, tensor.shape), name
            out.seek(entry.begin)
            out.write(_checked(name, tensor))
        out.flush()
        os.fsync(out.fileno())


def _lay_out(path: Path, tensors: Mapping[str, PendingTensor]) -> None:
    """Writes the header of a safetensors file and makes the file as long as it says."""
    # Falling item size keeps every tensor aligned to its own dtype, as the format asks of writers.
    names = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    # Readers of the PyTorch side insist on the metadata: "pt" says how the tensors are laid out.
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        tensor = tensors[name]
        header[name] = {
            "dtype": dtype_name(tensor.dtype),
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # the tensors begin at a multiple of eight
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(file.tell() + offset)


def _files(
    folder: Path, tensors: Mapping[str, PendingTensor], shard_bytes: int
) -> dict[str, dict[str, PendingTensor]]:
    """Returns the tensors of each file by its name; writes the index where there are several."""
    shards = list(_shards(tensors, shard_bytes))
    if len(shards) == 1:
        return {WEIGHTS_FILE: shards[0]}
    files = {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard
        for number, shard in enumerate(shards, start=1)
    }
    weight_map = {name: file for file, shard in files.items() for name in shard}
    total_size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    write_json(folder / INDEX_FILE, index)
    return files


def _checked(name: str, tensor: PendingTensor) -> memoryview:
    """Computes a tensor and returns its bytes."""
    array = tensor.compute()
    assert array.dtype == tensor.dtype and array.shape == tensor.shape, (name, array.shape)
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _shards(
    tensors: Mapping[str, PendingTensor], shard_bytes: int
) -> Iterator[dict[str, PendingTensor]]:
    """Yields consecutive runs of tensors, each as long as the limit allows."""
    shard: dict[str, PendingTensor] = {}
    filled = 0
    for name, tensor in tensors.items():
        if shard and filled + tensor.nbytes > shard_bytes:
            yield shard
            shard, filled = {}, 0
        shard[name] = tensor
        filled += tensor.nbytes
    yield shard
