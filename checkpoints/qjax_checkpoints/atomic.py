# SPDX-License-Identifier: Apache-2.0
"""A directory that exists whole or not at all.

Everything is written to a hidden sibling, `.OUT.partial-PID-xxxxxxxx`, flushed to the disk, and
renamed to OUT in one step. An exception removes the sibling; a process that is killed leaves it,
under a name that says what it is, and never anything under OUT.
"""

import contextlib
import errno
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

# A file-size limit and a used-up quota are, to the user, a full disk.
_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def check_writable(out: Path) -> None:
    """Checks that `out` can be made: call it before hours of work, not after them.

    Args:
        out: the directory to be written; it must not exist, its parents may be missing.

    Raises:
        ValueError: `out` exists, or the nearest existing parent is no writable directory.
    """
    if os.path.lexists(out):
        raise ValueError(f"{out}: exists already; choose another output or remove it")
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise ValueError(f"{out}: cannot be written: {parent} is not a directory")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"{out}: cannot be written: no permission to write in {parent}")


def check_space(out: Path, needed: int) -> None:
    """Checks that the disk has room for `needed` bytes more.

    Raises:
        ValueError: it has less.
    """
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ValueError(
            f"{out}: disk full: the weights take {needed / 2**20:.1f} MiB, and {parent} has "
            f"{free / 2**20:.1f} MiB left; nothing was written"
        )


@contextlib.contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Hands out a temporary sibling of `out` that becomes `out` when the block ends well.

    Args:
        out: the directory to make; it must not exist.

    Yields:
        The temporary directory to write into.

    Raises:
        ValueError: `out` exists or cannot be made (before any work), or the disk is full.

    Example:
        >>> import tempfile
        >>> out = Path(tempfile.mkdtemp()) / "model"
        >>> with new_directory(out) as folder:
        ...     _ = (folder / "config.json").write_text("{}")
        ...     out.exists()
        False
        >>> (out / "config.json").exists()
        True
    """
    check_writable(out)
    out = out.absolute()
    partial = out.parent / f".{out.name}.partial-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        partial.mkdir(parents=True)
        yield partial
        flush(partial)
        check_writable(out)  # renaming onto an empty directory made meanwhile would replace it
        partial.rename(out)
        flush_directory(out.parent)
    except BaseException as error:  # an interrupt must clean up too
        _remove(partial)
        if reason := disk_full_reason(error):
            raise ValueError(
                f"{out}: disk full while writing ({reason}); nothing is left of it"
            ) from error
        raise


def _remove(folder: Path) -> None:
    """Removes a directory that TensorStore may write to for a moment after a write that failed."""
    shutil.rmtree(folder, ignore_errors=True)
    for pause in (0.05, 0.2, 1.0, 3.0):
        time.sleep(pause)
        if not folder.exists():
            return
        shutil.rmtree(folder, ignore_errors=True)


def disk_full_reason(error: BaseException) -> str | None:
    """Returns the system's words if the disk was full, else None.

    TensorStore, below Orbax, reports errors of the system in words, without their number.
    """
    for number in _DISK_FULL:
        words = os.strerror(number)
        numbered = isinstance(error, OSError) and error.errno == number
        if numbered or (isinstance(error, Exception) and words in str(error)):
            return words
    return None


def flush(folder: Path) -> None:
    """Forces every file and directory below `folder` to the disk."""
    for directory, _, files in os.walk(folder):
        for name in files:
            with open(Path(directory, name), "rb") as file:
                os.fsync(file.fileno())
        flush_directory(Path(directory))


def flush_directory(folder: Path) -> None:
    """Forces a directory's list of names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
