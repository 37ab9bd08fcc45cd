# SPDX-License-Identifier: Apache-2.0
"""Weights on their way to the disk: one tensor in memory at a time, one file or several.

The safetensors package wants every tensor of a file in memory at once, in its final layout; for a
model whose matrices are stored transposed that is a second copy of the model. Here a tensor's shape
and dtype are known beforehand, so the header is written first, and each tensor is computed,
written and forgotten.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np

from qjax_checkpoints.directory import INDEX_FILE, WEIGHTS_FILE
from qjax_checkpoints.json_file import write_json
from qjax_checkpoints.safetensors_file import dtype_name

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
    shards = list(_shards(tensors, shard_bytes))
    if len(shards) == 1:
        write_safetensors(folder / WEIGHTS_FILE, shards[0])
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard)
        weight_map |= dict.fromkeys(shard, name)
    total_size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    write_json(folder / INDEX_FILE, index)


def write_safetensors(path: Path, tensors: Mapping[str, PendingTensor]) -> None:
    """Writes one safetensors file, computing one tensor at a time.

    Raises:
        ValueError: the format cannot hold a tensor's dtype.
    """
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
        for name in names:
            file.write(_checked(name, tensors[name]))


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
