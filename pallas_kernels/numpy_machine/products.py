# SPDX-License-Identifier: Apache-2.0
"""What tensor cores multiply, with numpy: the products of :mod:`pallas_kernels.numpy_machine`.

Fragments lie as PTX has them for ``mma.m16n8k16``, ``mma.m16n8k32`` and ``wgmma``: lane ``4 g + q`` of a
warp holds parts of rows g and g + 8, and of the sums those of columns 2 q and 2 q + 1 of each eight. A
word holds ``run`` neighbours along the axis that is summed over: 2 halves or 4 bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pallas_kernels.machine import Operand
from pallas_kernels.numpy_machine.words import Words


@dataclass(frozen=True)
class Pending:
    """A sum that is under way: no number until it is waited for."""

    value: Any


def of_warps(
    thread: Words, a: Sequence[np.ndarray], b: Sequence[np.ndarray], c: Sequence[Any], dtype: Any
) -> list[Any]:
    """``A . B + C`` of each warp: 16 rows, 8 columns.

    Args:
      thread: the threads' numbers.
      a: four words of each thread, apart into their numbers along a last axis.
      b: two words, likewise.
      c: four sums of each thread.
      dtype: in which products are added up.
    """
    warp, g, quad = _places(thread)
    warps, run = len(thread) // 32, a[0].shape[-1]
    left = rows_of(thread, a)
    right = np.empty((warps, 8 * run, 8), b[0].dtype)
    total = np.empty((warps, 16, 8), dtype)
    for e in range(run):
        for i in range(2):
            right[warp, run * quad + e + 4 * run * i, g] = b[i][:, e]
    for i in range(4):
        total[warp, g + 8 * (i // 2), 2 * quad + i % 2] = c[i]
    total = total + (left @ right).astype(dtype)
    return [total[warp, g + 8 * (i // 2), 2 * quad + i % 2] for i in range(4)]


def rows_of(thread: Words, a: Sequence[np.ndarray]) -> np.ndarray:
    """16 rows of each warp, from four words of each of its lanes."""
    warp, g, quad = _places(thread)
    run = a[0].shape[-1]
    left = np.empty((len(thread) // 32, 16, 8 * run), a[0].dtype)
    for i, word in enumerate(a):
        for e in range(run):
            left[warp, g + 8 * (i % 2), run * quad + e + 4 * run * (i // 2)] = word[:, e]
    return left


def of_warpgroups(
    thread: Words, kind: Operand, left: np.ndarray, right: np.ndarray, sums: Sequence[Any]
) -> list[Pending]:
    """What each thread has of ``A . B`` and its sums.

    Args:
      thread: the threads' numbers.
      kind: dtype of A and B.
      left: 16 rows of each warp.
      right: for each warp what its warpgroup multiplies them with, tokens last.
      sums: of each thread, half as many as tokens.
    """
    warp, g, quad = _places(thread)
    product = left @ right  # warp, row, token
    product = product.view(np.uint32) if kind == "int8" else product
    result = []
    for i, value in enumerate(sums):
        token = 8 * (i // 4) + 2 * quad + i % 2
        value = value.value if isinstance(value, Pending) else value
        result.append(Pending(value + product[warp, g + 8 * (i // 2 % 2), token]))
    return result


def _places(thread: Words) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each thread: which warp it is in, and g and q."""
    lane = thread.astype(np.int64) % 32
    return np.arange(len(lane)) // 32, lane // 4, lane % 4
