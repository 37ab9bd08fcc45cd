# SPDX-License-Identifier: Apache-2.0
"""Perplexity of a model on text or tokens; with a baseline, the distance from it too.

nll is the mean over all predicted tokens, natural logarithm: in each window every token but the first
is predicted. kl is the mean divergence from the baseline in nats, top1_agreement the share of positions
at which both hold the same token likeliest.

Example:
  qjax eval ./Llama-3.2-1B-w4 --text book.txt --baseline ./Llama-3.2-1B
"""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp

import qjax
from qjax_checkpoints.load import Checkpoint, load
from qjax_checkpoints.tokenizer import load_tokenizer
from qjax_cli import text
from qjax_cli.arguments import kv_cache_argument, whole_number
from qjax_cli.console import Console
from qjax_models.stacked_experts import stack_experts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument("source", metavar="SRC", type=Path, help="model directory")
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--text", metavar="FILE", type=Path, nargs="+", help="UTF-8 text files")
    data.add_argument("--tokens", metavar="FILE.npy", type=Path, help="int32 [n, length]")
    parser.add_argument(
        "--seq-len",
        type=whole_number(2),
        default=1024,
        help="tokens of a window, at most (default 1024)",
    )
    parser.add_argument("--baseline", metavar="SRC2", type=Path, help="model to compare with")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="computed in, weights and activations (default float32)",
    )
    kv_cache_argument(parser)


def run(args: argparse.Namespace, console: Console) -> None:
    """Evaluates and prints."""
    dtype = jnp.dtype(args.dtype)
    checkpoint = load(args.source, dtype)
    model = checkpoint.model
    if args.kv_cache:
        model = model.with_kv_cache(args.kv_cache)
    baseline = load(args.baseline, dtype) if args.baseline else None
    tokens = _windows(args, checkpoint)
    if baseline and baseline.model.config.vocab_size != checkpoint.model.config.vocab_size:
        raise ValueError(
            f"{args.baseline}: has {baseline.model.config.vocab_size} tokens, {args.source} has "
            f"{checkpoint.model.config.vocab_size}; a baseline shares the vocabulary"
        )
    context = checkpoint.model.config.max_positions
    if tokens.shape[1] > context:
        console.note(
            f"windows of {tokens.shape[1]} tokens go beyond the {context} that the model was made for"
        )
    for loaded in filter(None, (checkpoint, baseline)):
        for line in loaded.notes:
            console.note(line)
    for decoder in filter(None, (model, baseline and baseline.model)):
        stack_experts(decoder)
    start = time.perf_counter()
    # float32 means float32: a GPU would otherwise round the factors of each product to TF32.
    precise = jax.default_matmul_precision("highest" if args.dtype == "float32" else None)
    with precise, console.progress("windows", len(tokens)) as bar:
        evaluation = qjax.evaluate(
            model,
            tokens,
            baseline=baseline.model if baseline else None,
            on_batch=bar.reach,
        )
    seconds = time.perf_counter() - start
    values = {
        "perplexity": evaluation.perplexity,
        "nll": evaluation.nll,
        "tokens": evaluation.tokens,
        "seconds": seconds,
        "dtype": args.dtype,
        "kv_cache": model.config.kv_cache,
    }
    lines = [
        f"perplexity      {evaluation.perplexity:.4f}",
        f"nll             {evaluation.nll:.5f} nats a token",
        f"tokens          {evaluation.tokens} in {len(tokens)} windows of {tokens.shape[1]}",
    ]
    if evaluation.kl is not None:
        values |= {"kl": evaluation.kl, "top1_agreement": evaluation.top1_agreement}
        lines += [
            f"kl              {evaluation.kl:.6f} nats a token",
            f"top1 agreement  {evaluation.top1_agreement:.4f}",
        ]
    console.result(values, *lines, f"took            {seconds:.1f} s in {args.dtype}")


def _windows(args: argparse.Namespace, checkpoint: Checkpoint):
    vocab_size = checkpoint.model.config.vocab_size
    if args.tokens:
        return text.windows_of_array(args.tokens, vocab_size, args.seq_len)
    tokenizer = load_tokenizer(args.source, vocab_size=vocab_size)
    return text.windows_of_files(args.text, tokenizer, args.seq_len)
