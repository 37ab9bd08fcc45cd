# SPDX-License-Identifier: Apache-2.0
"""Make a smaller model directory from a Hugging Face one, and report what it cost, layer by layer.

The result holds the model, its tokenizer, and qjax_report.json. Norms, embeddings and the output head
stay as they are unless a recipe names them. A recipe is a JSON file: [["path regex", "scheme" or null],
...]; the first rule that matches a layer's whole path decides. A rule names an embedding or a head if it
would not match a layer of another name in its place: ".*lm_head" does, ".*" does not.

Example:
  qjax quantize ./Llama-3.2-1B ./Llama-3.2-1B-w4 --scheme w4a16-g128
"""

import argparse
import json
import time
from pathlib import Path

import qjax
from qjax import nnx_layers
from qjax.report import QuantizationReport
from qjax.scheme import SUPPORTED
from qjax_checkpoints.atomic import check_writable
from qjax_checkpoints.load import load
from qjax_checkpoints.save import check_format, save
from qjax_cli.console import Console
from qjax_cli.text import read_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument("source", metavar="SRC", type=Path, help="model directory, not quantized")
    parser.add_argument("output", metavar="OUT", type=Path, help="new directory; must not exist")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--scheme", type=_scheme, help=f"for all layers: {SUPPORTED}")
    how.add_argument("--recipe", metavar="FILE", type=Path, help="JSON rules, see above")
    parser.add_argument("--method", choices=("rtn",), default="rtn", help="rtn: round to nearest")
    parser.add_argument(
        "--range",
        choices=("absmax", "percentile", "mse"),
        default="absmax",
        help="what a tile's scale reaches to: its largest weight, the 99.9th percentile, or what "
        "rounds with the least error (default absmax)",
    )
    parser.add_argument(
        "--format",
        choices=("compressed-tensors", "orbax"),
        default="compressed-tensors",
        help="of OUT: what vLLM and transformers load (default), or qjax's own, which holds "
        "every scheme",
    )


def run(args: argparse.Namespace, console: Console) -> None:
    """Loads, quantizes, writes, reports."""
    check_writable(args.output)
    recipe = _recipe(args)
    start = time.perf_counter()
    source = load(args.source)
    for line in source.notes:
        console.note(line)
    check_format(source.model, recipe, args.format)
    count = sum(
        1
        for path, _ in nnx_layers.quantizable_layers(source.model)
        if recipe.scheme_for(path) is not None
    )
    with console.progress("quantizing", count) as bar:
        model, report = qjax.quantize_model(
            source.model,
            recipe,
            search=qjax.RangeSearch(method=args.range),
            on_layer=lambda path: bar.advance(),
        )
    save(model, source, args.output, args.format, report.as_json())
    for line in report.warnings():
        console.note(line)
    values = {"output": str(args.output), **report.as_json()["totals"]}
    values["seconds"] = time.perf_counter() - start
    console.result(values, _summary(report, args.output, values["seconds"]))


def _summary(report: QuantizationReport, output: Path, seconds: float) -> str:
    before = sum(layer.bytes_before for layer in report.layers) / 2**20
    after = sum(layer.bytes_after for layer in report.layers) / 2**20
    worst = max(report.quantized, key=lambda layer: layer.relative_output_error or 0.0)
    return (
        f"{output}: {len(report.quantized)} of {len(report.layers)} layers quantized, "
        f"{before:.2f} -> {after:.2f} MiB; largest error {worst.relative_output_error:.4f} in "
        f"{worst.path}; {seconds:.1f} s"
    )


def _scheme(name: str) -> qjax.Scheme:
    try:
        return qjax.Scheme.parse(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _recipe(args: argparse.Namespace) -> qjax.Recipe:
    if args.scheme:
        return qjax.Recipe.uniform(args.scheme)
    try:
        rules = json.loads(read_text(args.recipe))
    except json.JSONDecodeError as error:
        raise ValueError(f"{args.recipe}: not a JSON recipe: {error}") from error
    return qjax.Recipe.from_json(rules, where=str(args.recipe))
