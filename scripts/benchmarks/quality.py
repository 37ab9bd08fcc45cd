# SPDX-License-Identifier: Apache-2.0
"""What a model loses in each scheme by each method, and what that takes: the table of docs/quality.md.

    python scripts/benchmarks/quality.py --page docs/quality.md

Runs the commands as a user would, `qjax quantize` and `qjax eval`, each in a process of its own, on the
model that ships with qjax; with ``--peer`` llm-compressor on the same tokens too, which needs the extra
`interop`, and whose result `qjax eval` judges likewise. Rows are kept in a file as they are measured,
and what it has is not measured again; the page is written from it. Who ran something else meanwhile puts
null for a row's seconds there.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jinja2
import numpy as np

from qjax_checkpoints import shipped
from qjax_checkpoints.tokenizer import load_tokenizer
from qjax_cli import text

CALIBRATION, EVALUATION, LENGTH = 64, 24, 512  # windows, windows, tokens
# Schemes with the methods that they are measured with, and what llm-compressor calls the same.
ROWS = {
    "w4a16-g128": (
        "rtn",
        "gptq",
        "awq",
        "awq+gptq",
        "rotation+gptq",
        "awq+gptq+learned",
        "gptq+learned",
        "best",
    ),
    "w4a16-g128-asym": ("rtn", "gptq", "awq", "awq+gptq", "best"),
    "w3a16-g128": ("rtn", "gptq", "awq+gptq+learned", "gptq+learned", "best"),
    "w2a16-g64": ("rtn", "gptq", "awq+gptq+learned", "best"),
    "w8a8": ("rtn", "smoothquant", "llm-int8", "best"),
    "w8a8-static": ("rtn", "smoothquant", "best"),
    "w4a8": ("rtn", "gptq", "best"),
    "w4a4": ("rtn", "rotation", "rotation+gptq", "smoothquant+gptq+learned", "best"),
    "fp8-dynamic": ("rtn",),
    "fp8-static": ("rtn",),
    "nvfp4": ("rtn", "gptq", "best"),
    "mxfp4": ("rtn", "gptq", "best"),
}
PEER_ROWS = {
    "w4a16-g128": ("gptq", "awq"),
    "w4a16-g128-asym": ("gptq", "awq"),
    "w3a16-g128": ("gptq",),
    "w8a8": ("smoothquant",),
}
# The same of the model that outlier_channels.py writes.
OUTLIER_ROWS = {
    "w8a8": ("rtn", "smoothquant", "llm-int8", "best"),
    "w4a16-g128": ("rtn", "gptq", "awq", "awq+gptq+learned", "gptq+learned", "best"),
}
OUTLIER_PEER_ROWS = {"w8a8": ("smoothquant",), "w4a16-g128": ("gptq", "awq")}
MODELS = {"shipped": (ROWS, PEER_ROWS), "outliers": (OUTLIER_ROWS, OUTLIER_PEER_ROWS)}
_PEER = Path(__file__).with_name("llm_compressor.py")
_OUTLIERS = Path(__file__).with_name("outlier_channels.py")
_PAGE = """\
{% macro of_schemes(tables) %}
{% for scheme, lines in tables.items() %}
| {{ scheme }} | perplexity | change | KL | seconds | MB |
|---|---|---|---|---|---|
{% for line in lines %}
{{ line }}
{% endfor %}

{% endfor %}
{% endmacro %}
# Quality

What the model that ships with qjax loses. {{ calibration }} tokens of the Python standard library are
calibrated on; perplexity is that of {{ evaluation }} others, of modules that neither training nor
calibration saw, {{ unquantized }} unquantized. KL is the mean divergence of the output from the
unquantized model's, in nats a token. Seconds are those of the whole command, start and compilation
included, where it ran alone; MB those of the quantized layers. {{ machine }}.

Made by `scripts/benchmarks/quality.py --peer`, which runs the commands as a user would.

{{ of_schemes(tables["shipped"]) }}
{%- if tables["outliers"] %}
## With outliers

The same model, six channels of each norm 48 times as large and the weights behind them as much smaller
(`scripts/benchmarks/outlier_channels.py`): activations of large models have such channels.

{{ of_schemes(tables["outliers"]) }}
{%- endif %}
"""


def main() -> None:
    """Measures what is not yet in the file of rows, and writes the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=Path, default=Path("quality.jsonl"))
    parser.add_argument("--page", type=Path, default=Path("docs/quality.md"))
    parser.add_argument("--scheme", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--peer", action="store_true", help="llm-compressor, too")
    args = parser.parse_args()
    keys = _keys(
        f"llm-compressor {importlib.metadata.version('llmcompressor')}" if args.peer else None
    )
    rows = {}
    if args.rows.exists():
        rows = {_key(row): row for row in map(json.loads, args.rows.read_text().splitlines())}
    with tempfile.TemporaryDirectory() as folder:
        study = Study.begin(Path(folder))
        for key in keys:
            if key not in rows and key[2] in args.scheme:
                rows[key] = study.row(*key)
                print(json.dumps(rows[key]), flush=True)
                with args.rows.open("a") as file:
                    file.write(json.dumps(rows[key]) + "\n")
        args.page.write_text(page([rows[key] for key in keys if key in rows], study.unquantized))


def _keys(peer: str | None) -> list[tuple[str, str, str, str]]:
    """Model, maker, scheme and method of every row, in the order of the page."""
    return [
        (model, by, scheme, method)
        for model, (ours, theirs) in MODELS.items()
        for scheme in ours
        for by, methods in (("qjax", ours), (peer, theirs))
        if by
        for method in methods.get(scheme, ())
    ]


def _key(row: dict[str, Any]) -> tuple[str, str, str, str]:
    return row["model"], row["by"], row["scheme"], row["method"]


@dataclass(frozen=True)
class Study:
    """The models, the tokens that they are measured on, and what they give as they are.

    Attributes:
      sources: their directories.
      folder: where all that is written goes.
      unquantized: the perplexity of both, which compute the same.
    """

    sources: dict[str, Path]
    folder: Path
    unquantized: float

    @staticmethod
    def begin(folder: Path) -> "Study":
        """The model that ships with qjax, twice; tokens of other modules to calibrate and to judge."""
        source = shipped.model_path()
        vocab_size = json.loads((source / "config.json").read_text())["vocab_size"]
        tokenizer = load_tokenizer(source, vocab_size=vocab_size)
        windows = text.windows(shipped.evaluation_text(), tokenizer, LENGTH)
        np.save(folder / "calibration.npy", windows[:CALIBRATION])
        np.save(folder / "evaluation.npy", windows[-EVALUATION:])
        _run([sys.executable, _OUTLIERS, folder / "outliers"])
        study = Study({"shipped": source, "outliers": folder / "outliers"}, folder, 0.0)
        return replace(study, unquantized=study._judged(source)["perplexity"])

    def row(self, model: str, by: str, scheme: str, method: str) -> dict[str, Any]:
        """One row of the table: a model quantized, judged and thrown away."""
        source, out, calibration = (
            self.sources[model],
            self.folder / "out",
            self.folder / "calibration.npy",
        )
        start = time.perf_counter()
        if by == "qjax":
            looks = method not in ("rtn", "rotation") or "-static" in scheme
            options = ["--calib", calibration] if looks else []
            whole = method == "llm-int8" or (scheme == "w4a4" and method != "rtn")
            options += ["--format", "orbax"] if whole else []
            _qjax("quantize", source, out, "--scheme", scheme, "--method", method, *options)
        else:
            command = [sys.executable, _PEER, source, scheme, method, calibration, out]
            _run(command, self.folder)
        seconds = time.perf_counter() - start
        judged = self._judged(out, "--baseline", source)
        layers = _qjax("inspect", out)["layers"]
        shutil.rmtree(out)
        return {
            "model": model, "by": by, "scheme": scheme, "method": method, "seconds": round(seconds, 1),
            "perplexity": judged["perplexity"], "kl": judged["kl"],
            "bytes": sum(layer["bytes"] for layer in layers if layer["scheme"]),
            "change": 100 * (judged["perplexity"] / self.unquantized - 1),
            "date": str(datetime.date.today()),
        }  # fmt: skip

    def _judged(self, model: Path, *options: object) -> dict[str, Any]:
        tokens = self.folder / "evaluation.npy"
        return _qjax("eval", model, "--tokens", tokens, "--dtype", "float32", *options)


def _qjax(*words: object) -> dict[str, Any]:
    """The JSON that a command gives."""
    return json.loads(_run([sys.executable, "-m", "qjax_cli.main", *words, "--json"]))


def _run(command: Sequence[object], folder: Path | None = None) -> str:
    done = subprocess.run(
        list(map(str, command)), cwd=folder, text=True, capture_output=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{command} failed: {done.stderr[-2000:]}")
    return done.stdout


def page(rows: Sequence[dict[str, Any]], unquantized: float) -> str:
    """The page of all rows, a table for each scheme."""
    tables: dict[str, dict[str, list[str]]] = {name: {} for name in MODELS}
    for row in rows:
        tables[row["model"]].setdefault(row["scheme"], []).append(_line(row))
    dates = sorted({row["date"] for row in rows})
    measured = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    template = jinja2.Template(_PAGE, trim_blocks=True, keep_trailing_newline=True)
    return template.render(
        tables=tables,
        unquantized=f"{unquantized:.3f}",
        calibration=f"[{CALIBRATION}, {LENGTH}]",
        evaluation=f"[{EVALUATION}, {LENGTH}]",
        machine=f"{os.cpu_count()} CPU cores, jax {jax.__version__}, {measured}",
    )


def _line(row: dict[str, Any]) -> str:
    method = row["method"] if row["by"] == "qjax" else f"{row['method']}, {row['by']}"
    works = row["perplexity"] < 1000
    cells = (
        method, f"{row['perplexity']:,.{3 if works else 0}f}",
        f"{row['change']:+.2f} %" if works else "unusable", f"{row['kl']:.4f}",
        "" if row["seconds"] is None else f"{row['seconds']:.0f}", f"{row['bytes'] / 1e6:.2f}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
