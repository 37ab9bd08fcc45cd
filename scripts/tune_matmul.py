# SPDX-License-Identifier: Apache-2.0
"""Find the fastest kernel and configuration for each kind of product and shape, on this machine's GPU.

A product has a few candidates, which were best for some product once. They are compiled beside each other
and timed one after the other, in a process that is ended where it does not answer: a configuration that
hangs costs its own product and nothing else. The assembler is asked about the fastest ones, if it is at
hand: those that spill registers are passed over. The best of each product is printed as it comes, and the
table is written that `pallas_kernels/tuned.json` holds.

Example:
  python scripts/tune_matmul.py --kinds int4:bfloat16:128 --tokens 8 256 --into pallas_kernels/tuned.json
"""

import argparse
import dataclasses
import datetime
import functools
import itertools
import json
import multiprocessing
import queue
import time
from collections.abc import Iterator, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import profiler

import compile_for_hopper
from pallas_kernels import configs, few_tokens, many_tokens, row_blocks
from pallas_kernels.configs import Config
from pallas_kernels.device import MULTIPROCESSORS
from pallas_kernels.operands import BITS, Weights
from pallas_kernels.product import BLOCK, Product
from pallas_kernels.quantized_matmul import quantized_matmul, quantized_matmul_reference

SHAPES = ((4096, 6144), (4096, 28672), (14336, 4096), (8192, 8192))  # (k, n)
KINDS = (  # weights:tokens, and :group where there are any
    "int4:bfloat16:128", "int8:bfloat16:128", "float8_e4m3fn:bfloat16:128", "int8:int8", "int4:int8",
    "float8_e4m3fn:float8_e4m3fn", "float8_e4m3fn:float8_e4m3fn:128", "int4:float8_e4m3fn:128",
)  # fmt: skip

# (rows, slices, blocks, depth) of few tokens.
FEW = (
    (1, 4, 1, 4), (7, 4, 1, 4), (1, 4, 1, 1), (7, 1, 2, 1), (1, 8, 1, 2), (7, 4, 1, 2), (7, 2, 2, 1),
    (4, 2, 2, 1), (2, 8, 1, 2), (1, 4, 2, 1), (1, 8, 2, 1), (2, 7, 1, 1), (2, 14, 1, 4), (14, 2, 1, 1),
    (14, 1, 1, 1), (1, 16, 2, 1), (1, 8, 1, 1), (2, 8, 1, 1), (2, 8, 2, 1), (3, 4, 1, 4), (3, 8, 1, 1),
    (4, 4, 1, 1), (4, 4, 1, 8), (1, 16, 1, 1), (1, 4, 1, 2),
)  # fmt: skip
# Besides, where chunks move up.
QUEUES = (
    (14, 2, 1, 2), (14, 2, 1, 3), (1, 16, 2, 2), (2, 8, 2, 2), (1, 4, 1, 2), (1, 4, 2, 2), (3, 8, 1, 2),
    (4, 4, 1, 2), (2, 8, 1, 2), (1, 8, 1, 2),
)  # fmt: skip
# (rows, slices, fragments, tokens, span, stages) of many tokens, where they are few and codes are
# multiplied as they lie.
AS_THEY_LIE = ((1, 1, 1, 16, 1, 4), (2, 1, 1, 16, 1, 4), (1, 1, 1, 32, 1, 4))
# The same, up to so many tokens.
MANY = {
    64: (
        (2, 1, 1, 64, 2, 4), (1, 2, 1, 64, 2, 4), (1, 4, 1, 32, 2, 4), (4, 1, 1, 64, 2, 4),
        (1, 4, 1, 64, 1, 4), (1, 1, 2, 64, 2, 4), (2, 1, 2, 64, 2, 4), (1, 4, 1, 32, 1, 4),
    ),
    256: (
        (2, 1, 1, 256, 1, 4), (1, 2, 1, 256, 1, 3), (1, 4, 1, 128, 1, 3), (2, 2, 1, 128, 1, 3),
        (1, 2, 1, 128, 2, 3), (4, 1, 1, 128, 1, 4), (1, 4, 1, 64, 1, 4),
    ),
    4096: ((4, 1, 1, 128, 1, 4),),
}  # fmt: skip
# Besides those with 8-bit tokens, of which a step has more; alone where groups have sums of their own.
SHORT_STEPS = {
    64: (
        (2, 1, 1, 64, 1, 4), (1, 1, 1, 64, 1, 4), (4, 1, 1, 64, 1, 4), (1, 2, 1, 64, 1, 4),
        (1, 4, 1, 32, 1, 4), (1, 1, 2, 64, 1, 4), (1, 4, 1, 64, 1, 3), (1, 2, 1, 64, 1, 6),
    ),
    256: (
        (2, 1, 1, 128, 1, 4), (1, 1, 1, 128, 1, 4), (1, 2, 1, 128, 1, 3), (2, 1, 1, 128, 1, 6),
        (1, 2, 1, 64, 1, 4), (1, 4, 1, 64, 1, 3),
    ),
    4096: ((4, 1, 1, 64, 1, 4),),
}  # fmt: skip
# Besides, with a loader.
LOADED = {
    64: ((2, 1, 1, 64, 2, 4), (2, 1, 1, 64, 1, 6), (2, 1, 1, 64, 1, 8)),
    256: ((2, 1, 1, 128, 1, 6), (2, 1, 1, 128, 1, 4), (2, 1, 1, 256, 1, 4), (2, 1, 1, 64, 1, 6)),
    4096: (
        (2, 1, 1, 256, 1, 4), (2, 1, 2, 128, 1, 4), (2, 1, 1, 128, 1, 6), (2, 1, 1, 128, 1, 4),
        (3, 1, 1, 128, 1, 4),
    ),
}  # fmt: skip

_KEY = ("weights", "tokens", "group_size", "m", "k", "n")  # what an entry is found by
_ROTATED_BYTES = 320e6  # of weights, so that no run finds the last one's in the cache
_COMPILERS = 8  # threads
_ASKED = 4  # configurations that the assembler is asked about at once
_START_SECONDS = 120  # until a process has its GPU
_GRACE_SECONDS = 20  # after which a process hangs that should have answered


def product_of(kind: str, m: int, k: int, n: int) -> Product:
    """The product of a kind, written as in `KINDS`."""
    weights, tokens, *group = kind.split(":")
    group_size = int(group[0]) if group else None
    return configs.product_of(
        {"weights": weights, "tokens": tokens, "group_size": group_size, "m": m, "k": k, "n": n}
    )


def candidates(product: Product, known: Sequence[Config] = ()) -> list[Config]:
    """Configurations worth a try that fit, each once, those that are known first."""
    few: list[Config] = [
        few_tokens.Config(rows=rows, slices=slices, blocks=blocks, depth=depth, queue=queue)
        for queue, some in ((False, FEW), (True, QUEUES))
        for rows, slices, blocks, depth in some
    ]
    bucket = next(bucket for bucket in MANY if product.m <= bucket or bucket == max(MANY))
    cuts = () if product.has_group_sums else MANY[bucket]
    cuts += () if product.has_half_tokens else SHORT_STEPS[bucket]
    if product.m <= configs.FEW:
        few += _many(AS_THEY_LIE if product.weights == product.tokens else ())
    many = _many(cuts) + _many(LOADED[bucket], loader=True)
    by_turns = [
        dataclasses.replace(config, resident=MULTIPROCESSORS)
        for config in many
        if product.m > 64 and config.slices == 1 and _tiles(product, config) > MULTIPROCESSORS
    ]
    by_parts = [
        dataclasses.replace(config, parts=parts)
        for config in many
        if config.slices == 1 and (parts := _parts(product, config)) > 1
    ]
    tried = [
        configs.default_config(product),
        *(many + by_turns + by_parts if product.m > configs.FEW else few),
    ]
    tried = [*known, *tried]
    return [config for config in dict.fromkeys(tried) if _fits(product, config)]


def _many(cuts: Sequence[tuple[int, ...]], *, loader: bool = False) -> list[many_tokens.Config]:
    return [
        many_tokens.Config(
            rows=rows, slices=slices, fragments=fragments, tokens=tokens, span=span, stages=stages,
            loader=loader,
        )
        for rows, slices, fragments, tokens, span, stages in cuts
    ]  # fmt: skip


def _tiles(product: Product, config: many_tokens.Config) -> int:
    return -(-product.n // config.outputs) * -(-product.m // config.tokens)


def _parts(product: Product, config: many_tokens.Config) -> int:
    """Parts of the inputs, a power of two, that keep most multiprocessors busy."""
    return 1 << max(0, (MULTIPROCESSORS // _tiles(product, config)).bit_length() - 1)


def _fits(product: Product, config: Config) -> bool:
    try:
        configs.kernel_of(config).check(product, config)
    except ValueError:
        return False
    return True


def program(product: Product, config: Config) -> Any:
    """The products of all arrays of codes: of tokens, those arrays, and the scales by argument."""

    @jax.jit
    def multiply(x: jax.Array, codes: jax.Array, scales: dict[str, Any]) -> jax.Array:
        return quantized_matmul(
            x, codes, **scales, weights=product.weights, config=config, out_dtype=jnp.bfloat16
        )

    def every(x: jax.Array, codes: list[jax.Array], scales: dict[str, Any]) -> list[jax.Array]:
        return [multiply(x, words, scales) for words in codes]

    return jax.jit(every)


@functools.lru_cache(maxsize=1)
def codes_of(weights: Weights, k: int, n: int) -> list[jax.Array]:
    """As many random arrays of codes as must be rotated."""
    copies = max(3, int(8 * _ROTATED_BYTES / (n * k * BITS[weights])) + 1)
    tail = (32, 4) if weights == "int4" else (2, 32, 4)
    # The exponents of 8-bit floats lose their highest bit: no NaN.
    mask = jnp.uint32(0xBFBFBFBF if weights == "float8_e4m3fn" else 0xFFFFFFFF)
    draw = jax.jit(lambda key: mask & jax.random.bits(key, (n // 16, k // 64, *tail), jnp.uint32))
    return [draw(key) for key in jax.random.split(jax.random.key(0), copies)]


def tokens_and_scales(product: Product) -> tuple[jax.Array, dict[str, Any]]:
    """Random tokens, and the scales by argument."""
    keys = jax.random.split(jax.random.key(1), 3)

    def scales(key: jax.Array, *shape: int) -> jax.Array:
        return jax.random.uniform(key, shape, jnp.float32, 0.01, 0.02)

    x = jax.random.normal(keys[0], (product.m, product.k), jnp.float32)
    x = (40 * x if product.is_whole else x).astype(product.tokens)
    if product.has_blocks:
        blocks = product.k // BLOCK, -(-product.n // BLOCK)
        token_scale = scales(keys[2], product.m, blocks[0])
        return x, {"scale": scales(keys[1], *blocks), "token_scale": token_scale}
    scale = scales(keys[1], product.groups, product.n)
    if product.has_pairs:
        scale = row_blocks.tile_pairs(scale.astype(product.pair))
    if product.has_half_tokens:
        return x, {"scale": scale}
    scale = scale if product.has_pairs else scale[0]
    return x, {"scale": scale, "token_scale": scales(keys[2], product.m)}


def measure(product: Product, known: Sequence[Config], seconds: float) -> Iterator[dict[str, Any]]:
    """Entries of the table for all candidates that were compiled in time and are right."""
    end = time.monotonic() + seconds
    codes = codes_of(product.weights, product.k, product.n)
    x, scales = tokens_and_scales(product)
    expected = _last_outputs(product, x, codes[0], scales)
    pool = futures.ThreadPoolExecutor(_COMPILERS)
    compiled = {
        config: pool.submit(lambda run: run.lower(x, codes, scales).compile(), program(product, config))
        for config in candidates(product, known)
    }  # fmt: skip
    futures.wait(compiled.values(), timeout=end - time.monotonic())
    pool.shutdown(wait=False, cancel_futures=True)
    for config, run in compiled.items():
        if not run.done() or run.cancelled():
            print(f"{config} was not compiled in time", flush=True)
        elif problem := run.exception():  # what the compiler refuses is not a candidate
            print(config, str(problem)[:200], flush=True)
        else:
            results, us = _measured(run.result(), x, codes, scales)
            last = results[0][:, -expected.shape[1] :].astype(jnp.float32)
            error = float(jnp.linalg.norm(last - expected) / jnp.linalg.norm(expected))
            if error < 0.01:
                yield _entry(product, config, us)
            else:
                print(f"{config} is wrong: relative error {error}", flush=True)


def _last_outputs(
    product: Product, x: jax.Array, codes: jax.Array, scales: dict[str, Any]
) -> jax.Array:
    """What the outputs of the last 64 row blocks must be."""
    scale, outputs = scales["scale"], 64 * row_blocks.ROWS
    last = scale[-64:] if product.has_pairs else scale[..., -outputs:]
    last = scale[:, -outputs // BLOCK :] if product.has_blocks else last
    return quantized_matmul_reference(
        x, codes[-64:], **scales | {"scale": last}, weights=product.weights, out_dtype=jnp.float32
    )


def _measured(run: Any, *arrays: Any) -> tuple[list[jax.Array], list[float]]:
    """Results, and the microseconds of a product in each repeat, as the profiler of the GPU has them.

    All its kernels count: some configurations leave sums for another one to add up.
    """
    results, timings = profiler.measure(run, aggregate=False, iterations=5)(*arrays)
    return results, [
        1e3 * sum(milliseconds for _, milliseconds in kernels) / len(results)
        for kernels in timings or []
    ]


def _entry(product: Product, config: Config, us: Sequence[float]) -> dict[str, Any]:
    """Of the table: median and spread, in microseconds."""
    kernel = configs.kernel_of(config).__name__.rpartition(".")[2]
    return _key(product) | {
        "kernel": kernel, "config": vars(config), "us": round(float(np.median(us)), 2),
        "spread_us": [round(min(us), 2), round(max(us), 2)],
    }  # fmt: skip


def _key(product: Product) -> dict[str, Any]:
    """What an entry of the table is found by."""
    return {name: getattr(product, name) for name in _KEY}


def _work(products: list[Product], known: dict[str, Any], seconds: float, results: Any) -> None:
    """A process of its own: names its device, then gives entries, and None after each product."""
    device = jax.devices()[0].device_kind
    results.put(device)
    for product in products:
        same = [
            configs.config_of(entry)
            for entry in known.get(device, [])
            if _key(product).items() <= entry.items()
        ]
        for entry in measure(product, same, seconds):
            results.put(entry)
        results.put(None)


def tune(products: list[Product], args: argparse.Namespace) -> None:
    """Prints the best of each product, and writes the table after each."""
    context = multiprocessing.get_context("spawn")  # this process must not hold the GPU
    devices = json.loads(args.into.read_text())["devices"] if args.into else {}
    while products:
        results = context.Queue()
        process = context.Process(target=_work, args=(products, devices, args.seconds, results))
        process.start()
        device = results.get(timeout=_START_SECONDS)
        while products:
            entries, ended = _entries(process, results, 2 * args.seconds + _GRACE_SECONDS)
            product = products.pop(0)
            if best := _best(product, entries):
                print(len(entries), json.dumps(best), flush=True)
                devices[device] = merged(devices.get(device, []), best)
                args.out.write_text(table(devices))
            else:
                print(f"nothing was found for {product}", flush=True)
            if not ended:
                print(f"no answer after those {len(entries)}", flush=True)
                break
        process.kill()
        process.join()


def _entries(process: Any, results: Any, patience: float) -> tuple[list[dict[str, Any]], bool]:
    """What comes for a product, and whether it came to its end: else the process died or hangs."""
    entries, end = [], time.monotonic() + patience
    while time.monotonic() < end:
        try:
            entry = results.get(timeout=1)
        except queue.Empty:
            if not process.is_alive():
                break
            continue
        if entry is None:
            return entries, True
        entries.append(entry)
    return entries, False


def _best(product: Product, entries: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The fastest one that the assembler has nothing to say against, if it can be asked."""
    entries = sorted(entries, key=lambda entry: entry["us"])
    if compile_for_hopper.why_not() is not None:
        return next(iter(entries), None)
    for first in range(0, len(entries), _ASKED):
        some = entries[first : first + _ASKED]
        cases = [
            vars(product) | {"kernel": entry["kernel"], "config": entry["config"]} for entry in some
        ]
        try:
            reports = compile_for_hopper.reports(cases)
        except RuntimeError as problem:  # what the GPU computes, it is no reason to end here
            print(f"the assembler was not asked: {str(problem)[-200:]}", flush=True)
            return entries[0]
        for entry, report in zip(some, reports, strict=True):
            if compile_for_hopper.is_clean(report):
                return entry
            print(f"{entry['config']} spills or waits, at {entry['us']} us", flush=True)
    return None


def merged(entries: list[dict[str, Any]], best: dict[str, Any]) -> list[dict[str, Any]]:
    """Entries with another one, in the place of that of the same product if there is one."""
    keys = [[entry[name] for name in _KEY] for entry in entries]
    key = [best[name] for name in _KEY]
    place = keys.index(key) if key in keys else len(entries)
    return [*entries[:place], best, *entries[place + 1 :]]


def table(devices: dict[str, list[dict[str, Any]]]) -> str:
    """JSON, with a line for each entry."""
    comment = f"scripts/tune_matmul.py, jax {jax.__version__}, {datetime.date.today()}"
    parts = [
        f"    {json.dumps(device)}: [\n      "
        + ",\n      ".join(map(json.dumps, entries))
        + "\n    ]"
        for device, entries in devices.items()
    ]
    return (
        f'{{\n  "comment": {json.dumps(comment)},\n  "devices": {{\n'
        + ",\n".join(parts)
        + "\n  }\n}\n"
    )


def main() -> None:
    """Tunes what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--kinds", nargs="+", default=KINDS, choices=KINDS, metavar="WEIGHTS:TOKENS[:GROUP]"
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=configs.BUCKETS)
    parser.add_argument("--shapes", type=int, nargs="+", metavar="K N")
    parser.add_argument("--seconds", type=float, default=12, help="of a product (default 12)")
    parser.add_argument("--into", type=Path, help="table that the results are merged into")
    parser.add_argument("--out", type=Path, help="where to write it (default: --into)")
    args = parser.parse_args()
    args.out = args.out or args.into
    if args.out is None or len(args.shapes or []) % 2:
        parser.error("give --out or --into, and shapes as pairs of k and n")
    shapes = list(zip(args.shapes[::2], args.shapes[1::2], strict=True)) if args.shapes else SHAPES
    products = [
        product_of(kind, m, k, n)
        for kind, (k, n), m in itertools.product(args.kinds, shapes, args.tokens)
    ]
    tune(products, args)


if __name__ == "__main__":
    main()
