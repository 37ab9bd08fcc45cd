# SPDX-License-Identifier: Apache-2.0
"""How long the device works on a function, and what it can do at best."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

_LEAST_REPEATS, _MOST_REPEATS = 3, 5
_REPEATED_SECONDS = 0.5  # within which so many are made: a slow product is repeated less often
_COLD_BYTES = 320e6  # operands that are rotated through: more than any cache holds
# At least so many, that what is computed once for all of them weighs little in each.
_LEAST_COPIES, _MOST_COPIES = 8, 64
_READ_BYTES, _SQUARE = 2**31, 8192  # of the two ceilings, on a GPU
_SMALL = 32  # a CPU measures them at so many times less

Program = Callable[[Any, Sequence[Any]], Any]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Microseconds of one call: kernels alone on a GPU, wall time elsewhere."""

    us: float  # median of the repeats
    spread_us: tuple[float, float]  # least and most of them


def copies_of(nbytes: int) -> int:
    """How many operands of a size keep the caches cold; small ones are let into them."""
    return min(_MOST_COPIES, max(_LEAST_COPIES, int(_COLD_BYTES / nbytes) + 1))


def compiled(
    function: Callable[[Any, Any], Any],
    shared: Any,
    operands: Sequence[Any],
    options: dict[str, Any] | None = None,
) -> Program:
    """One program of ``function(shared, operand)`` for one operand after the other.

    Each waits for the result of the one before: else XLA merges products that share their activations,
    and two weights go through one kernel. What a function computes from ``shared`` alone is computed once
    for all operands: of a product, the quantized activations. Threads may compile beside each other.

    Args:
      function: what is to be timed.
      shared: arrays, the same in all calls.
      operands: :func:`copies_of` them; all of one shape.
      options: of XLA's compiler, by flag.

    Raises:
      RuntimeError: the compiler refuses.
    """
    each = jax.jit(function)  # traced once for all operands

    def every(shared: Any, operands: Sequence[Any]) -> list[Any]:
        results = [each(shared, operands[0])]
        for operand in operands[1:]:
            # The result that went through the barrier is the one returned: XLA drops unused ones.
            operand, results[-1] = jax.lax.optimization_barrier((operand, results[-1]))
            results.append(each(shared, operand))
        return results

    return jax.jit(every).lower(shared, operands).compile(compiler_options=options)


def measure(program: Program, shared: Any, operands: Sequence[Any]) -> Timing:
    """Times a program, all operands in each repeat.

    Args:
      program: from :func:`compiled`.
      shared: as there.
      operands: as there.

    Raises:
      RuntimeError: CUPTI tells nothing, as when another profiler holds it.
    """
    _wall_seconds(program, shared, operands)  # loads it
    first = _wall_seconds(program, shared, operands)
    repeats = min(_MOST_REPEATS, max(_LEAST_REPEATS, int(_REPEATED_SECONDS / first)))
    if jax.default_backend() == "gpu":
        seconds = _kernel_seconds(program, shared, operands, repeats)
    else:
        seconds = [first, *(_wall_seconds(program, shared, operands) for _ in range(repeats - 1))]
    each = [1e6 * s / len(operands) for s in seconds]
    return Timing(us=statistics.median(each), spread_us=(min(each), max(each)))


def _wall_seconds(program: Program, shared: Any, operands: Sequence[Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(program(shared, operands))
    return time.perf_counter() - start


def _kernel_seconds(
    program: Program, shared: Any, operands: Sequence[Any], repeats: int
) -> list[float]:
    """By CUPTI: what the kernels of each repeat took, without the gaps between them."""
    from jax.experimental.mosaic.gpu import profiler  # noqa: PLC0415  there with CUDA alone

    # A compiled program is called as it is; anything else would be compiled anew, without its options.
    timed: Any = profiler.measure(program, aggregate=False, iterations=repeats)
    kernels = timed(shared, operands)[1]
    if kernels is None:
        raise RuntimeError("CUPTI has recorded no kernel; is another profiler running?")
    return [sum(milliseconds for _, milliseconds in repeat) / 1e3 for repeat in kernels]


def ceilings() -> dict[str, float]:
    """What bounds a product on this device: ``read_tb_per_s`` and ``bf16_tflops``."""
    return {"read_tb_per_s": _read_tb_per_s(), "bf16_tflops": _bf16_tflops()}


def _read_tb_per_s() -> float:
    """The most bytes that come from memory: a maximum over a large array, terabytes a second."""
    size = _READ_BYTES if jax.default_backend() == "gpu" else _READ_BYTES // _SMALL
    draw = jax.jit(lambda key: jax.random.bits(key, (size // 4,), jnp.uint32))
    arrays = [draw(key) for key in jax.random.split(jax.random.key(0), 2)]
    program = compiled(lambda _, array: jnp.max(array), None, arrays)
    return size / measure(program, None, arrays).us / 1e6


def _bf16_tflops() -> float:
    """The most arithmetic that XLA gets out of bfloat16: a large square product, random numbers."""
    n = _SQUARE if jax.default_backend() == "gpu" else _SQUARE // _SMALL
    keys = jax.random.split(jax.random.key(0), 3)
    x, *ws = (jax.random.normal(key, (n, n), jnp.bfloat16) for key in keys)
    return 2 * n**3 / measure(compiled(jnp.matmul, x, ws), x, ws).us / 1e6
