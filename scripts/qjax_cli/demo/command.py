# SPDX-License-Identifier: Apache-2.0
"""The main job on the model that ships with qjax: quantize it in many schemes, measure, draw, generate.

Needs no arguments and no network. Writes demo.json, report.html and quality.png.

Example:
  qjax demo --out ./qjax-demo
"""

import argparse
import dataclasses
import datetime
import itertools
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import jax
from flax import nnx

import qjax
from qjax_checkpoints import shipped
from qjax_checkpoints.atomic import new_directory
from qjax_checkpoints.load import load
from qjax_checkpoints.tokenizer import load_tokenizer
from qjax_cli import text
from qjax_cli.console import Console, table
from qjax_cli.demo import chart, page
from qjax_cli.demo.study import Row, Study

SCHEMES = (
    "w8a16-g128", "w8a8", "fp8-dynamic", "mxfp8", "nf4-g64", "w4a16-g32", "w4a16-g128",
    "w4a16-g128-asym", "nvfp4", "mxfp4", "w3a16-g128", "w2a16-g64",
)  # fmt: skip
COMPARED = "w4a16-g128"  # generates beside the model as it is

_WINDOWS, _LENGTH, _NEW_TOKENS = 24, 512, 48
_PROMPTS = (
    "def read_json(path):",
    "# Compute the mean of a list of numbers.\ndef mean(",
    'class Point:\n    """A point in the plane."""\n\n    def __init__(self, x, y',
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="new directory (default: ./qjax-demo, or qjax-demo-2 and so on when that exists)",
    )


def run(args: argparse.Namespace, console: Console) -> None:
    """Measures every scheme and writes the report."""
    start = time.perf_counter()
    output = args.out or _free_directory(Path("qjax-demo"))
    with new_directory(output) as folder:
        checkpoint = load(shipped.model_path())
        tokenizer = load_tokenizer(
            shipped.model_path(), vocab_size=checkpoint.model.config.vocab_size
        )
        windows = text.windows(shipped.evaluation_text(), tokenizer, _LENGTH)
        # Spread over the whole text, so that no module weighs more than another.
        windows = windows[:: max(1, len(windows) // _WINDOWS)][:_WINDOWS]
        study = Study(
            model=checkpoint.model,
            windows=windows,
            prompts=[tokenizer.encode(prompt) for prompt in _PROMPTS],
            new_tokens=_NEW_TOKENS,
        )
        console.note(
            f"measuring {1 + len(SCHEMES)} models on {windows.size:,} tokens: two minutes on two cores"
        )
        rows, spoken = [], {}
        with console.progress("measuring", 1 + len(SCHEMES)) as bar:
            for row, continuations in study.rows(SCHEMES):
                rows.append(row)
                spoken[row.scheme] = [tokenizer.decode(ids) for ids in continuations]
                bar.advance(f"{row.scheme} measured")
        values = _values(study, rows, spoken)
        values["seconds"] = time.perf_counter() - start
        _write(folder, values, rows)
    console.result(
        {**values, "out": str(output)},
        _table(rows),
        *_side_by_side(values),
        f"\n{output}/report.html, quality.png and demo.json; {values['seconds']:.0f} s",
    )


def _values(study: Study, rows: list[Row], spoken: dict[str, list[str]]) -> dict[str, Any]:
    embedding = study.model.model.embed_tokens.embedding[...]
    leaves = jax.tree.leaves(nnx.state(study.model))
    samples = [
        {"prompt": prompt, "plain": plain, "quantized": quantized}
        for prompt, plain, quantized in zip(
            _PROMPTS, spoken[rows[0].scheme], spoken[COMPARED], strict=True
        )
    ]
    return {
        "device": _device(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "version": qjax.__version__,
        "parameters": sum(leaf.size for leaf in leaves),
        "embedding_mebibytes": embedding.nbytes / 2**20,
        "tokens": study.windows.shape[0] * (study.windows.shape[1] - 1),
        "rows": [dataclasses.asdict(row) for row in rows],
        "compared": COMPARED,
        "samples": samples,
    }


def _write(folder: Path, values: dict[str, Any], rows: list[Row]) -> None:
    title = f"The shipped model, rounded to nearest; {values['tokens']:,} tokens"
    chart.draw(rows, title, folder / "quality.png")
    page.write(folder / "report.html", values, folder / "quality.png")
    (folder / "demo.json").write_text(json.dumps(values, indent=2), encoding="utf-8")


def _table(rows: list[Row]) -> str:
    cells = [
        [
            row.scheme,
            f"{row.bits_per_weight:.3f}",
            f"{row.mebibytes:.2f}",
            _perplexity(row.perplexity),
            f"{row.perplexity_change:+,.{2 if row.perplexity < 1000 else 0}f}" if i else "",
            f"{row.kl:.5f}" if i else "",
            f"{row.decode_tokens_per_second:.0f}",
        ]
        for i, row in enumerate(rows)
    ]
    headings = ("scheme", "bits/weight", "MiB", "perplexity", "change %", "KL", "tokens/s")
    return table(headings, cells)


def _perplexity(value: float) -> str:
    """Three decimals of a working model's, none of a broken one's."""
    return f"{value:.3f}" if value < 1000 else f"{value:,.0f}"


def _device() -> str:
    device = jax.devices()[0]
    return f"{os.cpu_count()} CPU cores" if device.platform == "cpu" else device.device_kind


def _side_by_side(values: dict[str, Any]) -> list[str]:
    lines = []
    for sample in values["samples"]:
        for name, key in (
            (values["rows"][0]["scheme"], "plain"),
            (values["compared"], "quantized"),
        ):
            lines.append(f"\n--- {name}\n{sample['prompt']}{sample[key]}")
    return lines


def _free_directory(first: Path) -> Path:
    numbered = (first.with_name(f"{first.name}-{i}") for i in itertools.count(2))
    return next(path for path in itertools.chain([first], numbered) if not path.exists())
