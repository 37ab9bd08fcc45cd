# SPDX-License-Identifier: Apache-2.0
"""Find the fastest configuration of the kernel for few tokens, for each kind of product and shape.

Two steps. Without a GPU, --prune compiles every way to cut a kind of product for an H200 and notes
which need no more registers than there are. On the GPU of this machine those are timed: each product in a
process of its own, under a time limit, so that a configuration that hangs costs that limit and nothing
else. The best of each product is printed as it comes, and the table is written that
`pallas_kernels/few_tokens.json` holds.

Example:
  python scripts/tune_few_tokens.py --prune fits.json
  python scripts/tune_few_tokens.py --fits fits.json --kinds int8:bfloat16 --seconds 20 --out table.json
"""

import argparse
import itertools
import json
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import profiler

import compile_for_hopper
from pallas_kernels import few_tokens, row_blocks
from pallas_kernels import few_tokens_product as products
from pallas_kernels.few_tokens_product import CHUNK, Config, Product
from pallas_kernels.operands import BITS

SHAPES = ((4096, 6144), (4096, 28672), (14336, 4096), (8192, 8192))  # (k, n)
KINDS = (
    "int4:bfloat16", "int8:bfloat16", "float8_e4m3fn:bfloat16", "int8:int8",
    "float8_e4m3fn:float8_e4m3fn", "int4:int8",
)  # fmt: skip
ROWS = (1, 2, 3, 4, 7, 8, 14)
SLICES = (1, 2, 4, 7, 8, 14, 16)
WARPS = range(4, 29)
CUTS = [(blocks, depth) for blocks in (1, 2, 3, 4) for depth in (1, 2, 4) if depth * blocks <= 4]
_ROTATED_BYTES = 320e6  # of weights, so that no run finds the last one's in the cache


def product_of(kind: str, m: int, k: int, n: int) -> Product:
    """The product of a kind, written as weights:tokens, that stands for it in the table."""
    weights, tokens = kind.split(":")
    return products.product_of({"weights": weights, "tokens": tokens, "m": m, "k": k, "n": n})


def candidates(product: Product, multiprocessors: int, fits: set[str] | None) -> list[Config]:
    """Configurations worth a try: those that fill the multiprocessors evenly and fit the registers."""
    row_blocks_each = -(-product.n // row_blocks.ROWS // multiprocessors)
    found = []
    for (blocks, depth), rows, slices in itertools.product(CUTS, ROWS, SLICES):
        config = Config(rows=rows, slices=slices, blocks=blocks, depth=depth)
        wide = rows * blocks
        even = row_blocks_each % wide == 0 or wide in (4, 8) and row_blocks_each > 8
        if not even or rows * slices not in WARPS or blocks * product.columns > 64:
            continue
        if product.k // CHUNK % (slices * depth) == 0:
            found.append(config)
    if fits is not None:
        found = [config for config in found if _class(product, config) in fits]
    # In an order of chance: where time runs out, what was not tried is of no one kind.
    return random.Random(0).sample(found, len(found))


def _class(product: Product, config: Config) -> str:
    """What decides how many registers a configuration needs and has."""
    kind = f"{product.weights}:{product.tokens}"
    return f"{kind} {product.columns} {config.blocks} {config.depth} {config.threads}"


def prune(kinds: Sequence[str], tokens: Sequence[int]) -> Iterator[str]:
    """Compiles one configuration of each class for an H200; gives those without spills, as they come."""
    for kind, columns in itertools.product(kinds, sorted({min(m, 32) for m in tokens})):
        cases = {}
        for (blocks, depth), warps in itertools.product(CUTS, range(4, max(WARPS) + 1, 4)):
            if blocks * columns > 64:
                continue
            config = Config(rows=1, slices=warps, blocks=blocks, depth=depth)
            k, n = 3 * CHUNK * warps * depth, 16 * row_blocks.ROWS * blocks
            product = product_of(kind, columns, k, n)
            cases[_class(product, config)] = vars(product) | {"config": vars(config)}
        reports = compile_for_hopper.reports(list(cases.values()))
        for name, report in zip(cases, reports, strict=True):
            if compile_for_hopper.NO_SPILL in report:
                yield name


def operands(product: Product) -> tuple[Any, list[Any], dict[str, Any]]:
    """Random tokens, as many arrays of codes as must be rotated, and the scales by argument."""
    m, k, n = product.m, product.k, product.n
    copies = max(3, int(8 * _ROTATED_BYTES / (n * k * BITS[product.weights])) + 1)
    keys = jax.random.split(jax.random.key(0), copies + 3)
    tail = (32, 4) if product.weights == "int4" else (2, 32, 4)
    # The exponents of 8-bit floats lose their highest bit: no NaN.
    mask = jnp.uint32(0xBFBFBFBF if product.weights == "float8_e4m3fn" else 0xFFFFFFFF)
    draw = jax.jit(lambda key: mask & jax.random.bits(key, (n // 16, k // 64, *tail), jnp.uint32))
    codes = [draw(key) for key in keys[3:]]
    x = jax.random.normal(keys[0], (m, k), jnp.float32)
    scale = jax.random.uniform(keys[1], (product.groups, n), jnp.float32, 0.01, 0.02)
    if product.has_half_tokens:
        return x.astype(product.tokens), codes, {
            "scale": row_blocks.tile_pairs(scale.astype(product.half))
        }  # fmt: skip
    token_scale = jax.random.uniform(keys[2], (m,), jnp.float32, 0.01, 0.02)
    wide = 40 * x if product.is_whole else x
    return wide.astype(product.tokens), codes, {"scale": scale[0], "token_scale": token_scale}


def measure(product: Product, configs: list[Config]) -> None:
    """Times configurations and prints a line of JSON for each: median and spread, in microseconds."""
    x, codes, scales = operands(product)
    some = slice(-64, None)  # row blocks that are checked: the last ones
    last = {
        name: array if name == "token_scale" else array[some]
        if product.has_half_tokens else array[16 * some.start :]
        for name, array in scales.items()
    }  # fmt: skip
    expected = few_tokens.few_tokens_reference(
        x, codes[0][some], **last, weights=product.weights, out_dtype=jnp.float32
    )
    for config in configs:

        @jax.jit
        def run(x, codes, scales, config=config):
            return few_tokens.few_tokens(
                x, codes, **scales, weights=product.weights, config=config, out_dtype=jnp.bfloat16
            )

        try:
            result = run(x, codes[0], scales)[:, -expected.shape[1] :].astype(jnp.float32)
            error = float(jnp.linalg.norm(result - expected) / jnp.linalg.norm(expected))
            every = lambda codes, run=run: [run(x, words, scales) for words in codes]  # noqa: E731
            measured: Any = profiler.measure(every, aggregate=False, iterations=3)(codes)
        except Exception as problem:  # a configuration that the compiler refuses is not a candidate
            print(json.dumps({"config": vars(config), "problem": str(problem)[:100]}), flush=True)
            continue
        us = [1e3 * ms for kernels in measured[1] for name, ms in kernels if "few_tokens" in name]
        line = {
            "weights": product.weights, "tokens": product.tokens, "m": product.m, "k": product.k,
            "n": product.n, "config": vars(config), "us": round(float(np.median(us)), 2),
            "spread_us": [round(min(us), 2), round(max(us), 2)], "error": error,
        }  # fmt: skip
        print(json.dumps(line), flush=True)


def _timed(command: list[str], seconds: int) -> list[dict[str, Any]]:
    """What a process that measures printed until it ended, or its time was over."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            out, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            out, _ = process.communicate()
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    return [line for line in lines if line.get("error", 1) < 0.01]


def main() -> None:
    """Prunes, or starts a process for each product and collects the best configurations."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--prune", type=Path, help="JSON file to write what fits the registers to")
    parser.add_argument("--fits", type=Path, help="that file, to read")
    parser.add_argument("--out", type=Path, help="JSON file to write the table to")
    parser.add_argument("--seconds", type=int, default=40, help="limit of a product (default 40)")
    parser.add_argument("--kinds", nargs="+", default=KINDS, metavar="WEIGHTS:TOKENS")
    parser.add_argument("--tokens", type=int, nargs="+", default=products.BUCKETS)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    fits = set(json.loads(args.fits.read_text())) if args.fits else None
    if args.one:
        kind, *shape = args.one
        product = product_of(kind, *map(int, shape))
        measure(product, candidates(product, jax.devices()[0].core_count, fits))
    elif args.prune:
        found = []
        for name in prune(args.kinds, args.tokens):
            print(name, flush=True)
            found.append(name)
        args.prune.write_text(json.dumps(found, indent=1) + "\n")
    elif args.out:
        _tune(args)
    else:
        parser.error("give --prune or --out")


def _tune(args: argparse.Namespace) -> None:
    best, device = [], _device_kind()
    for kind, (k, n), m in itertools.product(args.kinds, SHAPES, args.tokens):
        command = [sys.executable, __file__, "--one", kind, str(m), str(k), str(n)]
        timed = _timed(command + (["--fits", str(args.fits)] if args.fits else []), args.seconds)
        if not timed:
            print(f"nothing was timed for {kind} {m} x {k} x {n}", flush=True)
            continue
        best.append(min(timed, key=lambda line: line["us"]))
        print(len(timed), json.dumps(best[-1]), flush=True)
        # As it stands, in case that the whole does not come to its end.
        table = {"comment": f"scripts/tune_few_tokens.py, jax {jax.__version__}"}
        args.out.write_text(json.dumps(table | {"devices": {device: best}}, indent=1) + "\n")


def _device_kind() -> str:
    """Asked in a process of its own, so that this one does not hold the GPU."""
    program = "import jax; print(jax.devices()[0].device_kind)"
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.strip()


if __name__ == "__main__":
    main()
