# SPDX-License-Identifier: Apache-2.0
r"""The training text: installed packages, without the standard library and without copies of it.

The model is judged on Python's standard library, so no part of the library may be trained on.
Leaving its folder out is not enough, because installed packages carry copies of its modules,
whole or edited. Each file is therefore compared with the whole library, line by line, and is
dropped if

    shared > max_shared_lines  or  (shared > few_lines  and  shared > max_shared_share * |L(file)|)
    with  shared = |L(file) & L(library)|,

where `L` is the set of distinct telling lines: stripped, at least `min_line_chars` characters, no
import. The first bound finds a module inside a larger file, the second copies and edited copies.
What remains of the held-out lines after that is counted by `shared_with_corpus` and is part of
the training summary.
"""

import hashlib
import multiprocessing
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = (".py", ".pyi", ".md", ".rst", ".txt")


@dataclass(frozen=True, kw_only=True)
class CorpusLimits:
    """What a file must be like to be trained on."""

    # Bytes. Smaller files are mostly re-exports; larger ones are mostly generated tables.
    min_bytes: int = 256
    max_bytes: int = 512 * 1024
    # Characters: beyond this mean length of a line a file holds data, not writing.
    max_mean_line: int = 120
    # A telling line has at least this many characters; shorter ones are shared by chance.
    min_line_chars: int = 24
    # Share, and number, of a file's distinct telling lines that the library may hold as well.
    max_shared_share: float = 0.1
    max_shared_lines: int = 40
    # So many shared lines never count: a licence header has five, and some files have little else.
    few_lines: int = 8

    def __post_init__(self) -> None:
        """Refuse limits that no file can meet."""
        if not 0 <= self.min_bytes < self.max_bytes:
            raise ValueError(f"{self.min_bytes=} must be below {self.max_bytes=}")
        if not 0 <= self.max_shared_share <= 1:
            raise ValueError(f"{self.max_shared_share=} must be between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The texts kept, in the order of their paths, and what became of every file seen."""

    texts: tuple[str, ...]
    # Files by fate: kept, duplicate, shares_stdlib, too_small, too_large, long_lines, not_utf8.
    counts: dict[str, int]
    # The files dropped for what they share with the library: the last parts of their paths.
    dropped_for_stdlib: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        """Number of UTF-8 bytes kept."""
        return sum(len(text.encode()) for text in self.texts)


def telling_lines(text: str, min_chars: int) -> set[str]:
    r"""Return the distinct stripped lines of at least `min_chars` characters that import nothing.

    Example:
        >>> telling_lines("import os.path\n    return os.path.join(a, b)\npass", 10)
        {'return os.path.join(a, b)'}
    """
    lines = {line.strip() for line in text.splitlines()}
    return {
        line
        for line in lines
        if len(line) >= min_chars and not line.startswith(("import ", "from "))
    }


def stdlib_lines(stdlib: Path, min_chars: int) -> set[str]:
    """Return the telling lines of every source file of a standard library."""
    lines: set[str] = set()
    for file in sorted(stdlib.rglob("*.py")):
        if not {"site-packages", "dist-packages"} & set(file.relative_to(stdlib).parts):
            lines |= telling_lines(file.read_text(encoding="utf-8", errors="ignore"), min_chars)
    return lines


def read_corpus(
    roots: Sequence[Path], stdlib: Path, limits: CorpusLimits, num_workers: int
) -> Corpus:
    """Read, filter and deduplicate the text files below `roots`.

    Args:
        roots: folders of installed packages.
        stdlib: the folder of the standard library, which must not lie below a root.
        limits: what a file must be like.
        num_workers: processes that share the reading; 1 reads in this one.

    Returns:
        The corpus; the same for any number of workers.

    Raises:
        ValueError: a root is no folder or holds the library, or no file was kept.
    """
    for root in roots:
        if not root.is_dir():
            raise ValueError(f"{root}: not a folder, so there is nothing to train on")
        if stdlib.resolve().is_relative_to(root.resolve()):
            raise ValueError(
                f"{root}: holds the standard library {stdlib}, which must not be trained on"
            )
    # Two folders may reach the same files through a link, so each real path counts once.
    paths = sorted({file.resolve() for root in roots for file in _text_files(root)})
    stripes = [paths[worker::num_workers] for worker in range(num_workers)]
    if num_workers == 1:
        read = [_read_files(paths, stdlib, limits)]
    else:
        with ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn")) as pool:
            read = list(
                pool.map(_read_files, stripes, [stdlib] * num_workers, [limits] * num_workers)
            )
    by_path = dict(
        zip((path for stripe in stripes for path in stripe), _chained(read), strict=True)
    )
    return _deduplicated([(path, *by_path[path]) for path in paths], roots)


def shared_with_corpus(texts: Iterable[str], evaluation_text: str, min_chars: int) -> float:
    """Return the share of the evaluation text's distinct telling lines that `texts` hold verbatim.

    It is never zero (`raise NotImplementedError` and its like are everywhere), so it is to be read
    beside the score, not as a proof of contamination.
    """
    held_out = telling_lines(evaluation_text, min_chars)
    unseen = set(held_out)
    for text in texts:
        unseen.difference_update(line.strip() for line in text.splitlines())
    return 1 - len(unseen) / max(1, len(held_out))


def _text_files(root: Path) -> Iterable[Path]:
    return (file for file in root.rglob("*") if file.suffix in SUFFIXES and file.is_file())


def _chained(parts: Iterable[list[tuple[str, str]]]) -> Iterable[tuple[str, str]]:
    return (item for part in parts for item in part)


def _read_files(paths: Sequence[Path], stdlib: Path, limits: CorpusLimits) -> list[tuple[str, str]]:
    """Return `(fate, text)` of each file; the text is empty unless the fate is `kept`."""
    library = stdlib_lines(stdlib, limits.min_line_chars)
    return [_read_file(path, library, limits) for path in paths]


def _read_file(path: Path, library: set[str], limits: CorpusLimits) -> tuple[str, str]:
    data = path.read_bytes()
    if len(data) < limits.min_bytes:
        return "too_small", ""
    if len(data) > limits.max_bytes:
        return "too_large", ""
    try:
        text = data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return "not_utf8", ""
    if len(text) > limits.max_mean_line * (text.count("\n") + 1):
        return "long_lines", ""
    lines = telling_lines(text, limits.min_line_chars)
    num_shared = len(lines & library)
    bound = max(limits.few_lines, limits.max_shared_share * len(lines))
    return (
        ("shares_stdlib", "")
        if num_shared > min(limits.max_shared_lines, bound)
        else ("kept", text)
    )


def _deduplicated(files: Sequence[tuple[Path, str, str]], roots: Sequence[Path]) -> Corpus:
    """Keep the first of equal texts and count the fates."""
    seen: set[bytes] = set()
    texts: list[str] = []
    counts: Counter[str] = Counter()
    dropped: list[str] = []
    for path, fate, text in files:
        digest = hashlib.sha256(text.encode()).digest()
        if fate == "kept" and digest in seen:
            fate = "duplicate"
        counts[fate] += 1
        if fate == "kept":
            seen.add(digest)
            texts.append(text)
        elif fate == "shares_stdlib":
            dropped.append("/".join(path.parts[-3:]))
    if not texts:
        raise ValueError(
            f"{', '.join(map(str, roots))}: no text file fit for training among {len(files)}"
        )
    return Corpus(texts=tuple(texts), counts=dict(counts), dropped_for_stdlib=tuple(dropped))
