# SPDX-License-Identifier: Apache-2.0
"""What quantization-aware training gains over the best post-training result: the table of docs/qat.md.

    python scripts/train_shipped_model.py prepare --work /tmp/work --tokenizer shipped/tokenizer.json
    python scripts/benchmarks/qat_quality.py --tokens /tmp/work/tokens.npy --work /tmp/qat --steps 1600
    python scripts/benchmarks/qat_quality.py --tokens /tmp/work/tokens.npy --work /tmp/0 -- --dampening 0

For each scheme `qjax qat` trains the shipped model with itself as the teacher, from `qjax quantize
--method best`, and `qjax eval` measures both results and the model itself on the standard library, in
float32. ``left`` is the share of the best result's loss of perplexity that training leaves. Steps of 64
windows of 1024 tokens: 1600 of them are 4.9 % of the tokens that the model was trained on. A run that was
cut off goes on. Prints one JSON object a line, as it is measured.
"""

import argparse
import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from qjax_checkpoints.shipped import evaluation_text, model_path

BATCH, LENGTH = 64, 1024
# What is trained, and the highest rate of weights.
SCHEMES = {"w4a16-g128": 4e-3, "w3a16-g128": 6e-3, "w2a16-g64": 1.6e-2, "w4a8": 4e-3}


def main() -> None:
    """Trains and measures what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tokens", type=Path, required=True, help="one row of token ids, .npy")
    parser.add_argument("--work", type=Path, required=True, help="folder for runs and results")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--characters", type=int, help="evaluate on so many alone")
    parser.add_argument(
        "options", nargs="*", help="behind --: further options of qjax qat, such as --dampening 0"
    )
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    text, windows = args.work / "evaluation.txt", args.work / "windows.npy"
    text.write_text(evaluation_text()[: args.characters])
    ids = np.load(args.tokens)
    count = len(ids) // args.length
    np.save(windows, ids[: count * args.length].reshape(count, args.length))
    unquantized = perplexity(model_path(), text)
    first = {"device": f"{device()}, {datetime.date.today()}", "unquantized": unquantized}
    print(json.dumps(first), flush=True)
    for scheme in args.schemes:
        print(json.dumps(row(scheme, unquantized, text, windows, args)), flush=True)


def row(
    scheme: str, unquantized: float, text: Path, windows: Path, args: argparse.Namespace
) -> dict[str, Any]:
    """One scheme, trained and measured."""
    out = args.work / scheme
    if not out.exists():
        qjax(
            "qat", model_path(), out, "--scheme", scheme, "--text", windows, "--seq-len", args.length,
            "--steps", args.steps, "--batch", args.batch, "--teacher", model_path(),
            "--rate", SCHEMES[scheme], "--format", "orbax", "--resume", *args.options,
        )  # fmt: skip
    training = json.loads((out / "qjax_report.json").read_text())["training"]
    best, trained = (perplexity(p, text) for p in (Path(f"{out}.training") / "start", out))
    shipped = json.loads((model_path() / "training_summary.json").read_text())["tokens"]
    return {
        "scheme": scheme, "best": best, "trained": trained,
        "left": (trained - unquantized) / (best - unquantized), "steps": training["steps"],
        "share_of_pretraining": training["tokens"] / shipped, "seconds": training["seconds"],
    }  # fmt: skip


def device() -> str:
    """What computes; asked in a process of its own, for JAX would keep most of its memory."""
    asked = "import jax; print(f'{jax.devices()[0].device_kind}, jax {jax.__version__}')"
    return subprocess.check_output([sys.executable, "-c", asked], text=True).strip()


def perplexity(model: Path, text: Path) -> float:
    """Of a directory, as `qjax eval` measures it."""
    return qjax("eval", model, "--text", text)["perplexity"]


def qjax(*arguments: Any) -> dict[str, Any]:
    """What a command prints, in a process of its own, so that it gives the device's memory back."""
    command = [sys.executable, "-m", "qjax_cli.main", *map(str, arguments), "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


if __name__ == "__main__":
    main()
