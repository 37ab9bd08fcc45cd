# SPDX-License-Identifier: Apache-2.0
"""How fast GPTQ runs: its solver alone, or a whole model of random weights.

    python scripts/benchmarks/gptq_speed.py solver
    python scripts/benchmarks/gptq_speed.py model --layers 32 --samples 128 --length 2048

``solver``: a Hessian's factor and the codes of one weight, w4a16-g128 with act-order, for the shapes of
an 8-billion Llama. ``model``: `qjax.quantize_sequentially` of such a Llama in bfloat16, from weights and
tokens that lie in memory to the last QTensor; seconds in which something was traced or compiled, those of
each program (several at once in threads beside the first one), and where the rest went.
Prints one JSON object a line, as it is measured.
"""

import argparse
import datetime
import json
import statistics
import threading
import time
from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import qjax
from qjax.algorithms import gptq
from qjax_models import Decoder, DecoderConfig
from qjax_models.chain import blockwise

SHAPES = ((4096, 4096), (4096, 6144), (4096, 14336), (14336, 4096))  # inputs, outputs
_COMPILED = "/jax/core/compile/"  # what JAX calls the durations of tracing, lowering and compiling


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("solver", "model"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    device = f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {datetime.date.today()}"
    print(json.dumps({"device": device}), flush=True)
    if args.what == "solver":
        for k, n in SHAPES:
            print(json.dumps(solver(k, n, args.repeats)), flush=True)
    else:
        print(json.dumps(model(args)), flush=True)


def solver(k: int, n: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of the factor and of all, medians after one run that compiles."""
    keys = jax.random.split(jax.random.key(0), 2)
    # Rows of a spectrum that decays, so that the factor is no identity.
    x = jax.random.normal(keys[0], (2 * k, k)) * jnp.linspace(0.05, 1, k)
    hessian = jnp.matmul(x.T, x, precision="highest")
    w = (0.02 * jax.random.normal(keys[1], (k, n))).astype(jnp.bfloat16)

    def factored() -> gptq.Factor:
        return jax.block_until_ready(gptq.factor(hessian, group_size=128))

    def solved() -> Any:
        return jax.block_until_ready(gptq.quantize(w, "w4a16-g128", factored()))

    return {
        "k": k, "n": n, "factor_ms": _median_ms(factored, repeats), "all_ms": _median_ms(solved, repeats),
    }  # fmt: skip


def _median_ms(function: Any, repeats: int) -> float:
    seconds = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return round(1e3 * statistics.median(seconds[1:]), 2)


def model(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the whole, of compilation, and of the layers of each kind."""
    config = DecoderConfig(
        vocab_size=128256, hidden_size=4096, mlp_size=14336, num_layers=args.layers, num_heads=32,
        num_kv_heads=8, head_size=128, max_positions=8192,
    )  # fmt: skip
    decoder = Decoder(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    jax.block_until_ready(nnx.state(decoder))
    shape = args.samples, args.length
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, shape, np.int32)
    spans: list[tuple[float, float]] = []
    programs: dict[str, float] = defaultdict(float)

    def listen(event: str, duration_secs: float, **of: str | int) -> None:
        if not event.startswith(_COMPILED):
            return
        spans.append((time.perf_counter() - duration_secs, time.perf_counter()))
        thread = "here" if threading.current_thread() is threading.main_thread() else "beside"
        if event.endswith("backend_compile_duration"):
            programs[f"{of.get('fun_name')} {thread}"] += duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    start = time.perf_counter()
    steps = []

    def on_step(what: str) -> None:
        steps.append(time.perf_counter() - start)
        print(f"{steps[-1]:7.1f} s  {what}", flush=True)

    quantized, report = qjax.quantize_sequentially(
        decoder, blockwise, tokens, "w4a16-g128", method="gptq", batch_size=args.batch,
        on_step=on_step,
    )  # fmt: skip
    jax.block_until_ready(nnx.state(quantized))
    total = time.perf_counter() - start
    solving: dict[str, float] = defaultdict(float)
    for layer in report.quantized:
        solving[layer.path.rpartition("/")[2]] += layer.seconds
    return {
        "layers": args.layers, "tokens": list(shape), "seconds": round(total, 1),
        "compiling": round(_covered(spans), 1),
        "programs": {name: round(s, 1) for name, s in programs.items() if s >= 0.5},
        "solving": {name: round(s, 1) for name, s in solving.items()},
    }  # fmt: skip


def _covered(spans: list[tuple[float, float]]) -> float:
    """Seconds within one span or several; those of threads lie beside each other."""
    covered, reached = 0.0, 0.0
    for start, end in sorted(spans):
        covered += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return covered


if __name__ == "__main__":
    main()
