# SPDX-License-Identifier: Apache-2.0
"""Rotation: a basis in which no channel of the activations, and no input of the weights, is an outlier.

    x W  =  (x Q) (Q^T W),     Q Q^T = I,     Q chosen so that  max_j |(x Q)_j|  is near  |x| / sqrt(n)

==============  ===========================================================================
paper           here
==============  ===========================================================================
H_n             the Kronecker product of ``factors(n)``: orthogonal, all entries about ``n**-0.5``
diag(s)         ``signs(n, seed)``
Q               ``diag(s) H_n``, of the residual stream; ``H_n`` alone inside heads and at run time
X Q, Q^T W      both are ``turned``: along the axis that the product sums over
==============  ===========================================================================

A row x becomes x Q, and the weights that multiply it, which have their inputs along an axis, become the
same along that axis: products of a row and a column stay. So nothing is ever multiplied by Q^T, and what
writes the rotated channels, a table's rows, a layer's outputs and their biases, is turned likewise.

The paper takes Hadamard matrices: entries of one magnitude spread a single large channel evenly over all.
They are built here from those of Sylvester (2^k) and Paley (q + 1 or 2 (q + 1), q prime), which cover the
widths of most models: 14336 = 28 x 512, 18944 = 148 x 128. An odd factor that is left, such as the 43
of 11008, is covered by the Hartley transform, whose entries are at most sqrt(2) times as large: there is
a rotation of every size, and none is refused.

References:
  Ashkboos, Mohtashami, Croci, Li, Cameron, Jaggi, Alistarh, Hoefler, Hensman, QuaRot: Outlier-Free 4-Bit
  Inference in Rotated LLMs, NeurIPS 2024, https://arxiv.org/abs/2404.00456, sections 3 and 4.
  Paley, On Orthogonal Matrices, Journal of Mathematics and Physics 12, 1933.
  Bracewell, Discrete Hartley Transform, Journal of the Optical Society of America 73, 1983.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_SYLVESTER = (
    64  # larger powers of two are products of this one: fewer sums, and products of a good size
)
_PALEY = 1024  # the largest order built, 4 MiB in float32


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a residual stream is rotated.

    Attributes:
      seed: of the signs. It matters: with outliers as in :mod:`qjax.method` the seeds 0, 1 and 2 give the
        shipped model perplexities of 8.460, 8.631 and 8.445 in w4a4. None is searched for here.
    """

    seed: int = 0


@functools.partial(jax.jit, static_argnames=("axis", "seed"))
def turned(x: Float[Array, "..."], axis: int, seed: int | None = None) -> Float[Array, "..."]:
    """An array times a rotation of one of its axes.

    Args:
      x: activations, or weights with that axis summed over or written.
      axis: the one to rotate, of any length n.
      seed: of the signs, ``x diag(s) H_n``; None: ``x H_n``.

    Returns:
      The array in its dtype; products are taken in float32 or better and rounded once.

    Example:
      >>> turned(jnp.array([[4.0, 0.0, 0.0, 0.0]]), axis=1).tolist()
      [[2.0, 2.0, 2.0, 2.0]]
    """
    wide = _wide(x, axis)
    if seed is not None:
        wide = wide * signs(wide.shape[-1], seed).astype(wide.dtype)
    wide = _times_kronecker(wide, factors(wide.shape[-1]))
    return jnp.moveaxis(wide, -1, axis).astype(x.dtype)


@functools.partial(jax.jit, static_argnames=("axis", "seed"))
def turned_back(x: Float[Array, "..."], axis: int, seed: int | None = None) -> Float[Array, "..."]:
    """What :func:`turned` made ``x`` of: an array times the transpose of the rotation.

    Args:
      x: as of :func:`turned`.
      axis: likewise.
      seed: likewise.

    Example:
      >>> turned_back(jnp.array([[2.0, 2.0, 2.0, 2.0]]), axis=1).tolist()
      [[4.0, 0.0, 0.0, 0.0]]
    """
    wide = _wide(x, axis)
    wide = _times_kronecker(wide, [matrix.T for matrix in factors(wide.shape[-1])])
    if seed is not None:
        wide = wide * signs(wide.shape[-1], seed).astype(wide.dtype)
    return jnp.moveaxis(wide, -1, axis).astype(x.dtype)


def signs(n: int, seed: int) -> Float[np.ndarray, " n"]:
    """Ones and minus ones, from the raw words of a generator that gives the same ones everywhere."""
    return 1.0 - 2.0 * (np.random.PCG64(seed).random_raw(n) >> np.uint64(63))


@functools.cache
def factors(n: int) -> tuple[Float[np.ndarray, "_ _"], ...]:
    """Orthogonal float64 matrices whose Kronecker product has n rows and nearly equal magnitudes.

    All are Hadamard matrices, divided by the root of their order, where Kronecker products of those of
    Sylvester and Paley reach n.

    Example:
      >>> [len(matrix) for matrix in factors(14336)], [len(matrix) for matrix in factors(11008)]
      ([28, 64, 8], [43, 64, 4])
    """
    found, rest = [], n
    while orders := [d for d in _divisors(rest, _PALEY) if _odd(d) > 1 and _paley_prime(d)]:
        # The largest odd part, which leaves least to others, in the smallest matrix that has it.
        order = max(orders, key=lambda d: (_odd(d), -d))
        found.append(_paley(order) / math.sqrt(order))
        rest //= order
    if _odd(rest) > 1:
        found.append(_hartley(_odd(rest)))
    power = rest // _odd(rest)
    while power > 1:
        order = min(power, _SYLVESTER)
        found.append(_sylvester(order) / math.sqrt(order))
        power //= order
    return tuple(found) or (np.ones((1, 1)),)


def _wide(x: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    """With the axis last, in float32 or better."""
    return jnp.moveaxis(x, axis, -1).astype(jnp.promote_types(x.dtype, jnp.float32))


def _times_kronecker(
    x: Float[Array, "*batch n"], matrices: Sequence[Float[np.ndarray, "_ _"]]
) -> Float[Array, "*batch n"]:
    """The last axis times the Kronecker product of some matrices."""
    split = x.reshape(*x.shape[:-1], *map(len, matrices))
    for matrix in matrices:
        # Takes the first axis that is not rotated yet and puts it last: all are in order in the end.
        split = jnp.tensordot(
            split, matrix.astype(x.dtype), axes=(-len(matrices), 0), precision="highest"
        )
    return split.reshape(x.shape)


def _sylvester(order: int) -> Float[np.ndarray, "_ _"]:
    """The Hadamard matrix of a power of two."""
    pair = np.array([[1.0, 1.0], [1.0, -1.0]])
    return functools.reduce(np.kron, [pair] * (order.bit_length() - 1), np.ones((1, 1)))


def _paley(order: int) -> Float[np.ndarray, "_ _"]:
    """The Hadamard matrix of order q + 1 (q = 3 mod 4) or 2 (q + 1) (q = 1 mod 4)."""
    q = _paley_prime(order)
    assert q is not None
    character = np.full(q, -1.0)
    character[np.arange(1, q) ** 2 % q] = 1.0  # squares of a field of q elements
    character[0] = 0.0
    conference = np.zeros((q + 1, q + 1))
    conference[0, 1:] = 1.0
    conference[1:, 0] = character[-1]  # -1 is a square where q = 1 mod 4
    conference[1:, 1:] = character[np.subtract.outer(np.arange(q), np.arange(q)) % q]
    if q % 4 == 3:
        return np.eye(q + 1) + conference
    on_diagonal, beside = np.array([[1.0, -1.0], [-1.0, -1.0]]), np.array([[1.0, 1.0], [1.0, -1.0]])
    return np.kron(np.eye(q + 1), on_diagonal) + np.kron(conference, beside)


def _paley_prime(order: int) -> int | None:
    """The prime that Paley's construction makes a matrix of this order from, if there is one."""
    for q, remainder in ((order - 1, 3), (order // 2 - 1, 1)):
        if order % 4 == 0 and q % 4 == remainder and _is_prime(q):
            return q
    return None


def _hartley(n: int) -> Float[np.ndarray, "n n"]:
    """The sums of cosine and sine of 2 pi j k / n: symmetric, entries of at most sqrt(2 / n)."""
    angles = 2 * np.pi * (np.outer(np.arange(n), np.arange(n)) % n) / n
    return (np.cos(angles) + np.sin(angles)) / math.sqrt(n)


def _divisors(n: int, most: int) -> list[int]:
    return [d for d in range(1, min(n, most) + 1) if n % d == 0]


def _odd(n: int) -> int:
    """The largest odd divisor."""
    return n // (n & -n)


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))
