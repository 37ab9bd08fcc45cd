# SPDX-License-Identifier: Apache-2.0
r"""Train a model with fake quantization until it is good in few bits, and save it quantized.

Training begins with the best post-training result (--start takes one that is there already): weights,
and with --method lsq scales too, move under a straight-through estimator, in float32, while the model
computes with what they will be worth once quantized. It learns the next token of the text; with
--teacher, mostly SRC itself, what the teacher expects there, or a mixture (--distillation).

Checkpoints, log.csv and the start lie in OUT.training. A run that was killed goes on from its last
checkpoint with the same command and --resume, with the same losses step for step. OUT appears when
everything is done: a directory that vLLM and transformers load, or with --format orbax qjax's own, which
holds every scheme.

Example:
  qjax qat ./Llama-3.2-1B ./Llama-3.2-1B-w4 --scheme w4a16-g128 --text books/*.txt --steps 2000 \
      --teacher ./Llama-3.2-1B
"""

import argparse
import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

import qjax
from qjax import assignment, nnx_layers
from qjax.formats import device_bytes
from qjax.method import BEST
from qjax.nnx_layers import named_variables
from qjax.qat.fake_quantizer import quantized, trainable
from qjax.qat.training import Settings, Trainer
from qjax.report import LayerReport, QuantizationReport
from qjax.scheme import SUPPORTED
from qjax_checkpoints.atomic import check_writable
from qjax_checkpoints.checkpoint import Checkpoint
from qjax_checkpoints.compressed_tensors.write import check_nothing_online
from qjax_checkpoints.directory import fingerprint
from qjax_checkpoints.load import load
from qjax_checkpoints.save import check_format, save
from qjax_checkpoints.training_run import TrainingRun
from qjax_cli import text
from qjax_cli.arguments import number, scheme, whole_number
from qjax_cli.console import Console
from qjax_cli.qat.loop import LOG_COLUMNS, train
from qjax_models import Decoder, DecoderConfig, blockwise

_DEFAULTS = Settings(steps=1, distillation=0.0)
_CALIBRATION = 64  # windows that the start is calibrated on, at most


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument("source", metavar="SRC", type=Path, help="model directory, not quantized")
    parser.add_argument("output", metavar="OUT", type=Path, help="new directory; must not exist")
    parser.add_argument("--scheme", type=scheme, required=True, help=f"for all layers: {SUPPORTED}")
    parser.add_argument(
        "--text", metavar="FILE", type=Path, nargs="+", required=True,
        help="text files to train on, or one int32 [n, length] .npy",
    )  # fmt: skip
    parser.add_argument("--steps", type=whole_number(1), required=True, help="optimizer steps")
    parser.add_argument(
        "--method", choices=("lsq", "ste"), default="lsq",
        help="lsq: scales and zeros are trained too (default); ste: weights alone, on the grids that "
        "they begin with",
    )  # fmt: skip
    parser.add_argument(
        "--teacher", metavar="SRC", type=Path, help="model to learn from; often SRC"
    )
    parser.add_argument(
        "--distillation", type=number(0, 1), metavar="SHARE",
        help="share of the teacher in the loss, the text has the rest (default 1 with a teacher)",
    )  # fmt: skip
    parser.add_argument(
        "--start", metavar="DIR", type=Path,
        help="quantized directory to begin with (default: qjax quantize --method best on the text)",
    )  # fmt: skip
    parser.add_argument(
        "--seq-len", type=whole_number(2), default=1024, help="tokens of a window, at most (1024)"
    )
    parser.add_argument(
        "--batch", type=whole_number(1), default=_DEFAULTS.batch,
        help=f"windows of a step ({_DEFAULTS.batch})",
    )  # fmt: skip
    parser.add_argument(
        "--rate", type=number(0, exclusive=True), default=_DEFAULTS.rate,
        help="highest learning rate of weights, relative to their size; the fewer bits, the higher "
        f"({_DEFAULTS.rate:g})",
    )  # fmt: skip
    parser.add_argument(
        "--scale-rate", type=number(0, exclusive=True), default=_DEFAULTS.scale_rate,
        help=f"highest learning rate of scales, relative to them ({_DEFAULTS.scale_rate:g})",
    )  # fmt: skip
    parser.add_argument(
        "--dampening", type=number(0, 1), default=_DEFAULTS.dampening,
        help="share of its way to a code that a weight is drawn in the last step, so that it stops "
        f"swinging between two ({_DEFAULTS.dampening:g})",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=whole_number(0), default=0, help="of the order of windows (0)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"),
        help="computed in; weights train in float32 (default bfloat16 on a GPU or TPU, else float32)",
    )  # fmt: skip
    parser.add_argument("--checkpoint-every", type=whole_number(1), default=500, help="steps (500)")
    parser.add_argument(
        "--format", choices=("compressed-tensors", "orbax"), default="compressed-tensors",
        help="of OUT, as in qjax quantize",
    )  # fmt: skip
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the last checkpoint of the same command; begin if there is none",
    )


def run(args: argparse.Namespace, console: Console) -> None:
    """Quantizes, trains, converts, writes."""
    check_writable(args.output)
    recipe, settings = qjax.Recipe.uniform(args.scheme), _settings(args)
    dtype = jnp.dtype(args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))
    source = _loaded(args.source, console)
    _check(args, source, recipe)
    begun = None if args.start is None else _begun(args, source, recipe, dtype, console)
    tokens = _tokens(args, source.model.config)
    teacher = _teacher(args, source, tokens, dtype, console) if settings.distillation else None
    description = _description(args, settings, tokens, dtype)
    folder = args.output.absolute().parent / f"{args.output.name}.training"
    training = TrainingRun(folder, LOG_COLUMNS)
    training.begin(description, args.resume and training.has_begun)
    start = args.start or _quantized(source, tokens, recipe, folder / "start", console)
    if begun is None:
        begun = trainable(load(start, dtype).model, learned=args.method == "lsq")
    trainer = Trainer(begun, settings, teacher)
    state, summary = train(
        trainer, training, tokens, checkpoint_every=args.checkpoint_every, console=console
    )
    result = _filled(load(start).model, quantized(trainer.model(state)))
    summary |= {
        "method": args.method,
        "scheme": args.scheme.name,
        "settings": dataclasses.asdict(settings),
    }
    report = _report(result, source.model, args.method).as_json()
    save(result, source, args.output, args.format, report | {"training": summary})
    loss = summary["last_loss"]  # None where the log was lost
    told = "" if loss is None else f", loss {loss:.4f}"
    console.result(
        {"output": str(args.output)} | summary,
        f"{args.output}: {summary['steps']} steps of {settings.batch * tokens.shape[1]} tokens{told}; "
        f"{summary['seconds']:.1f} s",
    )


def _loaded(path: Path, console: Console, dtype: Any = None) -> Checkpoint:
    """Loads a directory and tells what in it was read with a difference."""
    checkpoint = load(path, dtype)
    for line in checkpoint.notes:
        console.note(f"{path}: {line}")
    return checkpoint


def _settings(args: argparse.Namespace) -> Settings:
    share = args.distillation
    if share and args.teacher is None:
        raise ValueError(f"--distillation {share:g} needs a --teacher; SRC itself often is")
    if share is None:
        share = 0.0 if args.teacher is None else 1.0
    return Settings(
        steps=args.steps, batch=args.batch, rate=args.rate, scale_rate=args.scale_rate,
        dampening=args.dampening, distillation=share, seed=args.seed,
    )  # fmt: skip


def _description(
    args: argparse.Namespace, settings: Settings, tokens: Int[np.ndarray, "n length"], dtype: Any
) -> dict[str, Any]:
    """What decides the result of a run, each under what it is called."""
    return {
        "source": fingerprint(args.source),
        "teacher": fingerprint(args.teacher) if args.teacher else None,
        "start": fingerprint(args.start) if args.start else BEST,
        "scheme": args.scheme.name,
        "method": args.method,
        **dataclasses.asdict(settings),
        "text": f"{tokens.shape[0]} windows of {tokens.shape[1]} tokens "
        f"({hashlib.sha256(tokens.tobytes()).hexdigest()[:12]})",
        "dtype": str(dtype),
        "qjax": qjax.__version__,
    }


def _check(args: argparse.Namespace, source: Checkpoint, recipe: qjax.Recipe) -> None:
    """Refuses what cannot end well before there is a run."""
    if nnx_layers.quantized_layers(source.model):
        raise ValueError(
            f"{args.source}: is quantized; train from the model as it was, with this as --start"
        )
    check_format(source.model, recipe, args.format)
    if args.method == "lsq" and args.scheme.weights.scale_format == "e8m0":
        raise ValueError(
            f"{args.scheme.name} has scales that are powers of two, which no small step moves: "
            "--method ste trains weights alone"
        )


def _begun(
    args: argparse.Namespace, source: Checkpoint, recipe: qjax.Recipe, dtype: Any, console: Console
) -> Decoder:
    """The model of --start, ready to train: whether it is that and can is known before there is a run."""
    start = _loaded(args.start, console, dtype).model
    _check_start(args.start, start, source.model, recipe)
    try:
        if args.format == "compressed-tensors":
            check_nothing_online(start)
        return trainable(start, learned=args.method == "lsq")
    except ValueError as error:
        raise ValueError(f"{args.start}: {error}") from error


def _check_start(path: Path, start: Decoder, source: Decoder, recipe: qjax.Recipe) -> None:
    ours, theirs = (dataclasses.asdict(model.config) for model in (source, start))
    # A rotated start has a head of its own, may turn inputs at run time, and is the same model.
    names = ours.keys() - {"tied_embeddings", "online_hadamard"}
    different = sorted(name for name in names if ours[name] != theirs[name])
    if different:
        name = different[0]
        raise ValueError(
            f"{path}: is of another model than SRC: {name} is {theirs[name]} there and {ours[name]} here"
        )
    held = nnx_layers.quantized_layers(start)
    for layer in assignment.assign(source, recipe).quantized:
        wanted, found = recipe.scheme_for(layer), held.get(layer)
        if found is None or found.scheme != wanted:
            is_now = "not quantized" if found is None else found.scheme.name
            raise ValueError(
                f"{path}: {layer} is {is_now}, but --scheme asks for {wanted and wanted.name}"
            )


def _tokens(args: argparse.Namespace, config: DecoderConfig) -> Int[np.ndarray, "n length"]:
    """The windows to train on."""
    tokens = text.windows_to_train_on(
        args.text, args.source, config.vocab_size, length=args.seq_len
    )
    _check_length(tokens, config, "the model")
    return tokens


def _check_length(tokens: Int[np.ndarray, "n length"], config: DecoderConfig, whose: str) -> None:
    if tokens.shape[1] > config.max_positions:
        raise ValueError(
            f"windows of {tokens.shape[1]} tokens go beyond the {config.max_positions} that {whose} "
            f"was made for; --seq-len {config.max_positions} would do"
        )


def _teacher(
    args: argparse.Namespace,
    source: Checkpoint,
    tokens: Int[np.ndarray, "n length"],
    dtype: Any,
    console: Console,
) -> Decoder:
    teacher = _loaded(args.teacher, console, dtype).model
    _check_length(tokens, teacher.config, f"the teacher {args.teacher}")
    theirs, ours = teacher.config.vocab_size, source.model.config.vocab_size
    if theirs != ours:
        raise ValueError(
            f"{args.teacher}: knows {theirs} tokens, SRC {ours}; a teacher shares the vocabulary"
        )
    return teacher


def _quantized(
    source: Checkpoint,
    tokens: Int[np.ndarray, "n length"],
    recipe: qjax.Recipe,
    start: Path,
    console: Console,
) -> Path:
    """The directory of the best post-training result; made if it is not there."""
    if start.exists():
        return start
    chosen = np.linspace(0, len(tokens) - 1, min(_CALIBRATION, len(tokens))).round().astype(int)
    method = qjax.Method.parse(BEST, recipe=recipe)
    what = f"quantizing, {method.name}"
    with console.progress(what, 2 * source.model.config.num_layers) as bar:
        model, report = qjax.quantize_sequentially(
            source.model, blockwise, tokens[chosen], recipe, method=method,
            on_step=lambda what: bar.advance(),
        )  # fmt: skip
    save(model, source, start, "orbax", report.as_json())
    return start


def _filled(model: Decoder, trained: Decoder) -> Decoder:
    """A model in the dtypes of its files, with the values of one that was trained in others."""
    values = named_variables(trained)
    for path, variable in named_variables(model).items():
        variable.set_value(values[path].get_value().astype(variable.get_value().dtype))
    return model


def _report(model: Decoder, source: Decoder, method: str) -> QuantizationReport:
    """What became of each layer."""
    held = nnx_layers.quantized_layers(model)
    layers = []
    for path, layer in nnx_layers.quantizable_layers(source):
        q, w = held.get(path), nnx_layers.weight_of(layer)
        layers.append(
            LayerReport(
                path=path,
                scheme=q.scheme.name if q else None,
                method=f"qat-{method}" if q else None,
                shape=w.shape,
                relative_output_error=None,
                bytes_before=device_bytes(w),
                bytes_after=device_bytes(w if q is None else q),
                seconds=0.0,
                reason="" if q else "no rule names it",
                input_scale=None if q is None or q.input_scale is None else float(q.input_scale),
            )
        )
    return QuantizationReport(layers=tuple(layers), unmatched_rules=())
