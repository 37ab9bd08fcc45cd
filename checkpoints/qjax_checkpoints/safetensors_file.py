# SPDX-License-Identifier: Apache-2.0
"""One safetensors file: its tensors are views of the mapped file until somebody copies them.

A safetensors file is eight bytes with the header's length (little endian), a JSON header that gives
each tensor a dtype, a shape and a byte range, and the bytes themselves, row major and gapless.
Reading the header here rather than through the safetensors package has two reasons: its numpy API
cannot read float8, and a model larger than half of the memory must be read tensor by tensor, with
the pages of the tensors already used given back to the system.

References:
    The safetensors format, https://github.com/huggingface/safetensors#format
"""

import dataclasses
import io
import json
import math
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

_DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES: Mapping[np.dtype, str] = {dtype: name for name, dtype in _DTYPES.items()}

_LENGTH_BYTES = 8
_LONGEST_HEADER = 100_000_000  # the limit of the safetensors library, against hostile files


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """What the header says of one tensor.

    Attributes:
        dtype: the numpy dtype; low-precision floats are those of ml_dtypes.
        shape: the logical shape, row major.
        begin: first byte, counted from the start of the file.
        end: one past the last byte.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the file."""
        return self.end - self.begin


@dataclasses.dataclass(frozen=True, kw_only=True)
class SafetensorsFile:
    """An open safetensors file; `open_safetensors` makes one.

    Attributes:
        path: where the file lies, for messages.
        entries: the header, tensor name to entry, in file order.
        metadata: the header's free-form strings (`__metadata__`).
        pages: the mapped file.
    """

    path: Path
    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    pages: mmap.mmap

    def entry(self, name: str) -> TensorEntry:
        """Returns what the header says of `name`.

        Raises:
            ValueError: the file holds no tensor of this name.
        """
        if name not in self.entries:
            raise ValueError(f"{self.path}: no tensor {name!r} (it holds {len(self.entries)})")
        return self.entries[name]

    def tensor(self, name: str) -> np.ndarray:
        """Returns `name` as a read-only view of the mapped file: nothing is copied."""
        entry = self.entry(name)
        raw = np.frombuffer(self.pages, np.uint8, count=entry.nbytes, offset=entry.begin)
        return raw.view(entry.dtype).reshape(entry.shape)

    def release(self, name: str) -> None:
        """Gives the memory of `name` back to the system; a view read later maps it again."""
        entry = self.entry(name)
        # Only whole pages can be released. Rounding outwards would drop a neighbour's edge, which
        # costs that neighbour one page fault; rounding inwards would keep two pages a tensor.
        begin = entry.begin - entry.begin % mmap.PAGESIZE
        if entry.end > begin:
            self.pages.madvise(mmap.MADV_DONTNEED, begin, entry.end - begin)


def dtype_name(dtype: np.dtype) -> str:
    """Returns what the safetensors header calls `dtype`.

    Raises:
        ValueError: the format has no such dtype.

    Example:
        >>> dtype_name(np.dtype("float32"))
        'F32'
    """
    if dtype not in _NAMES:
        raise ValueError(f"safetensors cannot hold {dtype}; it holds {', '.join(_DTYPES)}")
    return _NAMES[dtype]


def open_safetensors(path: Path) -> SafetensorsFile:
    """Maps a safetensors file and checks its whole header.

    Args:
        path: the file.

    Returns:
        The open file. Nothing but the header has been read.

    Raises:
        ValueError: no such file or not readable, not a safetensors file, truncated, malformed
            header, unknown dtype, or byte ranges that overlap, leave a gap or do not fit shapes.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            header, data_begin = _read_header(path, file, size)
            entries = dict(_entries(path, header, data_begin))
            _check_ranges(path, entries, data_begin, size)
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    metadata = header.get("__metadata__", {})
    return SafetensorsFile(path=path, entries=entries, metadata=metadata, pages=pages)


def _read_header(path: Path, file: io.BufferedReader, size: int) -> tuple[dict[str, Any], int]:
    """Returns the parsed header and the file offset at which the tensors begin."""
    prefix = file.read(_LENGTH_BYTES)
    if prefix == b"version ":  # eight bytes of "version https://git-lfs..."
        raise ValueError(f"{path}: a Git LFS pointer, not the weights; fetch them: git lfs pull")
    length = int.from_bytes(prefix, "little")
    if len(prefix) < _LENGTH_BYTES or not 2 <= length <= _LONGEST_HEADER:
        raise ValueError(f"{path}: not a safetensors file ({size} bytes)")
    raw = file.read(length)
    if raw[:1] not in (b"{", b""):
        raise ValueError(f"{path}: not a safetensors file ({size} bytes)")
    if len(raw) < length:
        expected = _LENGTH_BYTES + length
        raise ValueError(
            f"{path}: truncated: expected at least {expected} bytes (header), found {size}"
        )
    try:
        header = json.loads(raw)
    except ValueError as error:  # not UTF-8 or not JSON
        raise ValueError(f"{path}: malformed safetensors header: {error}") from error
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
        raise ValueError(f"{path}: malformed safetensors header: not an object of tensors")
    return header, _LENGTH_BYTES + length


def _entries(
    path: Path, header: dict[str, Any], data_begin: int
) -> Iterator[tuple[str, TensorEntry]]:
    """Yields the header's tensors in file order, each checked for itself."""
    tensors = {name: fields for name, fields in header.items() if name != "__metadata__"}
    for name, fields in tensors.items():
        if not _well_formed(fields):
            raise ValueError(
                f"{path}: malformed safetensors header: tensor {name!r} needs dtype, shape and "
                f"data_offsets, has {json.dumps(fields)[:120]}"
            )
    for name, fields in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
        if fields["dtype"] not in _DTYPES:
            raise ValueError(
                f"{path}: tensor {name!r} has unknown dtype {fields['dtype']!r}; "
                f"known are {', '.join(_DTYPES)}"
            )
        begin, end = (data_begin + offset for offset in fields["data_offsets"])
        dtype, shape = _DTYPES[fields["dtype"]], tuple(fields["shape"])
        yield name, TensorEntry(dtype=dtype, shape=shape, begin=begin, end=end)


def _well_formed(fields: object) -> bool:
    """Says whether a tensor's header entry has its three fields in their right types."""
    if not isinstance(fields, dict) or not isinstance(fields.get("dtype"), str):
        return False
    shape, offsets = fields.get("shape"), fields.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        return False
    return all(type(number) is int and number >= 0 for number in [*shape, *offsets])


def _check_ranges(
    path: Path, entries: Mapping[str, TensorEntry], data_begin: int, size: int
) -> None:
    """Checks that the byte ranges fit their shapes and tile the file without gap or overlap."""
    covered = data_begin
    for name, entry in entries.items():
        needed = math.prod(entry.shape) * entry.dtype.itemsize
        if entry.nbytes != needed:
            raise ValueError(
                f"{path}: tensor {name!r} has {entry.nbytes} bytes, "
                f"but {list(entry.shape)} of {entry.dtype} needs {needed}"
            )
        if entry.begin != covered:
            fault = "overlaps the one before it" if entry.begin < covered else "leaves a gap"
            raise ValueError(
                f"{path}: tensor {name!r} {fault}: it begins at byte {entry.begin}, not {covered}"
            )
        covered = entry.end
    if size < covered:
        raise ValueError(f"{path}: truncated: expected {covered} bytes, found {size}")
    if size > covered:
        raise ValueError(f"{path}: expected {covered} bytes, found {size}: too many")
