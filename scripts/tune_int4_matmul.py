# SPDX-License-Identifier: Apache-2.0
"""Find the fastest configuration of the int4 kernel for each product, on the GPU of this machine.

Each product has a process of its own, under a time limit: a configuration that hangs costs that limit
and nothing else. Prints the best of each product as it comes, and writes the table that
`pallas_kernels/int4_matmul.json` holds.

Example:
  python scripts/tune_int4_matmul.py --out int4_matmul.json --seconds 20
"""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import profiler

from pallas_kernels import int4_matmul, row_blocks
from pallas_kernels.int4_matmul import CHUNK, Config, Product

SHAPES = ((4096, 6144), (4096, 28672), (14336, 4096), (8192, 8192))  # (k, n) of the table
TOKENS = int4_matmul.BUCKETS
_ROTATED_BYTES = 320e6  # of weights, so that no run finds the last one's in the cache


def candidates(product: Product, multiprocessors: int) -> list[Config]:
    """Configurations worth a try: those that fill the multiprocessors evenly."""
    row_blocks_each = -(-product.n // row_blocks.ROWS // multiprocessors)
    chunks = product.k // CHUNK
    found = []
    for blocks in (1, 2, 3, 4):
        for rows in (1, 2, 3, 4, 7, 8, 14):
            for slices in (1, 2, 4, 7, 8, 14, 16):
                warps = rows * slices
                wide = rows * blocks
                even = row_blocks_each % wide == 0 or wide in (4, 8) and row_blocks_each > 8
                if not even or not 4 <= warps <= 28 or blocks * product.tokens > 64:
                    continue
                for depth in (1, 2, 4):
                    if chunks % (slices * depth) == 0 and depth * blocks <= 4:
                        found.append(Config(rows=rows, slices=slices, blocks=blocks, depth=depth))
    # In an order of chance: where time runs out, what was not tried is of no one kind.
    return random.Random(0).sample(found, len(found))


def measure(product: Product, configs: list[Config]) -> None:
    """Times configurations and prints a line of JSON for each: median and spread, in microseconds."""
    k, n, groups = product.k, product.n, product.groups
    copies = max(3, int(_ROTATED_BYTES / (n * k / 2)) + 1)
    keys = jax.random.split(jax.random.key(0), copies + 2)
    draw = jax.jit(lambda key: jax.random.bits(key, (n // 16, k // 64, 32, 4), jnp.uint32))
    weights = [draw(key) for key in keys[:copies]]
    scale = jax.random.uniform(keys[-1], (groups, n), jnp.float32, 0.01, 0.02)
    pairs = row_blocks.tile_pairs(scale.astype(product.half))
    x = jax.random.normal(keys[-2], (product.m, k), product.half)
    some = slice(-64, None)  # row blocks that are checked: the last ones
    expected = int4_matmul.int4_matmul_reference(
        x, weights[0][some], pairs[some], out_dtype=jnp.float32
    )
    for config in configs:

        @jax.jit
        def run(x, words, pairs, config=config):
            return int4_matmul.int4_matmul(x, words, pairs, config=config)

        try:
            result = run(x, weights[0], pairs)[:, -expected.shape[1] :].astype(jnp.float32)
            error = float(jnp.linalg.norm(result - expected) / jnp.linalg.norm(expected))
            every = lambda weights, run=run: [run(x, words, pairs) for words in weights]  # noqa: E731
            measured: Any = profiler.measure(every, aggregate=False, iterations=3)(weights)
        except Exception as problem:  # a configuration that the compiler refuses is not a candidate
            print(json.dumps({"config": vars(config), "problem": str(problem)[:100]}), flush=True)
            continue
        us = [1e3 * ms for kernels in measured[1] for name, ms in kernels if "int4_matmul" in name]
        line = {
            "m": product.m, "k": k, "n": n, "config": vars(config), "us": float(np.median(us)),
            "spread_us": [min(us), max(us)], "error": error,
        }  # fmt: skip
        print(json.dumps(line), flush=True)


def main() -> None:
    """Starts a process for each product; collects the best configurations."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--seconds", type=int, default=40, help="limit of a product (default 40)")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--one", type=int, nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        m, k, n = args.one
        product = Product(m=m, k=k, n=n, group_size=128, half="bfloat16", has_zeros=False)
        measure(product, candidates(product, jax.devices()[0].core_count))
        return
    best = []
    for k, n in SHAPES:
        for m in args.tokens:
            command = [sys.executable, __file__, "--out", "-", "--one", str(m), str(k), str(n)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
                try:
                    out, _ = process.communicate(timeout=args.seconds)
                except subprocess.TimeoutExpired:
                    process.kill()
                    out, _ = process.communicate()
            lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
            timed = [line for line in lines if line.get("error", 1) < 0.01]
            if timed:
                best.append(min(timed, key=lambda line: line["us"]))
                print(len(timed), json.dumps(best[-1]), flush=True)
    table = {"comment": f"scripts/tune_int4_matmul.py, jax {jax.__version__}"}
    args.out.write_text(json.dumps(table | {"devices": {_device_kind(): best}}, indent=1) + "\n")


def _device_kind() -> str:
    """Asked in a process of its own, so that this one does not hold the GPU."""
    program = "import jax; print(jax.devices()[0].device_kind)"
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.strip()


if __name__ == "__main__":
    main()
