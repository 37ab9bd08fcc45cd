# SPDX-License-Identifier: Apache-2.0
r"""Make a smaller model directory from a Hugging Face one, and report what it cost, layer by layer.

The result holds the model, its tokenizer, and qjax_report.json. Norms, embeddings and the output head
stay as they are unless a recipe names them. A recipe is a JSON file: [["path regex", "scheme" or null],
...]; the first rule that matches a layer's whole path decides. A rule names an embedding or a head if it
would not match a layer of another name in its place: ".*lm_head" does, ".*" does not.

A budget leaves the choice to the model: --bits 4.5, the mean over all layers that --scheme would reach,
scales included, or --size 4GB, all weights of OUT. Each layer alone is held in each of the candidates,
and how far the output moves from the model's own on the text (KL) is measured; then those are chosen that
fit and add up to least. Queries, keys and values go together, gate and up too. It is measured with the
method's rounding, but for what is done to blocks as wholes, and with the whole model in memory. The
choice and the losses that it was made by are told, and stand in the report.

A method is one algorithm or a chain of them, such as gptq or rotation+awq+gptq: rotation first, then one
of awq, smoothquant and outlier-suppression, then gptq, then learned; each may be left out, and rtn stands
for none. llm-int8 stands by itself.

Methods but rtn and rotation look at what the layers multiply on some text that the model is to be good
at: --calib takes text files, or token windows as a .npy file. So do schemes with -static, whatever the
method: the largest input of a layer on that text gets the highest code. They go through the model block
by block, each calibrated on what the quantized ones before it make of the text.

From a Hugging Face directory to compressed-tensors a model need not fit into memory: one block is there
at a time, and the activations of the calibration windows, which --spill keeps in a file. Until OUT is
whole it lies in .OUT.partial beside it. A run that was killed leaves its finished blocks there, and the
same command with --resume goes on: OUT is the same then, byte by byte, but for the seconds in the report.

Example:
  qjax quantize ./Llama-3.2-1B ./Llama-3.2-1B-w4 --scheme w4a16-g128 --method gptq --calib book.txt
  qjax quantize ./Llama-3.2-1B ./Llama-3.2-1B-4.5 --bits 4.5 --method gptq --calib book.txt
  qjax quantize ./Llama-3.1-70B ./Llama-3.1-70B-w4 --scheme w4a16-g128 --method gptq --calib book.txt \
      --spill /scratch --resume
"""

import argparse
import functools
import json
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np
from jaxtyping import Int

import qjax
from qjax import kv_cache, method
from qjax.budget import CANDIDATES
from qjax.observation import ExpertTokens
from qjax.report import QuantizationReport
from qjax.scheme import SUPPORTED
from qjax.storage import Storage
from qjax_checkpoints import streaming
from qjax_checkpoints.atomic import check_writable
from qjax_checkpoints.directory import ModelDirectory
from qjax_checkpoints.load import load, open_plain
from qjax_checkpoints.parameters import abstract_plain
from qjax_checkpoints.save import check_format, save
from qjax_checkpoints.unfinished import partial_path
from qjax_cli import budget, text
from qjax_cli.arguments import scheme, whole_number
from qjax_cli.console import Console
from qjax_cli.text import read_text
from qjax_models import Decoder, DecoderConfig, blockwise, rotatable, why_not_rotatable

# How layers are going to be held: the rules, or the words of a budget that will choose them.
Plan = qjax.Recipe | str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument("source", metavar="SRC", type=Path, help="model directory, not quantized")
    parser.add_argument("output", metavar="OUT", type=Path, help="new directory; must not exist")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--scheme", type=scheme, help=f"for all layers: {SUPPORTED}")
    how.add_argument("--recipe", metavar="FILE", type=Path, help="JSON rules, see above")
    budget.add_arguments(how)
    parser.add_argument(
        "--candidates",
        metavar="SCHEME",
        type=scheme,
        nargs="+",
        help=f"what a budget chooses among, beside leaving a layer as it is ({' '.join(CANDIDATES)})",
    )
    parser.add_argument(
        "--method",
        choices=method.names(),
        metavar="METHOD",
        default="rtn",
        help="rtn: round to nearest (default); gptq: later weights make up for errors; awq, "
        "smoothquant, outlier-suppression: all channels or outliers are rescaled first; rotation: before "
        "that, channels are mixed until none is an outlier; learned: the layers of a "
        "block are trained together for what comes out of it; llm-int8: inputs with outliers stay in 16 "
        "bits (w8a8, --format orbax); best: the chain that measured best, for w4a4 with a rotation where "
        "the format holds it (--format orbax) and the model lets it through",
    )
    parser.add_argument(
        "--range",
        choices=("absmax", "percentile", "mse", "output"),
        help="what a tile's scale reaches to: its largest weight, the 99.9th percentile, or what "
        "costs the weights or the layer's output least (default absmax; gptq, awq: output; learned: mse)",
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
        "--experts",
        choices=get_args(ExpertTokens),
        default="routed",
        help="calibrate each expert of a mixture with the tokens that are routed to it (default; what "
        "is missing to sixteen for each of its inputs comes from the average of all), or with all",
    )
    parser.add_argument(
        "--true-sequential",
        action="store_true",
        help="within a block, too, calibrate each layer with those before it quantized: faster, for the "
        "text passes once through each block and not twice (unless the method rescales or learns), with "
        "up to six times as many activations kept; better below 3 bits",
    )
    parser.add_argument(
        "--kv-cache",
        choices=tuple(kv_cache.SCHEMES),
        help="keep keys and values in 8 or 4 bits, too: by a scale for all keys of a layer and one for "
        "all values, from calibration (static), or by scales of each head of each token, which need none "
        "and no word in OUT: eval and generate take them as well (default: as they are)",
    )
    parser.add_argument(
        "--format",
        choices=("compressed-tensors", "orbax"),
        default="compressed-tensors",
        help="of OUT: what vLLM and transformers load (default), or qjax's own, which holds "
        "every scheme",
    )
    parser.add_argument(
        "--spill",
        metavar="DIR",
        type=Path,
        help="keep the activations between two blocks in a file on the disk of DIR, not in memory "
        "(methods that learn take those of one block into memory all the same)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the blocks that a killed run of the same command has finished; begin if "
        "there are none",
    )


def run(args: argparse.Namespace, console: Console) -> None:
    """Loads, quantizes, writes, reports."""
    if not args.resume:
        check_writable(args.output)
    plan = budget.words(args) or _recipe(args)
    how = _method(args, plan)
    start = time.perf_counter()
    source = open_plain(args.source) if args.format == "compressed-tensors" else None
    if source is not None:
        report = _streamed(args, source, plan, how, console)
    elif args.resume:
        raise ValueError(
            f"--resume goes from plain Hugging Face weights to --format compressed-tensors; "
            f"{args.source} to {args.format} is done in one piece"
        )
    else:
        report = _in_memory(args, plan, how, console)
    for line in report.warnings():
        console.note(line)
    values = {"output": str(args.output), **report.as_json()["totals"]}
    values["seconds"] = time.perf_counter() - start
    console.result(values, _summary(report, args.output, values["seconds"]))


def _streamed(
    args: argparse.Namespace,
    source: ModelDirectory,
    plan: Plan,
    how: qjax.Method,
    console: Console,
) -> QuantizationReport:
    """Part by part, from directory to directory."""
    plain = abstract_plain(source)
    model, how = _prepared(args, plain, plan, how, console)
    tokens = _tokens(args, model.config)
    identity = streaming.identify(
        source,
        plan,
        how,
        tokens,
        experts=args.experts,
        true_sequential=args.true_sequential,
        kv_cache=args.kv_cache,
    )
    if args.resume and (report := streaming.completed(args.output, identity)):
        return report
    choose = functools.partial(budget.choose, args, model, tokens, how, console)
    recipe = choose if isinstance(plan, str) else plan
    with streaming.streamed_output(
        source, model, recipe, args.output, identity, resume=args.resume
    ) as storage:
        _note_untied(plain, model, console)
        if storage.choice is not None:
            console.note(budget.shown(storage.choice))
        try:
            report = _quantized(args, model, tokens, storage.recipe, how, console, storage)[1]
            storage.complete(_as_json(report, storage.choice) | {"run": identity})
        except ValueError as error:
            if storage.has_finished_parts:
                raise ValueError(
                    f"{error}; {partial_path(args.output)} keeps what was finished: --resume goes on "
                    "behind it once the cause is gone; remove it to begin anew"
                ) from error
            raise
        except BaseException:
            if storage.has_finished_parts:
                console.note("what is finished stays; the same command with --resume goes on")
            raise
    return report


def _in_memory(
    args: argparse.Namespace, plan: Plan, how: qjax.Method, console: Console
) -> QuantizationReport:
    """The whole model, written at the end: what a streamed output cannot be read from or written to."""
    source = load(args.source)
    for line in source.notes:
        console.note(line)
    tokens = _tokens(args, source.model.config)
    choice = None
    if isinstance(plan, str):
        choice = budget.choose(args, source.model, tokens, how, console)
        console.note(budget.shown(choice))
        plan = choice.recipe
    model, how = _prepared(args, source.model, plan, how, console)
    check_format(model, plan, args.format)
    _note_untied(source.model, model, console)
    model, report = _quantized(args, model, tokens, plan, how, console)
    save(model, source, args.output, args.format, _as_json(report, choice))
    return report


def _as_json(report: QuantizationReport, choice: qjax.Choice | None) -> dict[str, Any]:
    """The report as it is written, with the reasons for its schemes where a budget chose them."""
    return report.as_json() | ({} if choice is None else {"choice": choice.as_json()})


def _prepared(
    args: argparse.Namespace, model: Decoder, plan: Plan, how: qjax.Method, console: Console
) -> tuple[Decoder, qjax.Method]:
    """The model in the form that the method works on, with room for the scales of its cache; the method.

    The method is another where the best one has a rotation, and none passes through the model.
    """
    if args.kv_cache is not None:
        model = model.with_kv_cache(args.kv_cache)
    if how.rotated is None:
        return model, how
    assert isinstance(plan, qjax.Recipe)  # see _method
    why = why_not_rotatable(model.config)
    if why and args.method == method.BEST:
        how = qjax.Method.parse(method.BEST, _search(args), plan)
        console.note(f"best is {how.name} here, without a rotation: {why}")
        return model, how
    return rotatable(model, plan), how


def _search(args: argparse.Namespace) -> qjax.RangeSearch | None:
    return qjax.RangeSearch(method=args.range) if args.range else None


def _note_untied(before: Decoder, after: Decoder, console: Console) -> None:
    """Says what it costs that the head of a model is no longer its token table."""
    if before.config.tied_embeddings and not after.config.tied_embeddings:
        head = after.lm_head.kernel.get_value()
        console.note(
            "lm_head: no longer the token table, which a rotation changes in another way: "
            f"{head.size * head.dtype.itemsize / 2**20:.2f} MiB more"
        )


def _quantized(
    args: argparse.Namespace,
    model: Decoder,
    tokens: Int[np.ndarray, "n length"],
    recipe: qjax.Recipe,
    how: qjax.Method,
    console: Console,
    storage: Storage | None = None,
) -> tuple[Decoder, QuantizationReport]:
    what = "quantizing"
    if how.looks_at_inputs(recipe) or _has_static_cache(args):
        what = f"calibrating on {len(tokens)} windows of {tokens.shape[1]} tokens"
    with console.progress(what, 2 * model.config.num_layers) as bar:
        return qjax.quantize_sequentially(
            model,
            blockwise,
            tokens,
            recipe,
            method=how,
            experts=args.experts,
            true_sequential=args.true_sequential,
            storage=storage,
            spill=args.spill,
            on_step=lambda what: bar.advance(),
        )


def _has_static_cache(args: argparse.Namespace) -> bool:
    return args.kv_cache is not None and kv_cache.scheme(args.kv_cache).static


def _tokens(args: argparse.Namespace, config: DecoderConfig) -> Int[np.ndarray, "n length"]:
    """The calibration windows; none where nothing looks at any."""
    if not args.calib:
        return np.zeros((0, 1), np.int32)
    tokens = text.calibration_windows(
        args.calib, args.source, config.vocab_size, samples=args.samples, length=args.seq_len
    )
    if tokens.shape[1] > config.max_positions:
        raise ValueError(
            f"windows of {tokens.shape[1]} tokens go beyond the {config.max_positions} that the model "
            f"was made for; --seq-len {config.max_positions} would do"
        )
    return tokens


def _method(args: argparse.Namespace, plan: Plan) -> qjax.Method:
    """The method that the arguments name, for a recipe or for whatever a budget will choose.

    Raises:
      ValueError: it is not for a scheme of the recipe, or the format does not hold what it makes; it
        needs calibration and has no data, or has some that it does not look at.
    """
    # Candidates are of weights alone: one stands for all.
    recipe = qjax.Recipe.uniform(budget.candidates(args)[0]) if isinstance(plan, str) else plan

    def calibrated(name: str) -> bool:
        return qjax.Method.parse(name, recipe=recipe).looks_at_inputs(recipe)

    may_rotate = args.format == "orbax"
    how = qjax.Method.parse(args.method, _search(args), recipe, may_rotate=may_rotate)
    if how.outliers is not None and isinstance(plan, str):
        raise ValueError(
            f"--method {how.name} is for w8a8, and a budget chooses among schemes of weights alone: "
            "name --scheme w8a8"
        )
    how.check(recipe)
    if how.rotated is not None and isinstance(plan, str):
        raise ValueError(
            f"--method {how.name} turns the layers that a budget measures as they are: name a --scheme"
        )
    if how.outliers is not None and args.format == "compressed-tensors":
        raise ValueError(
            f"--method {how.name} keeps inputs with outliers beside the codes, which compressed-tensors "
            "has no place for; --format orbax does"
        )
    if how.calibrated and not args.calib:
        raise ValueError(
            f"--method {how.name}{' with --range output' if how.name == 'rtn' else ''} looks at what "
            "the layers multiply: give text or tokens, --calib FILE"
        )
    if recipe.static_scheme is not None and not args.calib:
        raise ValueError(
            f"{recipe.static_scheme.name} has input scales from calibration: give text or tokens, "
            "--calib FILE, or take a scheme without -static"
        )
    if args.kv_cache in kv_cache.DYNAMIC and args.format == "compressed-tensors":
        raise ValueError(
            f"--kv-cache {args.kv_cache}: a compressed-tensors directory cannot say that; take --format "
            "orbax, or leave it out here and give it to qjax eval and qjax generate"
        )
    if _has_static_cache(args):
        if not args.calib:
            raise ValueError(
                f"--kv-cache {args.kv_cache} has scales from calibration: give text or tokens, "
                "--calib FILE"
            )
    elif args.calib and not how.looks_at_inputs(recipe) and isinstance(plan, qjax.Recipe):
        raise ValueError(
            f"--method {how.name} looks at no data: leave out --calib, or take "
            f"{', '.join(name for name in method.names() if calibrated(name))}"
        )
    if args.true_sequential and not how.looks_at_inputs(recipe):
        raise ValueError(
            f"--method {how.name} looks at no data, in whatever order: leave out --true-sequential"
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


def _recipe(args: argparse.Namespace) -> qjax.Recipe:
    if args.scheme:
        return qjax.Recipe.uniform(args.scheme)
    try:
        rules = json.loads(read_text(args.recipe))
    except json.JSONDecodeError as error:
        raise ValueError(f"{args.recipe}: not a JSON recipe: {error}") from error
    return qjax.Recipe.from_json(rules, where=str(args.recipe))
