# SPDX-License-Identifier: Apache-2.0
"""What keeping keys and values in few bits does to a decode step: its time, and the cache's bytes.

    python scripts/benchmarks/kv_cache_speed.py --layers 4 --batch 16 --context 8192

A Llama of random bfloat16 weights, 4096 wide with 8 key/value heads of 128, whose cache is full but for
the tokens that are added; one token a row and step. Rows are compared in one run, in turns, median of
the rounds. Beside each: what the bytes of weights and cache alone take at --bandwidth. ``--size tiny``
runs on any machine. Prints one JSON object a line.
"""

import argparse
import datetime
import functools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax import formats, kv_cache
from qjax_models import Decoder, DecoderConfig
from qjax_models.cache import KVCache

STEPS, ROUNDS = 16, 5


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--bandwidth", type=float, default=4.8, help="TB/s of the device (4.8)")
    args = parser.parse_args()
    device = f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {datetime.date.today()}"
    print(json.dumps({"device": device}), flush=True)
    wide = args.size == "full"
    config = DecoderConfig(
        vocab_size=4096 if wide else 64,
        hidden_size=4096 if wide else 64,
        mlp_size=14336 if wide else 96,
        num_layers=args.layers,
        num_heads=32 if wide else 4,
        num_kv_heads=8 if wide else 2,
        head_size=128 if wide else 16,
        max_positions=args.context,
    )
    plain = Decoder(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    models = {"none": plain} | {name: plain.with_kv_cache(name) for name in kv_cache.DYNAMIC}
    runs = {name: decoding(model, args) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, (run, _) in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append((time.perf_counter() - start) / STEPS)
    weights = formats.device_bytes(nnx.state(plain))
    for name, (_, cache_bytes) in runs.items():
        found = statistics.median(seconds[name])
        row = {
            "kv_cache": name,
            "cache_mb": round(cache_bytes / 1e6, 1),
            "ms_a_step": round(1e3 * found, 3),
            "than_none": round(found / statistics.median(seconds["none"]), 3),
            "bytes_alone_ms": round(1e3 * (weights + cache_bytes) / (args.bandwidth * 1e12), 3),
        }
        print(json.dumps(row), flush=True)


def decoding(model: Decoder, args: argparse.Namespace) -> tuple[Callable[[], Any], int]:
    """What runs some steps, compiled, and the bytes of the cache."""
    graph, params = nnx.split(model)
    tokens = jnp.ones((args.batch, 1), jnp.int32)

    @jax.jit
    def empty(params):
        _, cache = nnx.merge(graph, params).prefill(
            tokens,
            jnp.full(args.batch, args.context - STEPS * (ROUNDS + 1), jnp.int32),
            args.context,
        )
        return cache

    @functools.partial(jax.jit, donate_argnames="cache")
    def steps(params, cache):
        def step(cache: KVCache, _):
            hidden, cache = nnx.merge(graph, params).extend(tokens, cache)
            return cache, hidden[0, 0, 0]

        return jax.lax.scan(step, cache, length=STEPS)

    cache, _ = steps(params, empty(params))

    def run() -> Any:
        nonlocal cache
        cache, features = steps(params, cache)
        return features

    return run, formats.device_bytes(cache.layers)


if __name__ == "__main__":
    main()
