# SPDX-License-Identifier: Apache-2.0
"""Rounding input by input, where inputs still to come make up for each error: the loop of GPTQ.

    for i in 0 .. k - 1:
        codes[i]   = the nearest code of rows[i]
        errors[i]  = (rows[i] - what the code stands for) / upper[i, i]
        rows[j]    = rows[j] - upper[i, j] * errors[i]            for j > i

in nested pieces, so that most of the last line is products of matrices: strips of a few inputs that are
one program, blocks of 128, parts of some blocks. None of them shows in the codes but by the order of
float32 sums. On a Hopper GPU a block is one launch of :mod:`pallas_kernels.gptq_block`.

References:
  Frantar, Ashkboos, Hoefler, Alistarh, GPTQ: Accurate Post-Training Quantization for Generative
  Pre-trained Transformers, ICLR 2023, https://arxiv.org/abs/2210.17323, algorithm 1, whose blocks are
  ours.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from qjax import formats, kernel_rounding
from qjax.formats import Format

BLOCK = 128
# One loop runs over the blocks of a part: each multiplies with what is left of the part and with what is
# done of it, which is a waste that parts of their own size do not have, at the price of compiling each.
_MOST_PARTS, _LEAST_BLOCKS = 4, 8
# Inputs of a block that are one program, by platform; elsewhere each is by itself, which compiles faster.
_STRIPS = {"gpu": 8}


class Steps(NamedTuple):
    """What each weight is rounded on, float32: ``(codes - zero) * step``."""

    step: Float[Array, "b n"]
    zero: Float[Array, "b n"]


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """How a weight is rounded.

    Attributes:
      fmt: of the codes.
      dtype: that what they stand for is rounded to.
      kernel: whether the kernel is there for blocks that it takes.
    """

    fmt: Format
    dtype: Any
    kernel: bool = False

    def __call__(
        self,
        weights: Float[Array, "*shape"],
        step: Float[Array, "*shape"],
        zero: Float[Array, "*shape"],
    ) -> tuple[Shaped[Array, "*shape"], Float[Array, "*shape"]]:
        """The codes of weights, and what they stand for."""
        codes = formats.encode(weights / step + zero, self.fmt)
        near = (formats.decode(codes, self.fmt) - zero) * step
        return codes, formats.nearest(near, self.dtype)


def rounded(
    rows: Float[Array, "k n"],
    upper: Float[Array, "k k"],
    block: int,
    steps_of: Callable[..., Any],
    nearest: Nearest,
) -> tuple[Shaped[Array, "k n"], Any]:
    """Algorithm 1 of the paper: block by block, and in a block input by input.

    The errors of a block reach the rest of its part at once, and the parts after it together with those
    of the part's other blocks.

    Args:
      rows: the weights, an input a row, in the order in which they are taken.
      upper: of the inverse Hessian, in that order.
      block: inputs of a block.
      steps_of: from the first input of a block and its weights by then to their steps, and to what else
        is wanted of the block.
      nearest: how each is rounded.

    Returns:
      The codes in the same order, and what else was wanted of each block.
    """
    k = len(rows)
    # Inputs of nothing fill the last block up: they have no error, and none reaches them.
    rows = filled(rows, block, 0.0)
    upper = filled(filled(upper, block, 0.0).T, block, 0.0).T
    upper = upper + jnp.diag((jnp.arange(len(rows)) >= k).astype(jnp.float32))
    done = []
    for begin, end in _parts(len(rows), block):
        part, rows = rows[: end - begin], rows[end - begin :]
        reach = upper[begin:end]
        codes, errors, wanted = _one_part(
            part, reach[:, begin:end], begin, block, steps_of, nearest
        )
        rows = rows - jnp.matmul(reach[:, end:].T, errors, precision="highest")
        done.append((codes, wanted))
    codes, wanted = jax.tree.map(lambda *parts: jnp.concatenate(parts), *done)
    return codes[:k], wanted


def _parts(k: int, block: int) -> list[tuple[int, int]]:
    """Where each of a few parts of the inputs begins and ends, whole blocks both."""
    blocks = k // block
    size = block * max(_LEAST_BLOCKS, math.ceil(blocks / _MOST_PARTS))
    return [(begin, min(begin + size, k)) for begin in range(0, k, size)]


def _one_part(
    rows: Float[Array, "p n"],
    upper: Float[Array, "p p"],
    begin: int,
    block: int,
    steps_of: Callable[..., Any],
    nearest: Nearest,
) -> tuple[Shaped[Array, "p n"], Float[Array, "p n"], Any]:
    """The codes of a part's inputs, the errors that later parts are to make up for, what else was wanted.

    Args:
      rows: the part's inputs by now.
      upper: from them to them.
      begin: the first of them.
      block: as of :func:`rounded`, with the next two.
      steps_of: likewise.
      nearest: likewise.
    """

    def one_block(rows: Float[Array, "p n"], start: Int[Array, ""]):
        current, reach, corner = _piece(rows, upper, start, block)
        steps, wanted = steps_of(begin + start, current)
        codes, errors = _one_block(current, corner, steps, nearest)
        return _made_up(rows, reach, start + block, errors), (codes, errors, wanted)

    _, (codes, errors, wanted) = lax.scan(one_block, rows, jnp.arange(0, len(rows), block))
    return codes.reshape(rows.shape), errors.reshape(rows.shape), wanted


def _piece(
    rows: Float[Array, "k n"], upper: Float[Array, "k k"], start: Int[Array, ""], size: int
) -> tuple[Float[Array, "s n"], Float[Array, "s k"], Float[Array, "s s"]]:
    """Some inputs that follow one another, and the factor from them to all and to themselves."""
    reach = lax.dynamic_slice_in_dim(upper, start, size)
    corner = lax.dynamic_slice_in_dim(reach, start, size, axis=1)
    return lax.dynamic_slice_in_dim(rows, start, size), reach, corner


def _made_up(
    rows: Float[Array, "k n"],
    reach: Float[Array, "s k"],
    end: Int[Array, ""],
    errors: Float[Array, "s n"],
) -> Float[Array, "k n"]:
    """What the errors of a piece make of the rows from its end on; the others stay."""
    later = jnp.where(jnp.arange(len(rows)) >= end, reach, 0.0)
    return rows - jnp.matmul(later.T, errors, precision="highest")


def filled(rows: Float[Array, "k n"], block: int, value: float) -> Float[Array, "padded n"]:
    """Rows up to a multiple of the block."""
    return jnp.pad(rows, ((0, -len(rows) % block), (0, 0)), constant_values=value)


def _one_block(
    rows: Float[Array, "b n"],
    upper: Float[Array, "b b"],
    steps: Steps,
    nearest: Nearest,
) -> tuple[Shaped[Array, "b n"], Float[Array, "b n"]]:
    """The codes of a block's inputs, and the errors that later inputs are to make up for.

    Where a kernel does it, that is one launch. Else, as a block is to the whole, a strip of few inputs is
    to a block: on a GPU, which takes longer to launch a program than to run it here, several inputs
    become one.
    """
    if nearest.kernel and kernel_rounding.why_not(nearest.fmt, len(rows)) is None:
        seen = kernel_rounding.at_their_turn(rows, upper, steps.step, steps.zero, nearest.fmt)
        codes, near = nearest(seen, steps.step, steps.zero)
        return codes, (seen - near) / jnp.diagonal(upper)[:, None]
    strip = math.gcd(len(rows), _STRIPS.get(jax.default_backend(), 1))

    def one_strip(i: Int[Array, ""], state):
        rows, codes, errors = state
        start = i * strip
        current, reach, corner = _piece(rows, upper, start, strip)
        grid = Steps(*(lax.dynamic_slice_in_dim(leaf, start, strip) for leaf in steps))
        of_strip = lax.optimization_barrier(_one_strip(current, corner, grid, nearest))
        rows = _made_up(rows, reach, start + strip, of_strip[1])
        codes, errors = (
            lax.dynamic_update_slice_in_dim(whole, part, start, axis=0)
            for whole, part in zip((codes, errors), of_strip, strict=True)
        )
        return rows, codes, errors

    codes, _ = jax.eval_shape(nearest, rows, steps.step, steps.zero)
    state = rows, jnp.zeros(codes.shape, codes.dtype), jnp.zeros_like(rows)
    _, codes, errors = lax.fori_loop(0, len(rows) // strip, one_strip, state)
    return codes, errors


def _one_strip(
    rows: Float[Array, "s n"],
    upper: Float[Array, "s s"],
    steps: Steps,
    nearest: Nearest,
) -> tuple[Shaped[Array, "s n"], Float[Array, "s n"]]:
    """Likewise, of a strip, input by input."""
    all_codes, errors = [], []
    for i, row in enumerate(rows):
        for j, error in enumerate(errors):
            row = row - upper[j, i] * error
        codes, near = nearest(row, steps.step[i], steps.zero[i])
        all_codes.append(codes)
        errors.append((row - near) / upper[i, i])
    return jnp.stack(all_codes), jnp.stack(errors)
