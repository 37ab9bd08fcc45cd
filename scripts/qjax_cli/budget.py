# SPDX-License-Identifier: Apache-2.0
"""A budget on the command line: from bits or bytes to a scheme for each layer, and why in a table."""

import argparse
import dataclasses
import math
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

import qjax
from qjax import Choice, Recipe, Scheme, budget, sensitivity
from qjax.budget import CANDIDATES, Budget
from qjax.method import Method
from qjax.nnx_layers import named_variables
from qjax.sensitivity import LayerGroup
from qjax_checkpoints.load import load
from qjax_checkpoints.outline import outline
from qjax_checkpoints.save import written_bytes
from qjax_cli.arguments import number, size
from qjax_cli.console import Bar, Console, table
from qjax_models import Decoder

# Half as many chose well for the shipped model (docs/budget.md).
_MEASURED_TOKENS = 4096
_BATCH = 8  # windows at once in calibration


def add_arguments(how: argparse._MutuallyExclusiveGroup) -> None:
    """Declares the two ways to give a budget, beside those to name schemes."""
    how.add_argument(
        "--bits",
        metavar="BITS",
        type=number(0, exclusive=True),
        help="budget: stored bits a weight in the mean over all quantizable layers, scales included; "
        "each gets the candidate that measured best for the whole",
    )
    how.add_argument(
        "--size",
        metavar="SIZE",
        type=size,
        help="budget: bytes of all weights in OUT, such as 4GB or 3.5GiB",
    )


def words(args: argparse.Namespace) -> str | None:
    """The budget that the arguments ask for, with its candidates; None: none.

    Raises:
      ValueError: there are candidates and no budget, or a budget and nothing to measure it on.
    """
    if args.bits is None and args.size is None:
        if args.candidates:
            raise ValueError("--candidates are what a budget chooses among: give --bits or --size")
        return None
    if not args.calib:
        raise ValueError(
            "a budget is met by what the model's output loses on some text: give text or tokens, "
            "--calib FILE"
        )
    asked = f"{args.bits:g} bits a weight" if args.bits else f"{args.size} bytes"
    return f"{asked} of {', '.join(scheme.name for scheme in candidates(args))}"


def candidates(args: argparse.Namespace) -> list[Scheme]:
    """The schemes to choose among."""
    return args.candidates or [Scheme.parse(name) for name in CANDIDATES]


def choose(
    args: argparse.Namespace,
    model: Decoder,
    tokens: Int[np.ndarray, "n length"],
    how: Method,
    console: Console,
) -> Choice:
    """Measures what each layer costs in each candidate, and chooses.

    Args:
      args: of the command.
      model: as its files hold it; shapes in place of arrays will do.
      tokens: the calibration windows.
      how: the method that is going to quantize it.
      console: where progress is told.

    Raises:
      ValueError: the budget cannot be met, or the output's format does not hold a candidate.
    """
    windows = _spread(tokens)
    groups = sensitivity.layer_groups(model, windows, candidates(args))
    in_files, rest = _as_written(model, groups, args.format)  # which refuses what cannot be written
    if args.bits:
        limit = Budget.of_bits(args.bits, groups)
    else:
        limit = Budget.of_size(args.size, in_files, rest)
        groups = in_files
    rounding = Method(search=how.search, rounding=how.rounding)
    batches = np.array_split(tokens, range(_BATCH, len(tokens), _BATCH))
    steps = sensitivity.steps(groups) + (len(batches) if rounding.calibrated else 0)
    console.note(_announced(model, groups, windows, rounding))
    with console.progress("measuring", steps) as bar:
        whole = load(args.source, jnp.float32).model
        observed = None
        if rounding.calibrated:
            observed = qjax.calibrate(whole, _told(batches, bar), hessians=rounding.needs_hessians)
        return budget.choose(
            whole,
            windows,
            groups,
            limit,
            method=rounding,
            observed=observed,
            on_step=bar.advance,
        )


def _announced(
    model: Decoder,
    groups: Sequence[LayerGroup],
    windows: Int[np.ndarray, "n length"],
    rounding: Method,
) -> str:
    numbers = sum(math.prod(v.get_value().shape) for v in named_variables(model).values())
    hessians = " and every layer's Hessian" if rounding.needs_hessians else ""
    return (
        f"measuring {len(groups)} groups of layers in {sensitivity.steps(groups)} ways on "
        f"{windows.size:,} tokens, rounded by {rounding.name}: the whole model is in memory for it, "
        f"{4 * numbers / 2**30:.2f} GiB in float32{hessians}"
    )


def _told(batches: Sequence[np.ndarray], bar: Bar) -> Iterator[Array]:
    for batch in batches:
        yield jnp.asarray(batch)
        bar.advance()


def _spread(tokens: Int[np.ndarray, "n length"]) -> Int[np.ndarray, "some length"]:
    """Windows from all over the calibration text."""
    count = min(len(tokens), max(1, _MEASURED_TOKENS // tokens.shape[1]))
    return tokens[np.linspace(0, len(tokens) - 1, count).round().astype(int)]


def _as_written(
    model: Decoder, groups: Sequence[LayerGroup], format: str
) -> tuple[list[LayerGroup], int]:
    """The groups with the bytes that they take in the files of a format, and the bytes of the rest.

    Raises:
      ValueError: the format does not hold a layer in a candidate (both named).
    """
    plain = written_bytes(model, format)
    nbytes: list[dict[Scheme | None, int]] = [{} for _ in groups]
    for scheme in dict.fromkeys(s for group in groups for s in group.nbytes if s):
        rules = tuple(group.rule(scheme) for group in groups if scheme in group.nbytes)
        written = written_bytes(outline(model, Recipe(rules=rules)), format)
        for group, held in zip(groups, nbytes, strict=True):
            if scheme in group.nbytes:
                held[scheme] = sum(written[path] for path in group.layers)
    for group, held in zip(groups, nbytes, strict=True):
        held[None] = sum(plain[path] for path in group.layers)
    rest = sum(plain.values()) - sum(held[None] for held in nbytes)
    pairs = zip(groups, nbytes, strict=True)
    return [dataclasses.replace(group, nbytes=held) for group, held in pairs], rest


def shown(choice: Choice) -> str:
    """The choice and its reasons as lines for a person."""
    schemes = list(dict.fromkeys(s for group in choice.groups for s in group.kl if s))
    rows = []
    for chosen in choice.groups:
        first, *others = chosen.group.layers
        names = [first, *(path.rpartition("/")[2] for path in others)]
        losses = [f"{chosen.kl[s]:.6f}" if s in chosen.kl else "" for s in schemes]
        bits = f"{8 * chosen.nbytes / chosen.group.weights:.3f}"
        rows.append([", ".join(names), _held(chosen.scheme), bits, *losses])
    headings = ("layers", "chosen", "bits", *(f"KL {scheme.name}" for scheme in schemes))
    return (
        f"{table(headings, rows, left=2)}\n{choice.budget}: {choice.bits_per_weight:.3f} bits a weight; "
        f"KL {choice.sum_of_kls:.5f} one by one, {choice.kl:.5f} together"
    )


def _held(scheme: Scheme | None) -> str:
    return scheme.name if scheme else "as it is"
