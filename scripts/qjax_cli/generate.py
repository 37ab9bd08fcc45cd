# SPDX-License-Identifier: Apache-2.0
"""Continue a prompt. The text goes to stdout as it comes, the speed to stderr.

Example:
  qjax generate ./Llama-3.2-1B-w4 --prompt "The capital of France is" --max-new 32
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from flax import nnx

import qjax
from qjax_checkpoints.load import load
from qjax_checkpoints.tokenizer import load_tokenizer
from qjax_cli.arguments import kv_cache_argument, number, whole_number
from qjax_cli.console import Console
from qjax_models.generate import Generator, Timing
from qjax_models.joined import join_projections
from qjax_models.sampling import Sampling
from qjax_models.stacked_experts import stack_experts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument("source", metavar="SRC", type=Path, help="model directory")
    parser.add_argument("--prompt", metavar="TEXT", required=True, help="what to continue")
    parser.add_argument(
        "--max-new",
        metavar="N",
        type=whole_number(1),
        default=64,
        help="tokens at most (default 64)",
    )
    parser.add_argument(
        "--temperature", type=number(0), default=0.0, help="0 takes the likeliest token (default)"
    )
    parser.add_argument(
        "--top-k", metavar="K", type=whole_number(1), help="sample among the K likeliest"
    )
    parser.add_argument(
        "--top-p",
        metavar="P",
        type=number(0, 1, exclusive=True),
        default=1.0,
        help="sample among the fewest tokens that together have this probability",
    )
    parser.add_argument(
        "--seed", type=whole_number(0, 2**31 - 1), default=0, help="of the sampling (default 0)"
    )
    kv_cache_argument(parser)


def run(args: argparse.Namespace, console: Console) -> None:
    """Generates and tells the speed."""
    if any("\ud800" <= c <= "\udfff" for c in args.prompt):
        raise ValueError("--prompt: not UTF-8 text")
    sampling = Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
    checkpoint = load(args.source)
    for line in checkpoint.notes:
        console.note(line)
    tokenizer = load_tokenizer(args.source, vocab_size=checkpoint.model.config.vocab_size)
    prompt = tokenizer.encode(args.prompt)
    context = checkpoint.model.config.max_positions
    if len(prompt) + args.max_new > context:
        console.note(
            f"{len(prompt)} prompt tokens and {args.max_new} new ones go beyond the {context} that "
            "the model was made for"
        )
    model = checkpoint.model
    if args.kv_cache:
        model = model.with_kv_cache(args.kv_cache)
    join_projections(model)
    stack_experts(model)
    graph, state = nnx.split(model)
    generator = Generator(
        nnx.merge(graph, qjax.prepare(state)),
        capacity=len(prompt) + args.max_new,
        sampling=sampling,
        stop_tokens=tokenizer.eos_ids,
    )
    timing, new_tokens = Timing(), 0
    pieces: list[str] = []

    def tokens() -> Iterator[int]:
        nonlocal timing, new_tokens
        for progress in generator.stream([prompt], args.max_new, seed=args.seed):
            timing = progress.timing
            new_tokens += len(progress.new_tokens[0])
            yield from progress.new_tokens[0]

    for piece in tokenizer.stream(tokens()):
        pieces.append(piece)
        console.text(piece)
    console.text("\n")
    values = {
        "text": "".join(pieces),
        "prompt_tokens": timing.prefill_tokens,
        "new_tokens": new_tokens,
        "prefill_tokens_per_second": timing.prefill_tokens_per_second,
        "decode_tokens_per_second": timing.decode_tokens_per_second,
        "compile_seconds": timing.compile_seconds,
    }
    console.note(
        f"{timing.prefill_tokens} prompt tokens at {timing.prefill_tokens_per_second:.0f}/s, "
        f"{new_tokens} new ones at {timing.decode_tokens_per_second:.0f}/s; "
        f"compiled in {timing.compile_seconds:.1f} s"
    )
    console.result(values)
