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
import numpy as np
from flax import nnx
from jaxtyping import Int

import qjax
from qjax_checkpoints import shipped
from qjax_checkpoints.atomic import new_directory
from qjax_checkpoints.load import load
from qjax_checkpoints.tokenizer import load_tokenizer
from qjax_cli import text
from qjax_cli.console import Console, table
from qjax_cli.demo import chart, page
from qjax_cli.demo.study import Row, Study

MEASURED = (
    ("w8a16-g128", "rtn"), ("w8a8", "rtn"), ("fp8-dynamic", "rtn"), ("mxfp8", "rtn"),
    ("nf4-g64", "rtn"), ("w4a16-g32", "rtn"), ("w4a16-g128", "rtn"), ("w4a16-g128", "gptq"),
    ("w4a16-g128", "awq"), ("w4a16-g128-asym", "rtn"), ("nvfp4", "rtn"), ("mxfp4", "rtn"),
    ("w3a16-g128", "rtn"), ("w3a16-g128", "gptq"), ("w2a16-g64", "rtn"), ("w2a16-g64", "gptq"),
)  # fmt: skip
COMPARED = ("w4a16-g128", "gptq")  # generates beside the model as it is

_WINDOWS, _CALIBRATION, _LENGTH, _NEW_TOKENS = 24, 32, 512, 48
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
        judged = _spread(np.arange(len(windows)), _WINDOWS)
        others = np.delete(np.arange(len(windows)), judged)
        study = Study(
            model=checkpoint.model,
            calibration=windows[_spread(others, _CALIBRATION)],
            windows=windows[judged],
        )
        console.note(
            f"measuring {1 + len(MEASURED)} models on {study.windows.size:,} tokens: three minutes on "
            "two cores"
        )
        prompts = [tokenizer.encode(prompt) for prompt in _PROMPTS]
        rows, spoken = [], []
        with console.progress("measuring", 1 + len(MEASURED)) as bar:
            for row, model in study.measured(MEASURED):
                rows.append(row)
                if row.method is None or (row.scheme, row.method) == COMPARED:
                    continued = study.continued(model, prompts, _NEW_TOKENS)
                    spoken.append([tokenizer.decode(ids) for ids in continued])
                bar.advance(f"{row.name} measured")
        values = _values(study, rows, spoken)
        values["seconds"] = time.perf_counter() - start
        _write(folder, values, rows)
    console.result(
        {**values, "out": str(output)},
        _table(rows),
        *_side_by_side(values),
        f"\n{output}/report.html, quality.png and demo.json; {values['seconds']:.0f} s",
    )


def _spread(indices: Int[np.ndarray, " all"], count: int) -> Int[np.ndarray, " n"]:
    """Some windows of the whole text, so that no module weighs more than another."""
    return indices[:: max(1, len(indices) // count)][:count]


def _values(study: Study, rows: list[Row], spoken: list[list[str]]) -> dict[str, Any]:
    embedding = study.model.model.embed_tokens.embedding[...]
    leaves = jax.tree.leaves(nnx.state(study.model))
    samples = [
        {"prompt": prompt, "plain": plain, "quantized": quantized}
        for prompt, plain, quantized in zip(_PROMPTS, *spoken, strict=True)
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
        "calibration_tokens": study.calibration.size,
        "rows": [dataclasses.asdict(row) | {"name": row.name} for row in rows],
        "compared": " ".join(COMPARED),
        "samples": samples,
    }


def _write(folder: Path, values: dict[str, Any], rows: list[Row]) -> None:
    title = (
        f"The shipped model, rounded to nearest or by the method named; {values['tokens']:,} tokens"
    )
    chart.draw(rows, title, folder / "quality.png")
    page.write(folder / "report.html", values, folder / "quality.png")
    (folder / "demo.json").write_text(json.dumps(values, indent=2), encoding="utf-8")


def _table(rows: list[Row]) -> str:
    cells = [
        [
            row.name,
            f"{row.bits_per_weight:.3f}",
            f"{row.mebibytes:.2f}",
            _perplexity(row.perplexity),
            f"{row.perplexity_change:+,.{2 if row.perplexity < 1000 else 0}f}" if i else "",
            f"{row.kl:.5f}" if i else "",
        ]
        for i, row in enumerate(rows)
    ]
    headings = ("scheme, method", "bits/weight", "MiB", "perplexity", "change %", "KL")
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
