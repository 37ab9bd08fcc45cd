# SPDX-License-Identifier: Apache-2.0
"""A block of GPTQ, input by input, in one launch on a Hopper GPU.

    for i in 0 .. b - 1:
        code[i, n]  = clip(round(w[i, n] / step[i, n] + zero[i, n]), low, high)
        error[i, n] = (w[i, n] - (code[i, n] - zero[i, n]) * step[i, n]) / U[i, i]
        w[j, n]     = w[j, n] - U[i, j] * error[i, n]           for j > i

What comes back is ``w``: of each input what its weights had become when it was their turn. Codes and
errors follow from that element by element, for XLA to do.

Columns do not meet. Four lanes share one: of each 16 inputs lane ``p`` keeps those from ``4 p`` on in its
registers, four neighbours, whose factors are one load. A round of 16 inputs is the body of a loop, after
which what is kept moves up by one: unrolled over all inputs, which leaves out half of the products, the
program takes two seconds to compile, and each solver has it several times. Memory is read and written
once; ``b`` steps follow one another, each of a shuffle, a division and a few operations, and take most of
the time:

    bytes    4 b n for each of w, step, zero and the result, and 4 b b factors, from the cache
    time     b steps of some 150 clocks, estimated, not measured alone: 10 us of 128 inputs at 1.98 GHz

Left to XLA the loop launches a program for each few inputs, some microseconds each.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels import mosaic_machine, numpy_machine
from pallas_kernels.machine import Machine, Real, Word

THREADS = 128
_LANES, _NEIGHBOURS = 4, 4  # that share a column; inputs that a lane keeps together
_TURN = _LANES * _NEIGHBOURS  # inputs after which it is the first lane's turn again


def why_not(b: int) -> str | None:
    """Why a block of so many inputs is not for the kernel; None if it is."""
    if b % _TURN or not 0 < b <= 128:
        return f"{b} inputs of a block; the kernel takes a multiple of {_TURN} up to 128"
    return None


def at_their_turn_reference(
    rows: Float[Array, "b n"],
    upper: Float[Array, "b b"],
    step: Float[Array, "b n"],
    zero: Float[Array, "b n"],
    *,
    low: float,
    high: float,
) -> Float[Array, "b n"]:
    """The definition; arguments as of :func:`at_their_turn`."""

    def one(i: Array, rows: Array) -> Array:
        codes = jnp.clip(jnp.round(rows[i] / step[i] + zero[i]), low, high)
        error = (rows[i] - (codes - zero[i]) * step[i]) / upper[i, i]
        later = jnp.where(jnp.arange(len(rows)) > i, upper[i], 0.0)
        return rows - later[:, None] * error

    return jax.lax.fori_loop(0, len(rows), one, rows)


def at_their_turn(
    rows: Float[Array, "b n"],
    upper: Float[Array, "b b"],
    step: Float[Array, "b n"],
    zero: Float[Array, "b n"],
    *,
    low: float,
    high: float,
    interpret: bool = False,
) -> Float[Array, "b n"]:
    """What weights have become when it is their turn to be rounded, as in the module's docstring.

    Args:
      rows: float32 weights, an input a row.
      upper: factor of the inverse Hessian; what lies below its diagonal is not looked at.
      step: of each weight's grid, positive.
      zero: likewise.
      low: least code.
      high: greatest code.
      interpret: run the same program with numpy, on any machine.

    Raises:
      ValueError: a block that is too large or not a multiple of 16.
    """
    b, n = rows.shape
    if reason := why_not(b):
        raise ValueError(reason)
    # What a weight's remainder, not yet divided, takes from the later ones: one division less in a step.
    factors = -jnp.triu(upper, 1) / jnp.diagonal(upper)[:, None]
    factors = jnp.pad(factors, ((0, 1), (0, 0)))  # what the last rows look for beyond their ends
    operands = [rows, factors, step, zero]
    program = functools.partial(_program, n=n, b=b, low=low, high=high)
    sizes = {"grid": (-(-n * _LANES // THREADS), 1), "threads": THREADS, "shared": 4}
    if interpret:
        arrays = [np.array(a) for a in operands] + [np.full((b, n), np.nan, np.float32)]
        numpy_machine.run(lambda machine: program(machine, *arrays), **sizes)
        return jnp.asarray(arrays[-1])
    out = jax.ShapeDtypeStruct((b, n), jnp.float32)
    return mosaic_machine.launch(program, operands, out, name="gptq_block", **sizes)


def _program(
    m: Machine, rows, factors, step, zero, out, *, n: int, b: int, low: float, high: float
) -> None:
    """Of a block of threads: 32 columns."""
    column = m.block[0] * (THREADS // _LANES) + m.thread // _LANES
    inside = column < n
    column = m.minimum(column, n - 1)
    part, quad = m.thread % _LANES, m.thread % 32 // _LANES * _LANES
    begin = m.pointer(rows, column).advanced(part, _NEIGHBOURS * n)
    own = [_real(m, begin, (j + e) * n) for j in range(0, b, _TURN) for e in range(_NEIGHBOURS)]
    taken = m.pointer(factors, part * _NEIGHBOURS)
    steps, zeros = m.pointer(step, column), m.pointer(zero, column)

    def turn(i: Word, own: list[Real]) -> list[Real]:
        factors = taken.advanced(i, _TURN * (b + 1))
        own_steps, own_zeros = (each.advanced(i, _TURN * n) for each in (steps, zeros))
        for place in range(_TURN):
            lane, e = divmod(place, _NEIGHBOURS)
            w = m.from_lane(own[e], quad + lane)
            grid = _real(m, own_steps, place * n), _real(m, own_zeros, place * n)
            left = _left(m, w, *grid, low, high)
            # Beyond the last input these are the next row's, of inputs before its own: zeros.
            for j in range(0, b // _LANES, _NEIGHBOURS):
                four = factors.load(place * b + j * _LANES, _NEIGHBOURS)
                for kept, factor in enumerate(four, start=j):
                    own[kept] = m.fma(m.as_real(factor), left, own[kept])
        for e in range(_NEIGHBOURS):
            row = i * _TURN + part * _NEIGHBOURS + e
            m.store(out, row * n + column, own[e], inside)
        return own[_NEIGHBOURS:] + [m.real(0.0)] * _NEIGHBOURS

    m.loop(m.word(b // _TURN), own, turn)


def _left(m: Machine, w: Real, step: Real, zero: Real, low: float, high: float) -> Real:
    """What rounding leaves of a weight."""
    minus = m.real(-1.0)
    code = m.clipped(m.nearest_whole(m.plus(m.quotient(w, step), zero)), low, high)
    near = m.times(m.fma(zero, minus, code), step)
    return m.fma(near, minus, w)


def _real(m: Machine, place, offset: int) -> Real:
    (word,) = place.load(offset, 1)
    return m.as_real(word)
