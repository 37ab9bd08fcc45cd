# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face model directory as a value: a configuration and tensors by name.

Whether the tensors lie in one `model.safetensors` or in shards under a
`model.safetensors.index.json` is known here and nowhere else.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qjax_checkpoints.json_file import read_json
from qjax_checkpoints.safetensors_file import SafetensorsFile, TensorEntry, open_safetensors

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DESCRIPTION_FILE, ARRAYS = "qjax.json", "arrays"  # of one of qjax's own
# What makes a model and its tokenizer; in qjax's own directory (orbax_directory) arrays as well.
_MODEL_FILES = ("*.safetensors", "*.json", "tokenizer*", "vocab*", "merges.txt", "chat_template*")
# What is read of a file for its fingerprint, in bytes: all of a small one, pieces of a larger one.
_READ_WHOLE, _PIECE, _PIECES = 2**20, 2**16, 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelDirectory:
    """An open model directory; `open_directory` makes one.

    Attributes:
        path: the directory.
        config: `config.json` as it stands there.
        files: tensor name to the open file that holds it, in file order.
    """

    path: Path
    config: Mapping[str, Any]
    files: Mapping[str, SafetensorsFile]

    def __contains__(self, name: str) -> bool:
        """Says whether there is a tensor of this name."""
        return name in self.files

    def __iter__(self) -> Iterator[str]:
        """Yields the tensor names, in file order."""
        return iter(self.files)

    def entry(self, name: str) -> TensorEntry:
        """Returns dtype and shape of a tensor.

        Raises:
            ValueError: there is none of this name.
        """
        return self._file(name).entry(name)

    def tensor(self, name: str) -> np.ndarray:
        """Returns a tensor as a view of its mapped file."""
        return self._file(name).tensor(name)

    def release(self, name: str) -> None:
        """Gives the memory of a tensor back to the system."""
        self._file(name).release(name)

    def _file(self, name: str) -> SafetensorsFile:
        if name not in self.files:
            raise ValueError(f"{self.path}: no tensor {name!r} (it holds {len(self.files)})")
        return self.files[name]


def open_directory(path: Path) -> ModelDirectory:
    """Opens a model directory: reads its configuration and the headers of its weight files.

    Raises:
        ValueError: no such directory, no or broken `config.json`, no weights, weights that are
            not safetensors, or an index that names absent files or tensors.
    """
    check_directory(path)
    config = read_json(path / CONFIG_FILE)
    if (path / WEIGHTS_FILE).is_file():
        file = open_safetensors(path / WEIGHTS_FILE)
        return ModelDirectory(path=path, config=config, files=dict.fromkeys(file.entries, file))
    if (path / INDEX_FILE).is_file():
        return ModelDirectory(path=path, config=config, files=_indexed_files(path))
    raise ValueError(_why_no_weights(path))


def check_directory(path: Path) -> None:
    """Checks that `path` is a directory with a `config.json`.

    Raises:
        ValueError: it is not.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such directory")
    if not path.is_dir():
        raise ValueError(f"{path}: not a directory; give the directory that holds {CONFIG_FILE}")
    if not (path / CONFIG_FILE).is_file():
        raise ValueError(f"{path}: not a model directory: it has no {CONFIG_FILE}")


def fingerprint(path: Path) -> str:
    """The files that make a model, by name, size and content: a copy has the same, wherever it lies.

    Those are the weights, the JSON files and the tokenizer's at the top of the directory, and the arrays
    of one of qjax's own. Of a file above 1 MiB pieces are read, the first and the last among them: all
    of it would take minutes. Other weights differ in each piece, but a change of a few tensors may lie
    between two, and is not seen then. Nor is what lies in other folders and in other files.

    Raises:
        ValueError: it is no model directory.
    """
    check_directory(path)
    digest, total = hashlib.sha256(), 0
    files = _files_of_the_model(path)
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path).as_posix()}\n{size}\n".encode())
        for piece in _pieces(file, size):
            digest.update(piece)
        total += size
    return f"{len(files)} files of {total} bytes ({digest.hexdigest()[:12]})"


def _files_of_the_model(path: Path) -> list[Path]:
    found = {file for pattern in _MODEL_FILES for file in path.glob(pattern)}
    if (path / DESCRIPTION_FILE).is_file():
        found |= set((path / ARRAYS).rglob("*"))
    return sorted(file for file in found if file.is_file())


def _pieces(file: Path, size: int) -> Iterator[bytes]:
    """All of a small file; of a larger one pieces at even distances, from its first byte to its last."""
    with file.open("rb") as opened:
        if size <= _READ_WHOLE:
            yield opened.read()
            return
        for i in range(_PIECES):
            opened.seek((size - _PIECE) * i // (_PIECES - 1))
            yield opened.read(_PIECE)


def _indexed_files(path: Path) -> dict[str, SafetensorsFile]:
    """Opens the shards that the index names and finds every indexed tensor in its shard."""
    index = path / INDEX_FILE
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise ValueError(f"{index}: needs a weight_map from tensor names to file names")
    shards = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard or not (path / shard).is_file():
            raise ValueError(f"{index}: names the file {shard!r}, which is not in {path}")
        shards[shard] = open_safetensors(path / shard)
    for name, shard in weight_map.items():
        if name not in shards[shard].entries:
            raise ValueError(f"{index}: says that {shard} holds {name!r}, but it does not")
    return {name: shards[shard] for name, shard in weight_map.items()}


def _why_no_weights(path: Path) -> str:
    """Returns the one line that says what lies there instead of safetensors weights."""
    if any(path.glob("model-*-of-*.safetensors")):
        return f"{path}: has weight shards but no {INDEX_FILE}"
    if any(path.glob("pytorch_model*.bin")):
        return f"{path}: has only PyTorch .bin weights; save it as safetensors first"
    return f"{path}: has no weights: neither {WEIGHTS_FILE} nor {INDEX_FILE}"
