# SPDX-License-Identifier: Apache-2.0
"""Trains the model that ships with qjax: `prepare` a corpus, `train` on it, `export` the result.

Example:
    python scripts/train_shipped_model.py prepare --work /tmp/work
    python scripts/train_shipped_model.py train --work /tmp/work --run /tmp/run --seconds 600
    python scripts/train_shipped_model.py export --work /tmp/work --run /tmp/run --out /tmp/model
"""

import argparse
import importlib
import json
import os
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from shipped_model_training.corpus import CorpusLimits
from shipped_model_training.settings import ModelShape, TrainingSettings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        result = _COMMANDS[options.command](options)
    except ValueError as error:
        print(f"train_shipped_model: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result, indent=2))
    return 0


def _prepare(options: argparse.Namespace) -> dict[str, Any]:
    # Imported when called: a worker process of `prepare` imports this file and needs none of it.
    prepare = importlib.import_module("shipped_model_training.prepare")
    return prepare.prepare(
        options.work,
        packages=options.packages,
        stdlib=Path(sysconfig.get_path("stdlib")),
        vocab_size=options.vocab_size,
        max_positions=options.max_positions,
        sample_bytes=options.sample_bytes,
        num_workers=options.workers,
        limits=CorpusLimits(),
        known_tokenizer=options.tokenizer,
    )


def _train(options: argparse.Namespace) -> dict[str, Any]:
    training = importlib.import_module("shipped_model_training.training")
    budget = training.Budget(
        steps=options.steps,
        seconds=options.seconds,
        pause_after=options.pause_after,
        checkpoint_every=options.checkpoint_every,
    )
    progress = training.train(
        options.work,
        options.run,
        shape=_from_options(ModelShape, options),
        settings=_from_options(TrainingSettings, options),
        budget=budget,
        resume=options.resume,
    )
    return asdict(progress)


def _export(options: argparse.Namespace) -> dict[str, Any]:
    export = importlib.import_module("shipped_model_training.export")
    return export.export(
        options.work,
        options.run,
        options.out,
        window=options.window,
        batch_size=options.batch_size,
        max_characters=options.max_characters,
    )


_COMMANDS = {"prepare": _prepare, "train": _train, "export": _export}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    prepare = commands.add_parser("prepare", help="read the corpus, train the tokenizer, encode")
    _add_path(prepare, "--work", "folder to write the tokenizer and the tokens to")
    site_packages = Path(sysconfig.get_path("purelib"))
    prepare.add_argument(
        "--packages", type=Path, nargs="+", default=[site_packages], help="folders to train on"
    )
    prepare.add_argument(
        "--tokenizer", type=Path, help="tokenizer.json to encode with, instead of learning one"
    )
    prepare.add_argument("--vocab-size", type=int, default=ModelShape.vocab_size)
    prepare.add_argument("--max-positions", type=int, default=ModelShape.max_positions)
    prepare.add_argument("--sample-bytes", type=int, default=64_000_000, help="for the tokenizer")
    prepare.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")

    train = commands.add_parser("train", help="train, or go on training with --resume")
    _add_path(train, "--work", "folder that `prepare` wrote")
    _add_path(train, "--run", "folder of checkpoints and log")
    length = train.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int, help="length in steps")
    length.add_argument(
        "--seconds", type=float, help="length in seconds of steps, made steps early"
    )
    train.add_argument("--pause-after", type=float, default=float("inf"), help="seconds; then stop")
    train.add_argument("--checkpoint-every", type=int, default=1000, help="steps")
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    for settings in (ModelShape, TrainingSettings):
        for field in fields(settings):
            flag = "--" + field.name.replace("_", "-")
            train.add_argument(flag, type=type(field.default), default=field.default)

    export = commands.add_parser("export", help="write the model directory and score the model")
    _add_path(export, "--work", "folder that `prepare` wrote")
    _add_path(export, "--run", "folder of checkpoints and log")
    _add_path(export, "--out", "model directory to write")
    export.add_argument("--window", type=int, default=1024, help="tokens of an evaluation window")
    export.add_argument("--batch-size", type=int, default=16, help="windows scored at once")
    export.add_argument("--max-characters", type=int, help="score only so much text")
    return parser


def _add_path(parser: argparse.ArgumentParser, flag: str, text: str) -> None:
    parser.add_argument(flag, type=Path, required=True, help=text)


def _from_options(settings: type, options: argparse.Namespace) -> Any:
    """Build a settings class from the options of the same names."""
    return settings(**{field.name: getattr(options, field.name) for field in fields(settings)})


if __name__ == "__main__":
    sys.exit(main())
