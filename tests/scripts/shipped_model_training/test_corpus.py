# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest

from shipped_model_training.corpus import (
    CorpusLimits,
    read_corpus,
    shared_with_corpus,
    stdlib_lines,
    telling_lines,
)

LIMITS = CorpusLimits(min_bytes=64, max_bytes=50_000)


def source(name: str, num_lines: int) -> str:
    return "".join(f"{name}_{i} = compute_value_of({name}, {i})\n" for i in range(num_lines))


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A standard library of one module, and packages of which some are no good."""
    stdlib, packages = tmp_path / "lib", tmp_path / "packages"
    stdlib.mkdir()
    (packages / "vendored").mkdir(parents=True)
    library = source("argparse", 200)
    (stdlib / "argparse.py").write_text(library)
    texts = {
        "own.py": source("own", 100),
        "notes.md": "# Notes\n\n" + "Prose about what the package is good for.\n" * 5,
        "again.py": source("own", 100),
        "vendored/whole.py": library,
        "vendored/edited.py": library.replace("compute_value_of", "compute")
        + source("argparse", 40),
        "vendored/inside.py": source("other", 900) + source("argparse", 50),
        "few.py": source("few", 100) + source("argparse", 6),
        "tiny.py": "x = 1\n",
        "large.py": source("large", 5000),
        "table.py": "table = [" + "1, " * 2000 + "]\n",
        "windows.py": source("windows", 20).replace("\n", "\r\n"),
        "data.csv": source("data", 20),
    }
    for name, text in texts.items():
        (packages / name).write_bytes(text.encode())
    (packages / "latin.py").write_bytes("# grüß gott\n".encode("latin-1") * 20)
    return stdlib, packages


def test_every_file_has_its_fate(folders: tuple[Path, Path]) -> None:
    stdlib, packages = folders
    corpus = read_corpus([packages], stdlib, LIMITS, num_workers=1)
    assert corpus.counts == {
        "kept": 4,
        "duplicate": 1,
        "shares_stdlib": 3,
        "too_small": 1,
        "too_large": 1,
        "long_lines": 1,
        "not_utf8": 1,
    }
    names = {Path(path).name for path in corpus.dropped_for_stdlib}
    assert names == {"whole.py", "edited.py", "inside.py"}
    assert source("windows", 20) in corpus.texts  # line ends are \n
    assert corpus.num_bytes == sum(len(text.encode()) for text in corpus.texts)


def test_order_does_not_depend_on_workers(folders: tuple[Path, Path]) -> None:
    stdlib, packages = folders
    alone = read_corpus([packages], stdlib, LIMITS, num_workers=1)
    shared = read_corpus([packages, packages / "vendored"], stdlib, LIMITS, num_workers=2)
    assert alone == shared


def test_the_library_itself_is_refused(folders: tuple[Path, Path]) -> None:
    stdlib, packages = folders
    with pytest.raises(ValueError, match="holds the standard library"):
        read_corpus([stdlib.parent], stdlib, LIMITS, num_workers=1)
    with pytest.raises(ValueError, match="not a folder"):
        read_corpus([packages / "absent"], stdlib, LIMITS, num_workers=1)


def test_nothing_kept_is_an_error(folders: tuple[Path, Path], tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="no text file fit for training among 0"):
        read_corpus([empty], folders[0], LIMITS, num_workers=1)


def test_site_packages_inside_the_library_are_not_the_library(folders: tuple[Path, Path]) -> None:
    stdlib, _ = folders
    (stdlib / "site-packages").mkdir()
    (stdlib / "site-packages" / "own.py").write_text(source("own", 100))
    assert not telling_lines(source("own", 100), 24) & stdlib_lines(stdlib, 24)


def test_shared_with_corpus_counts_distinct_telling_lines() -> None:
    held_out = "a_long_line_of_code(1)\na_long_line_of_code(2)\na_long_line_of_code(1)\nshort\n"
    assert shared_with_corpus(["    a_long_line_of_code(2)\n"], held_out, 10) == 0.5
    assert shared_with_corpus(["nothing"], held_out, 10) == 0.0


@pytest.mark.parametrize(
    "wrong", [{"min_bytes": 10, "max_bytes": 10}, {"max_shared_share": 1.5}, {"min_bytes": -1}]
)
def test_limits_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        CorpusLimits(**wrong)  # pyright: ignore[reportArgumentType]
