# SPDX-License-Identifier: Apache-2.0
"""Make a smaller model directory from a Hugging Face one, and report what it cost, layer by layer.

The result holds the model, its tokenizer, and qjax_report.json. Norms, embeddings and the output head
stay as they are unless a recipe names them. A recipe is a JSON file: [["path regex", "scheme" or null],
...]; the first rule that matches a layer's whole path decides. A rule names an embedding or a head if it
would not match a layer of another name in its place: ".*lm_head" does, ".*" does not.

Methods but rtn look at what the layers multiply on some text that the model is to be good at: --calib
takes text files, or token windows as a .npy file. They go through the model block by block, each
calibrated on what the quantized ones before it make of the text.

Example:
  qjax quantize ./Llama-3.2-1B ./Llama-3.2-1B-w4 --scheme w4a16-g128 --method gptq --calib book.txt
"""

import argparse
import json
import time
from pathlib import Path

import qjax
from qjax import method, nnx_layers
from qjax.report import QuantizationReport
from qjax.scheme import SUPPORTED
from qjax_checkpoints.atomic import check_writable
from qjax_checkpoints.checkpoint import Checkpoint
from qjax_checkpoints.load import load
from qjax_checkpoints.save import check_format, save
from qjax_cli import text
from qjax_cli.arguments import whole_number
from qjax_cli.console import Console
from qjax_cli.text import read_text
from qjax_models import Decoder, blockwise


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument("source", metavar="SRC", type=Path, help="model directory, not quantized")
    parser.add_argument("output", metavar="OUT", type=Path, help="new directory; must not exist")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--scheme", type=_scheme, help=f"for all layers: {SUPPORTED}")
    how.add_argument("--recipe", metavar="FILE", type=Path, help="JSON rules, see above")
    parser.add_argument(
        "--method",
        choices=method.names(),
        default="rtn",
        help="rtn: round to nearest (default); gptq: later weights make up for errors; awq, "
        "smoothquant: important or outlying channels are rescaled first; learned: the layers of a "
        "block are trained together for what comes out of it; best: the chain that measured best",
    )
    parser.add_argument(
        "--range",
        choices=("absmax", "percentile", "mse", "output"),
        help="what a tile's scale reaches to: its largest weight, the 99.9th percentile, or what "
        "costs the weights or the layer's output least (default absmax; awq: output; learned: mse)",
    )
    parser.add_argument(
        "--calib",
        metavar="FILE",
        type=Path,
        nargs="+",
        help="text files, or one int32 [n, length] .npy",
    )
    parser.add_argument(
        "--samples", type=whole_number(1), default=128, help="calibration windows, at most (128)"
    )
    parser.add_argument(
        "--seq-len", type=whole_number(2), default=1024, help="tokens of a window, at most (1024)"
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
    how = _method(args, recipe)
    start = time.perf_counter()
    source = load(args.source)
    for line in source.notes:
        console.note(line)
    check_format(source.model, recipe, args.format)
    if how.calibrated:
        model, report = _calibrated(args, source, recipe, how, console)
    else:
        model, report = _rounded(source, recipe, how, console)
    save(model, source, args.output, args.format, report.as_json())
    for line in report.warnings():
        console.note(line)
    values = {"output": str(args.output), **report.as_json()["totals"]}
    values["seconds"] = time.perf_counter() - start
    console.result(values, _summary(report, args.output, values["seconds"]))


def _rounded(
    source: Checkpoint, recipe: qjax.Recipe, how: qjax.Method, console: Console
) -> tuple[Decoder, QuantizationReport]:
    count = sum(
        1
        for path, _ in nnx_layers.quantizable_layers(source.model)
        if recipe.scheme_for(path) is not None
    )
    with console.progress("quantizing", count) as bar:
        return qjax.quantize_model(
            source.model, recipe, method=how, on_layer=lambda path: bar.advance()
        )


def _calibrated(
    args: argparse.Namespace,
    source: Checkpoint,
    recipe: qjax.Recipe,
    how: qjax.Method,
    console: Console,
) -> tuple[Decoder, QuantizationReport]:
    config = source.model.config
    tokens = text.calibration_windows(
        args.calib, args.source, config.vocab_size, samples=args.samples, length=args.seq_len
    )
    if tokens.shape[1] > config.max_positions:
        raise ValueError(
            f"windows of {tokens.shape[1]} tokens go beyond the {config.max_positions} that the model "
            f"was made for; --seq-len {config.max_positions} would do"
        )
    what = f"calibrating on {len(tokens)} windows of {tokens.shape[1]} tokens"
    with console.progress(what, 2 * config.num_layers) as bar:
        return qjax.quantize_sequentially(
            source.model, blockwise, tokens, recipe, method=how, on_step=lambda what: bar.advance()
        )


def _method(args: argparse.Namespace, recipe: qjax.Recipe) -> qjax.Method:
    """The method that the arguments name.

    Raises:
      ValueError: it needs calibration and has no data, or has some that it does not look at.
    """
    search = qjax.RangeSearch(method=args.range) if args.range else None
    how = qjax.Method.parse(args.method, search, recipe)
    if how.calibrated and not args.calib:
        raise ValueError(
            f"--method {how.name}{' with --range output' if how.name == 'rtn' else ''} looks at what "
            "the layers multiply: give text or tokens, --calib FILE"
        )
    if args.calib and not how.calibrated:
        raise ValueError(
            f"--method {how.name} looks at no data: leave out --calib, or take "
            f"{', '.join(name for name in method.names() if name != how.name)}"
        )
    return how


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
