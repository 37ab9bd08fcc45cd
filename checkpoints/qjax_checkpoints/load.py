# SPDX-License-Identifier: Apache-2.0
"""The one door in: `load` tells what kind of directory it was given and reads it."""

from pathlib import Path

from jax.typing import DTypeLike

from qjax_checkpoints.checkpoint import Checkpoint
from qjax_checkpoints.compressed_tensors.read import load_compressed
from qjax_checkpoints.directory import (
    DESCRIPTION_FILE,
    ModelDirectory,
    check_directory,
    open_directory,
)
from qjax_checkpoints.orbax_directory import load_orbax
from qjax_checkpoints.parameters import load_plain


def load(path: Path | str, dtype: DTypeLike | None = None) -> Checkpoint:
    """Loads a model directory: plain Hugging Face, compressed-tensors, or qjax's own.

    Args:
        path: the directory.
        dtype: what floating-point parameters are cast to, and what the model computes in; None
            leaves them as they are stored. Codes and scales of quantized layers are never cast.

    Raises:
        ValueError: the directory is none of these, or broken; the message is one line that names
            the file, layer or tensor.
    """
    path = Path(path)
    check_directory(path)
    if (path / DESCRIPTION_FILE).is_file():
        model, config = load_orbax(path, dtype)
        return Checkpoint(model=model, config=config, path=path, kind="qjax")
    directory = open_directory(path)
    if directory.config.get("quantization_config"):
        model, notes = load_compressed(directory, dtype)
        return Checkpoint(
            model=model, config=directory.config, path=path, kind="compressed-tensors", notes=notes
        )
    model = load_plain(directory, dtype)
    return Checkpoint(model=model, config=directory.config, path=path, kind="plain")


def open_plain(path: Path) -> ModelDirectory | None:
    """Opens a Hugging Face directory of plain tensors without reading them; None: it is another kind.

    Raises:
        ValueError: as `load` does.
    """
    check_directory(path)
    if (path / DESCRIPTION_FILE).is_file():
        return None
    directory = open_directory(path)
    return None if directory.config.get("quantization_config") else directory
