# SPDX-License-Identifier: Apache-2.0
"""Measure this machine: products with quantized weights, against bfloat16, XLA and the limits.

Times are those of the kernels alone on a GPU (CUPTI), wall time elsewhere: the median of a few repeats,
and the least and most of them. Numbers are random; weights are rotated, so that none is found in a
cache. Activations that a scheme quantizes are quantized once for all those weights. The limits are
measured in the same run: reading memory, and a large bfloat16 product. Rows are printed as they are
measured.

through:
  xla             XLA, in the form that qjax.matmul chooses
  xla-subchannel  XLA with its sub-channel fusion, of dequantized weights: where a group or block has a
                  scale, on a GPU
  pallas          our kernel, where there is one

x bf16 and x xla: how many times as fast as bfloat16, and as the better of XLA's forms, in this run.
x peer: how many times as fast as the best kernel of vLLM 0.24 and PyTorch 2.11 on one NVIDIA H200
(2026-11-23, CUDA graph replays). On an H200 in microseconds; on another device each in units of its own
machine: from 256 tokens on of what bfloat16 takes for the same product, below of what reading the weights
takes.

Example:
  qjax bench matmul --scheme bfloat16 w4a16-g128 --tokens 1 16 --out measured.json
"""

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

import jax

import qjax
from qjax_cli.arguments import whole_number
from qjax_cli.bench import matmul, peers, table, timing
from qjax_cli.bench.ratios import ratios
from qjax_cli.console import Console

SCHEMES = (
    matmul.PLAIN, "w4a16-g128", "w8a16-g128", "w8a16-channel", "fp8-a16", "fp8-dynamic", "w8a8",
    "fp8-block", "w4a8", "w4afp8-g128",
)  # fmt: skip
TOKENS = (1, 16, 64, 256, 1024, 4096)
# (inputs, outputs): what an 8-billion Llama has, and a square.
SHAPES = ((4096, 6144), (4096, 28672), (14336, 4096), (8192, 8192))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument("what", choices=("matmul",), help="matmul: products with weights")
    parser.add_argument(
        "--scheme", type=_scheme, nargs="+", default=SCHEMES, metavar="SCHEME",
        help=f"also {matmul.PLAIN} (default: {' '.join(SCHEMES)})",
    )  # fmt: skip
    parser.add_argument(
        "--tokens", type=whole_number(1), nargs="+", default=TOKENS, metavar="M",
        help=f"rows of activations (default: {' '.join(map(str, TOKENS))})",
    )  # fmt: skip
    parser.add_argument(
        "--shape", type=whole_number(1), nargs=2, action="append", metavar=("K", "N"),
        help="inputs and outputs of a weight; may be given several times (default: "
        f"{', '.join(f'{k} {n}' for k, n in SHAPES)})",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=_file, metavar="FILE",
        help="the JSON also goes here, anew after every row: an interrupted run leaves the rows it had",
    )  # fmt: skip


def run(args: argparse.Namespace, console: Console) -> None:
    """Measures, and prints and keeps what is measured."""
    shapes = [tuple(shape) for shape in args.shape] if args.shape else SHAPES
    values = _header()
    device, read = values["device"], values["ceilings"]["read_tb_per_s"]
    others, lines = peers.load(), table.Table(args.scheme)
    console.text(f"{_summary(values)}\n{lines.headings()}\n")
    schemes = list(dict.fromkeys(args.scheme))
    steps = len(schemes) * len(args.tokens) * len(shapes)
    measured = []
    with console.progress("products", steps, beside_text=True) as bar:
        for row in matmul.rows(schemes, args.tokens, shapes, console.note, bar.advance):
            measured.append(row)
            values["rows"].append(matmul.as_json(row))
            if args.out:
                _replace(args.out, values)
            console.text(lines.row(row, ratios(row, measured, read, device, others)) + "\n")
    console.result(values, table.legend(device, read, others))


def _header() -> dict[str, Any]:
    """The JSON of a run that has no rows yet."""
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
        "ceilings": timing.ceilings(),
        "rows": [],
    }


def _summary(values: dict[str, Any]) -> str:
    read, tflops = values["ceilings"]["read_tb_per_s"], values["ceilings"]["bf16_tflops"]
    return (
        f"{values['device']}, jax {values['jax']}, {values['date']}: reads {read:.2f} TB/s, "
        f"{tflops:.0f} TFLOP/s in bfloat16"
    )


def _replace(path: Path, values: dict[str, Any]) -> None:
    """Writes a whole file in the place of the one before: at no time is there half a one."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(values) + "\n")
    new.replace(path)


def _scheme(name: str) -> str:
    if name == matmul.PLAIN:
        return name
    try:
        return qjax.Scheme.parse(name).name
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _file(name: str) -> Path:
    path = Path(name)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{name} must be a file in a folder that is there")
    return path
