# SPDX-License-Identifier: Apache-2.0
"""What calibration keeps of the rows that a weight is multiplied with, however many they are.

    hessian = sum_t x_t x_t^T,    low, high = extremes of each input,    magnitude = sum_t |x_t|

The Hessian is that of the squared error of the weight's product, up to a factor of two: an error D of a
``[k, n]`` weight changes the products by ``sum_t |x_t D|^2 = tr(D^T hessian D)``.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num

from qjax import cpu


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class InputStatistics:
    """Sums and extremes over calibration rows of ``k`` inputs.

    Attributes:
      hessian: ``sum x x^T``, ``[k, k]``, float32; None where nobody asked for it.
      low: least value of each input, ``[k]``, float32.
      high: greatest value, ``[k]``, float32.
      magnitude: ``sum |x|``, ``[k]``, float32.
      rows: how many there were, int32.
    """

    hessian: Float[Array, "k k"] | None
    low: Float[Array, " k"]
    high: Float[Array, " k"]
    magnitude: Float[Array, " k"]
    rows: Int[Array, ""]

    @property
    def absmax(self) -> Float[Array, " k"]:
        """The largest magnitude of each input."""
        return jnp.maximum(-self.low, self.high)

    @property
    def mean_magnitude(self) -> Float[Array, " k"]:
        """``mean |x|`` of each input."""
        return self.magnitude / self.rows

    def divided_by(self, scale: Float[Array, " k"]) -> "InputStatistics":
        """The statistics of ``x / scale``, without reading a row again; scales are positive."""
        hessian = self.hessian
        if hessian is not None:
            hessian = hessian / (scale[:, None] * scale)
        return InputStatistics(
            hessian=hessian,
            low=self.low / scale,
            high=self.high / scale,
            magnitude=self.magnitude / scale,
            rows=self.rows,
        )


def of_rows(
    x: Num[Array, "rows k"], *, hessian: bool, counted: Bool[Array, " rows"] | None = None
) -> InputStatistics:
    """The statistics of some rows.

    Args:
      x: rows that a ``[k, n]`` weight is multiplied with.
      hessian: whether to take the Hessian too.
      counted: which of the rows count; None: all. Of no rows at all the sums are zero, ``low`` is
        infinity and ``high`` minus infinity.
    """
    if counted is None:
        counted = jnp.ones(x.shape[0], bool)
    else:
        # Rows of zeros add nothing to any sum.
        x = jnp.where(counted[:, None], x, 0)
    counts = counted[:, None]
    return InputStatistics(
        hessian=_gram(x) if hessian else None,
        # Extremes are exact in any type: those of x itself take a CPU half of the time or less.
        low=jnp.min(x, axis=0, initial=jnp.inf, where=counts).astype(jnp.float32),
        high=jnp.max(x, axis=0, initial=-jnp.inf, where=counts).astype(jnp.float32),
        magnitude=jnp.sum(jnp.abs(x.astype(jnp.float32)), axis=0),
        rows=jnp.sum(counted, dtype=jnp.int32),
    )


def merged(a: InputStatistics, b: InputStatistics) -> InputStatistics:
    """The statistics of the rows of both."""
    return InputStatistics(
        hessian=None if a.hessian is None or b.hessian is None else a.hessian + b.hessian,
        low=jnp.minimum(a.low, b.low),
        high=jnp.maximum(a.high, b.high),
        magnitude=a.magnitude + b.magnitude,
        rows=a.rows + b.rows,
    )


@jax.jit
def filled_up(
    few: InputStatistics, every: InputStatistics, wanted: Int[Array, ""] | int
) -> InputStatistics:
    """The statistics of too few rows, with what is missing taken from the average of more.

        missing = wanted - rows,    sums + missing / all rows * sums of all

    A Hessian of few rows says little of most directions; the average says what is usual there, and weighs
    as many rows as are missing, no more.

    Args:
      few: of the rows that count.
      every: of those and others; where they are fewer than wanted, there are as many afterwards.
      wanted: how many rows are enough.
    """
    wanted = jnp.minimum(wanted, every.rows)
    missing = jnp.maximum(wanted - few.rows, 0)
    share = missing / every.rows

    def mixed(own: Float[Array, "..."], of_all: Any) -> Float[Array, "..."]:
        return own + share * of_all

    hessian = few.hessian
    return InputStatistics(
        hessian=None if hessian is None else mixed(hessian, every.hessian),
        low=jnp.where(missing > 0, jnp.minimum(few.low, every.low), few.low),
        high=jnp.where(missing > 0, jnp.maximum(few.high, every.high), few.high),
        magnitude=mixed(few.magnitude, every.magnitude),
        rows=few.rows + missing,
    )


@jax.jit
def relative_output_error(
    w: Float[Array, "k n"], near: Float[Array, "k n"], hessian: Float[Array, "k k"]
) -> Float[Array, ""]:
    """``|X w - X near| / |X w|`` over the calibration rows ``X``, from their Hessian."""
    w = w.astype(jnp.float32)
    wrong = w - near.astype(jnp.float32)
    tiny = jnp.finfo(jnp.float32).tiny
    return jnp.sqrt(_energy(wrong, hessian) / jnp.maximum(_energy(w, hessian), tiny))


def _energy(d: Float[Array, "k n"], hessian: Float[Array, "k k"]) -> Float[Array, ""]:
    """``tr(d^T hessian d)``; rounding may leave a tiny sum below zero."""
    return jnp.maximum(jnp.sum(d * jnp.matmul(hessian, d, precision="highest")), 0.0)


# Columns of the Hessian that are computed at once: blocks above the diagonal are not. More blocks leave
# out more, up to half, and make each product smaller.
_STRIPS = 4


def _gram(x: Num[Array, "rows k"]) -> Float[Array, "k k"]:
    """``x^T x`` in float32, from its lower triangle of blocks.

    Products of 16-bit floats are exact in float32, where the tensor cores of a GPU add them up; float32
    is multiplied as such and not in fewer bits.
    """
    width, rows_at = math.ceil(x.shape[1] / _STRIPS), 0
    cuts = list(range(width, x.shape[1], width))
    if x.dtype == jnp.bfloat16 and jax.default_backend() == "cpu" and cpu.multiplies_bfloat16():
        x, rows_at = _transposed(x), 1
    strips = jnp.split(x, cuts, axis=1 - rows_at)
    lower = [[_product(a, b, rows_at) for b in strips[: i + 1]] for i, a in enumerate(strips)]
    rows = [
        lower[i] + [lower[j][i].T for j in range(i + 1, len(strips))] for i in range(len(strips))
    ]
    return jnp.concatenate([jnp.concatenate(row, axis=1) for row in rows])


def _transposed(x: Num[Array, "rows k"]) -> Num[Array, "k rows"]:
    """A copy, where XLA would go over the rows as they lie.

    A CPU's products of bfloat16 are fast where what is summed over lies beside each other: ``x^T x`` of
    [8192, 1024] takes 30 ms, copy and all, 78 otherwise (2 cores with AMX, jax 0.11.2, 2026-11-29).
    """
    in_a_row = lax.optimization_barrier(x.T.reshape(-1))
    return lax.optimization_barrier(in_a_row.reshape(x.shape[::-1]))


def _product(a: Num[Array, "_ _"], b: Num[Array, "_ _"], rows_at: int) -> Float[Array, "i j"]:
    over_rows = (((rows_at,), (rows_at,)), ((), ()))
    return lax.dot_general(a, b, over_rows, precision="highest", preferred_element_type=jnp.float32)
