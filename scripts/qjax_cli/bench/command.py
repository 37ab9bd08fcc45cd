# SPDX-License-Identifier: Apache-2.0
"""Measure this machine: products with quantized weights, against bfloat16 and against the limits.

Times are those of the kernels alone on a GPU (CUPTI) and wall time elsewhere; weights are rotated, so
that none is found in a cache; numbers are random. The limits are measured in the same run: reading
memory, and a large bfloat16 product.

Example:
  qjax bench matmul --scheme w4a16-g128 --tokens 1 16
"""

import argparse
import datetime

import jax

import qjax
from qjax_cli.arguments import whole_number
from qjax_cli.bench import matmul, timing
from qjax_cli.console import Console, table

SCHEMES = (
    matmul.PLAIN, "w4a16-g128", "w4a16-channel", "w8a16-channel", "w8a8", "fp8-dynamic", "fp8-block",
    "w4a8",
)  # fmt: skip
TOKENS = (1, 16, 64, 256, 1024)
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
        help="inputs and outputs of a weight; may be given several times",
    )  # fmt: skip


def run(args: argparse.Namespace, console: Console) -> None:
    """Measures and prints."""
    shapes = [tuple(shape) for shape in args.shape] if args.shape else SHAPES
    device = jax.devices()[0].device_kind
    measured = []
    with console.progress("ceilings", len(args.scheme) * len(args.tokens) * len(shapes)) as bar:
        ceilings = {"read_tb_per_s": timing.read_tb_per_s(), "bf16_tflops": timing.bf16_tflops()}
        for row in matmul.rows(args.scheme, args.tokens, shapes):
            measured.append(row)
            what = f"{row.scheme} {row.m} x {row.k} x {row.n}"
            if row.implementation == "xla":
                bar.advance(what)
    values = {
        "device": device,
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
        "ceilings": ceilings,
        "rows": [matmul.as_json(row) for row in measured],
    }
    plain = {
        (row.m, row.k, row.n): row.us for row in measured if row.scheme == matmul.PLAIN
    }  # fmt: skip
    headings = ("scheme", "through", "m", "k", "n", "us", "TB/s", "TFLOP/s", "of reading", "x bf16")
    lines = [_cells(row, ceilings["read_tb_per_s"], plain) for row in measured]
    summary = (
        f"{device}, jax {jax.__version__}, {values['date']}: reads {ceilings['read_tb_per_s']:.2f} TB/s, "
        f"{ceilings['bf16_tflops']:.0f} TFLOP/s in bfloat16"
    )
    console.result(values, table(headings, lines, left=2), summary)


def _cells(row: matmul.Row, read: float, plain: dict[tuple[int, int, int], float]) -> list[str]:
    bf16 = plain.get((row.m, row.k, row.n))
    return [
        row.scheme, row.implementation, str(row.m), str(row.k), str(row.n), f"{row.us:.1f}",
        f"{row.tb_per_s:.2f}", f"{row.tflops:.1f}", f"{row.tb_per_s / read:.0%}",
        f"{bf16 / row.us:.2f}" if bf16 else "",
    ]  # fmt: skip


def _scheme(name: str) -> str:
    if name == matmul.PLAIN:
        return name
    try:
        return qjax.Scheme.parse(name).name
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
