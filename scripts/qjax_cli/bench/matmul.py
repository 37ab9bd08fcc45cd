# SPDX-License-Identifier: Apache-2.0
"""Times products of activations with weights in a scheme, through one implementation."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp

import qjax
from qjax import kernel_products, qtensor
from qjax_cli.bench import timing

PLAIN = "bfloat16"  # the scheme of weights that are not quantized
NUMBERS = (((1,), (0,)), ((), ()))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One product: ``x [m, k] . w [k, n]``."""

    scheme: str
    implementation: str  # "xla" or "pallas"
    m: int
    k: int
    n: int
    us: float
    spread_us: tuple[float, float]
    tb_per_s: float  # weights read, with their scales
    tflops: float


def rows(
    schemes: Sequence[str], tokens: Sequence[int], shapes: Sequence[tuple[int, int]]
) -> Iterator[Row]:
    """Times every scheme through every implementation that takes it here.

    Args:
      schemes: names; `PLAIN` stands for bfloat16 itself.
      tokens: rows of the activations.
      shapes: ``(k, n)`` of the weights.
    """
    for k, n in shapes:
        for scheme in schemes:
            weights = _weights(scheme, k, n)
            arranged = [qjax.prepare(w) for w in weights]
            for m in tokens:
                x = jax.random.normal(jax.random.key(m), (m, k), jnp.bfloat16)
                yield _row(scheme, "xla", x, weights)
                if kernel_products.why_not(x, arranged[0], NUMBERS) is None:
                    yield _row(scheme, "pallas", x, arranged)


def as_json(row: Row) -> dict[str, Any]:
    """The row as plain JSON types."""
    return asdict(row) | {"spread_us": list(row.spread_us)}


def _weights(scheme: str, k: int, n: int) -> list[Any]:
    """Random weights, so many that no product finds the last one's in the cache."""

    @jax.jit
    def draw(key: jax.Array) -> Any:
        w = jax.random.normal(key, (k, n), jnp.bfloat16) * 0.02
        return w if scheme == PLAIN else qjax.quantize(w, scheme)

    nbytes = qtensor.device_bytes(jax.eval_shape(draw, jax.random.key(0)))
    return [draw(key) for key in jax.random.split(jax.random.key(0), timing.copies_of(nbytes))]


def _row(scheme: str, implementation: Any, x: jax.Array, weights: list[Any]) -> Row:
    product = jax.jit(functools.partial(qjax.matmul, implementation=implementation))
    took = timing.measure(lambda w: product(x, w), weights)
    (m, k), n = x.shape, weights[0].shape[1]
    return Row(
        scheme=scheme, implementation=implementation, m=m, k=k, n=n,
        us=took.us, spread_us=took.spread_us,
        tb_per_s=qtensor.device_bytes(weights[0]) / took.us / 1e6,
        tflops=2 * m * k * n / took.us / 1e6,
    )  # fmt: skip
