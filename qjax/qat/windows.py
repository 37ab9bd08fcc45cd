# SPDX-License-Identifier: Apache-2.0
"""Which windows of the training text a step takes: a function of its number.

So any step can be the first of a process. Every window is seen once before one is seen twice; each
round has an order of its own.
"""

import functools

import numpy as np
from jaxtyping import Int


def batch(
    tokens: Int[np.ndarray, "n length"], step: int, size: int, seed: int
) -> Int[np.ndarray, "size length"]:
    """The windows of one step.

    Args:
      tokens: all windows.
      step: from 0.
      size: windows of a step; they may be more than there are.
      seed: of the order.

    Example:
      >>> tokens = np.arange(5)[:, None]
      >>> seen = np.concatenate([batch(tokens, step, 2, seed=0) for step in range(5)])
      >>> np.sort(seen[:5, 0]).tolist(), np.sort(seen[5:, 0]).tolist()
      ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])
    """
    numbers = range(step * size, (step + 1) * size)
    rows = [_order(len(tokens), n // len(tokens), seed)[n % len(tokens)] for n in numbers]
    return tokens[np.array(rows)]


@functools.lru_cache(maxsize=2)  # a step may end one round and begin the next
def _order(count: int, round_: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, round_]).permutation(count)
