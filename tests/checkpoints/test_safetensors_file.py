# SPDX-License-Identifier: Apache-2.0
"""Reading: every dtype, views without copies, and every way in which a file can be broken."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from qjax_checkpoints.safetensors_file import dtype_name, open_safetensors

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def write_raw(path: Path, header: object, data: bytes, header_length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(raw) if header_length is None else header_length
    path.write_bytes(length.to_bytes(8, "little") + raw + data)
    return path


def tensor(begin: int, end: int, dtype: str = "U8", shape: list[int] | None = None) -> dict:
    return {"dtype": dtype, "shape": shape or [end - begin], "data_offsets": [begin, end]}


def message(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        open_safetensors(path)
    text = str(caught.value)
    assert "\n" not in text and str(path) in text
    return text.removeprefix(f"{path}: ")


@pytest.mark.parametrize("name", DTYPES)
def test_reads_what_the_package_writes(tmp_path, name):
    array = np.arange(1, 25, dtype=np.uint8).reshape(2, 3, 4).astype(DTYPES[name])
    safetensors.numpy.save_file({"a": array, "empty": array[:0]}, tmp_path / "m.safetensors")
    file = open_safetensors(tmp_path / "m.safetensors")
    assert file.tensor("a").dtype == array.dtype
    assert file.tensor("a").tobytes() == array.tobytes()
    assert file.tensor("a").shape == (2, 3, 4)
    assert file.tensor("empty").shape == (0, 3, 4)
    assert dtype_name(array.dtype) == name


def test_tensors_are_views(tmp_path):
    safetensors.numpy.save_file({"a": np.ones(1000, np.float32)}, tmp_path / "m.safetensors")
    file = open_safetensors(tmp_path / "m.safetensors")
    assert np.shares_memory(file.tensor("a"), file.tensor("a"))
    assert not file.tensor("a").flags.writeable
    file.release("a")
    assert file.tensor("a").sum() == 1000


def test_unaligned_tensors(tmp_path):
    data = b"\x01" + np.float32(2.5).tobytes()
    header = {"a": tensor(0, 1), "b": tensor(1, 5, "F32", [1])}
    assert open_safetensors(write_raw(tmp_path / "m", header, data)).tensor("b").tolist() == [2.5]


def test_metadata_and_file_order(tmp_path):
    header = {"__metadata__": {"format": "pt"}, "b": tensor(2, 4), "a": tensor(0, 2)}
    file = open_safetensors(write_raw(tmp_path / "m", header, b"1234"))
    assert list(file.entries) == ["a", "b"] and file.metadata == {"format": "pt"}


def test_missing_tensor(tmp_path):
    path = write_raw(tmp_path / "m", {"a": tensor(0, 1)}, b"1")
    with pytest.raises(ValueError, match=rf"{path}: no tensor 'b' \(it holds 1\)"):
        open_safetensors(path).tensor("b")


def test_missing_file(tmp_path):
    assert message(tmp_path / "absent") == "no such file"


def test_unreadable_file(tmp_path, monkeypatch):
    path = write_raw(tmp_path / "m", {"a": tensor(0, 1)}, b"1")

    def closed(self, mode):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", closed)
    assert message(path) == "cannot be read: Permission denied"


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 50, b"\x05" + bytes(7) + b"hello"])
def test_not_a_safetensors_file(tmp_path, content):
    (tmp_path / "m").write_bytes(content)
    assert message(tmp_path / "m") == f"not a safetensors file ({len(content)} bytes)"


def test_git_lfs_pointer(tmp_path):
    (tmp_path / "m").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert message(tmp_path / "m").startswith("a Git LFS pointer, not the weights")


def test_truncated_in_the_header(tmp_path):
    path = write_raw(tmp_path / "m", b'{"a":', b"", header_length=100)
    assert message(path) == "truncated: expected at least 108 bytes (header), found 13"


def test_truncated_in_the_data(tmp_path):
    array = np.zeros((100, 10), np.float32)
    safetensors.numpy.save_file({"a": array}, tmp_path / "m")
    whole = (tmp_path / "m").read_bytes()
    (tmp_path / "m").write_bytes(whole[:-1000])
    assert message(tmp_path / "m") == (
        f"truncated: expected {len(whole)} bytes, found {len(whole) - 1000}"
    )


def test_bytes_behind_the_last_tensor(tmp_path):
    path = write_raw(tmp_path / "m", {"a": tensor(0, 1)}, b"12")
    assert message(path).endswith("too many")


@pytest.mark.parametrize(
    "header",
    [
        b"{not json",
        b"{\xff\xfe}",
        {"__metadata__": 3},
        {"a": 3},
        {"a": {"dtype": "U8", "shape": [1]}},
        {"a": {"dtype": "U8", "shape": [-1], "data_offsets": [0, 1]}},
        {"a": {"dtype": "U8", "shape": [1.0], "data_offsets": [0, 1]}},
        {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 2]}},
        {"a": {"dtype": 8, "shape": [1], "data_offsets": [0, 1]}},
    ],
)
def test_malformed_header(tmp_path, header):
    assert message(write_raw(tmp_path / "m", header, b"1")).startswith(
        "malformed safetensors header"
    )


def test_unknown_dtype(tmp_path):
    path = write_raw(tmp_path / "m", {"a": tensor(0, 1, "F6_E3M2")}, b"1")
    assert message(path).startswith("tensor 'a' has unknown dtype 'F6_E3M2'; known are F64, F32")


def test_shape_and_range_disagree(tmp_path):
    path = write_raw(tmp_path / "m", {"a": tensor(0, 4, "F32", [2])}, b"1234")
    assert message(path) == "tensor 'a' has 4 bytes, but [2] of float32 needs 8"


def test_overlap(tmp_path):
    path = write_raw(tmp_path / "m", {"a": tensor(0, 3), "b": tensor(2, 4)}, b"1234")
    assert "tensor 'b' overlaps the one before it" in message(path)


def test_gap(tmp_path):
    path = write_raw(tmp_path / "m", {"a": tensor(0, 1), "b": tensor(2, 4)}, b"1234")
    assert "tensor 'b' leaves a gap" in message(path)


def test_range_out_of_the_file(tmp_path):
    path = write_raw(tmp_path / "m", {"a": tensor(0, 1000)}, b"1234")
    assert message(path).startswith("truncated: expected")


def test_dtype_without_a_name():
    with pytest.raises(ValueError, match="safetensors cannot hold complex64"):
        dtype_name(np.dtype(np.complex64))
