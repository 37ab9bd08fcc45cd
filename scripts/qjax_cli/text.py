# SPDX-License-Identifier: Apache-2.0
"""From text files or token files to the windows that a model is measured on."""

from pathlib import Path

import numpy as np
from jaxtyping import Int32

from qjax_checkpoints.tokenizer import TextTokenizer, load_tokenizer


def windows_of_files(
    files: list[Path], tokenizer: TextTokenizer, length: int
) -> Int32[np.ndarray, "n length"]:
    """Tokenizes text files, one after the other, and cuts the tokens into windows.

    Args:
      files: UTF-8 text.
      tokenizer: the model's own.
      length: tokens of a window.

    Raises:
      ValueError: a file is missing or no UTF-8, or there are fewer than two tokens in all.
    """
    text = "\n".join(map(read_text, files))
    try:
        return windows(text, tokenizer, length)
    except ValueError as error:
        raise ValueError(f"{', '.join(map(str, files))}: {error}") from error


def windows(text: str, tokenizer: TextTokenizer, length: int) -> Int32[np.ndarray, "n length"]:
    """Cuts the tokens of a text into windows; a short text is one short window.

    Tokens after the last whole window are left out.

    Raises:
      ValueError: fewer than two tokens.
    """
    tokens = np.asarray(tokenizer.encode(text), np.int32)
    if len(tokens) < 2:
        raise ValueError(
            f"the text has {len(tokens)} tokens; two are needed, for the first is not predicted"
        )
    length = min(length, len(tokens))
    count = len(tokens) // length
    return tokens[: count * length].reshape(count, length)


def calibration_windows(
    files: list[Path], source: Path, vocab_size: int, *, samples: int, length: int
) -> Int32[np.ndarray, "n length"]:
    """Windows to calibrate on: of one token file, or spread evenly over the tokens of text files.

    Args:
      files: one `.npy` file, or UTF-8 text.
      source: the model's directory, whose tokenizer reads text.
      vocab_size: of the model.
      samples: the most windows.
      length: tokens of a window; those of a token file may be shorter.

    Raises:
      ValueError: what the other functions here raise, a text shorter than one window, or a token file
        beside others.
    """
    found = windows_to_train_on(files, source, vocab_size, length=length)
    return found[np.linspace(0, len(found) - 1, min(samples, len(found))).round().astype(int)]


def windows_to_train_on(
    files: list[Path], source: Path, vocab_size: int, *, length: int
) -> Int32[np.ndarray, "n length"]:
    """All windows of one token file, or of text files.

    Args:
      files: one `.npy` file, or UTF-8 text.
      source: the model's directory, whose tokenizer reads text.
      vocab_size: of the model.
      length: tokens of a window; those of a token file may be shorter.

    Raises:
      ValueError: as :func:`calibration_windows` does.
    """
    tokens_files = [file for file in files if file.suffix == ".npy"]
    if tokens_files and len(files) > 1:
        raise ValueError(f"{tokens_files[0]}: a token file is taken alone, or text files are")
    if tokens_files:
        return windows_of_array(files[0], vocab_size, length)
    found = windows_of_files(files, load_tokenizer(source, vocab_size=vocab_size), length)
    if found.shape[1] < length:
        raise ValueError(
            f"{', '.join(map(str, files))}: {found.shape[1]} tokens of text are less than one "
            f"window of {length}; give more text or a smaller --seq-len"
        )
    return found


def windows_of_array(file: Path, vocab_size: int, length: int) -> Int32[np.ndarray, "n length"]:
    """Reads windows from a `.npy` file of shape `[n, length]`, int32.

    Args:
      file: the array file.
      vocab_size: of the model; every token must lie below it.
      length: longer windows are cut to this many tokens.

    Raises:
      ValueError: the file is no such array, or holds tokens that the model does not know.
    """
    try:
        tokens = np.load(file, allow_pickle=False)
    except FileNotFoundError as error:
        raise ValueError(f"{file}: no such file") from error
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{file}: not a .npy file of numbers") from error
    if not isinstance(tokens, np.ndarray):
        raise ValueError(f"{file}: an archive of arrays; need one array, int32 [n, length]")
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"{file}: need int32 of shape [n, length], got {tokens.dtype} of {tokens.shape}"
        )
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        raise ValueError(
            f"{file}: tokens from {tokens.min()} to {tokens.max()}, the model knows 0 to "
            f"{vocab_size - 1}"
        )
    tokens = tokens[:, :length].astype(np.int32)
    if 0 in tokens.shape or tokens.shape[1] < 2:
        raise ValueError(
            f"{file}: {tokens.shape[0]} windows of {tokens.shape[1]} tokens; at least one window of "
            "two tokens is needed, for the first is not predicted"
        )
    return tokens


def read_text(file: Path) -> str:
    """Reads a UTF-8 file.

    Raises:
      ValueError: no such file, not readable, or not UTF-8; the message names it.
    """
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text: {error.reason} at byte {error.start}") from error
