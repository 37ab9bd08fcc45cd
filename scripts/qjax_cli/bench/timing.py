# SPDX-License-Identifier: Apache-2.0
"""How long the device works on a function, and what it can do at best."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

_REPEATS = 5
_COLD_BYTES = 320e6  # operands that are rotated through: more than any cache holds
_MOST_COPIES = 64
_READ_BYTES, _SQUARE = 2**31, 8192  # of the two ceilings, on a GPU
_SMALL = 32  # a CPU measures them at so many times less


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Microseconds of one call: kernels alone on a GPU, wall time elsewhere."""

    us: float  # median of the repeats
    spread_us: tuple[float, float]  # least and most of them


def copies_of(nbytes: int) -> int:
    """How many operands of a size keep the caches cold; small ones are let into them."""
    return min(_MOST_COPIES, max(2, int(_COLD_BYTES / nbytes) + 1))


def measure(function: Callable[..., Any], operands: Sequence[Any]) -> Timing:
    """Times a compiled function on one operand after the other, all of them in each repeat.

    Args:
      function: compiled, of one operand.
      operands: :func:`copies_of` them; all of one shape.
    """

    def every(operands: Sequence[Any]) -> list[Any]:
        return [function(operand) for operand in operands]

    time_them = _kernel_seconds if jax.default_backend() == "gpu" else _wall_seconds
    seconds = time_them(every, operands)
    each = [1e6 * s / len(operands) for s in seconds]
    return Timing(us=statistics.median(each), spread_us=(min(each), max(each)))


def _wall_seconds(run: Callable[..., Any], operands: Sequence[Any]) -> list[float]:
    seconds = []
    jax.block_until_ready(run(operands))
    for _ in range(_REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(run(operands))
        seconds.append(time.perf_counter() - start)
    return seconds


def _kernel_seconds(run: Callable[..., Any], operands: Sequence[Any]) -> list[float]:
    """By CUPTI: what the kernels took, without the gaps between them.

    Raises:
      RuntimeError: CUPTI tells nothing, as when another profiler holds it.
    """
    from jax.experimental.mosaic.gpu import profiler  # noqa: PLC0415  there with CUDA alone

    measured: Any = profiler.measure(run, aggregate=False, iterations=_REPEATS)(list(operands))
    if measured[1] is None:
        raise RuntimeError("CUPTI has recorded no kernel; is another profiler running?")
    return [sum(milliseconds for _, milliseconds in kernels) / 1e3 for kernels in measured[1]]


def read_tb_per_s() -> float:
    """The most bytes that come from memory: a sum over a large array, terabytes a second."""
    size = _READ_BYTES if jax.default_backend() == "gpu" else _READ_BYTES // _SMALL
    draw = jax.jit(lambda key: jax.random.bits(key, (size // 4,), jnp.uint32))
    arrays = [draw(key) for key in jax.random.split(jax.random.key(0), 2)]
    return size / measure(jax.jit(jnp.max), arrays).us / 1e6


def bf16_tflops() -> float:
    """The most arithmetic that XLA gets out of bfloat16: a large square product, random numbers."""
    n = _SQUARE if jax.default_backend() == "gpu" else _SQUARE // _SMALL
    keys = jax.random.split(jax.random.key(0), 3)
    x, *ws = (jax.random.normal(key, (n, n), jnp.bfloat16) for key in keys)
    return 2 * n**3 / measure(jax.jit(lambda w: x @ w), ws).us / 1e6
