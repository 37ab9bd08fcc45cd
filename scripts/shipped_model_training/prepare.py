# SPDX-License-Identifier: Apache-2.0
"""From folders of installed packages to a work folder with the tokenizer and the tokens.

The work folder then holds `tokenizer.json`, `tokenizer_config.json`, `tokens.npy` (uint16) and
`data.json` (the counts). It is written whole: `data.json` comes last, and `train` starts from it.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from qjax_checkpoints.shipped import HELD_OUT_MODULES, evaluation_text
from shipped_model_training import corpus, tokenizer


def prepare(
    work: Path,
    *,
    packages: Sequence[Path],
    stdlib: Path,
    vocab_size: int,
    max_positions: int,
    sample_bytes: int,
    num_workers: int,
    limits: corpus.CorpusLimits,
    known_tokenizer: Path | None = None,
) -> dict[str, Any]:
    """Write the work folder and return what `data.json` holds.

    Args:
        work: the folder to write; made if it is not there.
        packages: folders whose text files are trained on.
        stdlib: the standard library, which is kept out and of which nothing may be left in.
        vocab_size: entries of the tokenizer.
        max_positions: longest text of the model, for the tokenizer's files.
        sample_bytes: how much text the tokenizer learns from.
        num_workers: processes to use.
        limits: what a file must be like.
        known_tokenizer: a `tokenizer.json` to encode with; None: one is learned from the text.
    """
    start = time.monotonic()
    held_out = evaluation_text(stdlib)  # first, so that a library without sources is found at once
    kept = corpus.read_corpus(packages, stdlib, limits, num_workers)
    _say(start, f"{len(kept.texts)} documents, {kept.num_bytes / 1e6:.1f} MB; {kept.counts}")
    shared = corpus.shared_with_corpus(kept.texts, held_out, limits.min_line_chars)
    if known_tokenizer is None:
        bpe = tokenizer.train_tokenizer(kept.texts, vocab_size, sample_bytes)
        _say(start, f"tokenizer with {vocab_size} entries")
    else:
        bpe = tokenizer.read_tokenizer(known_tokenizer)
    tokens = tokenizer.encode_documents(bpe, kept.texts, num_workers)
    _say(start, f"{len(tokens) / 1e6:.2f} million tokens")
    data = {
        "documents": len(kept.texts),
        "bytes": kept.num_bytes,
        "tokens": len(tokens),
        "bytes_per_token": kept.num_bytes / len(tokens),
        "files_by_fate": kept.counts,
        "dropped_for_stdlib": list(kept.dropped_for_stdlib),
        "limits": asdict(limits),
        "held_out_modules": list(HELD_OUT_MODULES),
        "held_out_lines_in_corpus": shared,
        "python": sys.version.split()[0],
        "seconds": time.monotonic() - start,
    }
    work.mkdir(parents=True, exist_ok=True)
    tokenizer.save_tokenizer(bpe, work, max_positions)
    np.save(work / "tokens.npy", tokens)
    (work / "data.json").write_text(json.dumps(data, indent=2) + "\n")
    return data


def _say(start: float, message: str) -> None:
    print(f"[{time.monotonic() - start:6.1f} s] {message}", file=sys.stderr, flush=True)
