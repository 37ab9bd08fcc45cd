# SPDX-License-Identifier: Apache-2.0
"""What becomes of the sum of a product before it is stored: scales, bias, residual."""

from collections.abc import Sequence
from dataclasses import dataclass

from pallas_kernels import operands
from pallas_kernels.machine import Machine, Real, Sum, Word
from pallas_kernels.product import Arrays, Product


@dataclass(frozen=True)
class OfOutput:
    """What applies to all results of an output; None: nothing does."""

    scale: Real | None
    bias: Real | None


def plus(machine: Machine, product: Product, a: Sum, b: Sum) -> Sum:
    """Two sums together."""
    return a + b if product.is_whole else machine.plus(a, b)


def as_word(machine: Machine, product: Product, total: Sum) -> Word:
    """The bits of a sum."""
    return total if product.is_whole else machine.as_word(total)


def as_sum(machine: Machine, product: Product, bits: Word) -> Sum:
    """The sum of these bits."""
    return bits if product.is_whole else machine.as_real(bits)


def of_tokens(
    machine: Machine, product: Product, arrays: Arrays, m: Word, offsets: Sequence[int]
) -> list[Real | None]:
    """The scales of all results of the tokens m + offset; beyond the last one anything."""
    if product.has_half_tokens or product.has_blocks:
        return [None] * len(offsets)
    if product.one_token_scale:
        (scale,) = machine.pointer(arrays.token_scale, machine.word(0)).load(0, 1)
        return [machine.as_real(scale)] * len(offsets)
    first = machine.pointer(arrays.token_scale, m)
    return [
        machine.as_real(first.load_where(offset, m < max(product.m - offset, 0)))
        for offset in offsets
    ]


def of_output(machine: Machine, product: Product, arrays: Arrays, n: Word) -> OfOutput:
    """Scale and bias of an output; beyond the last one anything."""
    n, scale = machine.minimum(n, product.n - 1), None
    if not product.has_half_tokens and product.group_size is None:
        start = arrays.start(machine, 1 if product.one_scale else product.n)
        scale = machine.real_at(arrays.scale, start if product.one_scale else start + n)
    return OfOutput(scale, None if arrays.bias is None else machine.real_at(arrays.bias, n))


def finished(
    machine: Machine,
    product: Product,
    arrays: Arrays,
    total: Sum,
    m: Word,
    n: Word,
    *,
    token_scale: Real | None,
    output: OfOutput,
) -> Real:
    """Applies to a sum what applies to it.

    Args:
      machine: emits the instructions.
      product: what is computed.
      arrays: where the residual lies.
      total: sum of token m and output n; beyond the last ones anything.
      m: token.
      n: output.
      token_scale: from :func:`of_tokens`.
      output: from :func:`of_output`.
    """
    value = _real(machine, product, total)
    for scale in (token_scale, output.scale):
        value = value if scale is None else machine.times(value, scale)
    if output.bias is not None:
        value = machine.plus(value, output.bias)
    if arrays.residual is not None:
        m, n = machine.minimum(m, product.m - 1), machine.minimum(n, product.n - 1)
        value = machine.plus(value, machine.real_at(arrays.residual, m * product.n + n))
    return value


def _real(machine: Machine, product: Product, total: Sum) -> Real:
    """A sum as float32; the nearest to a whole one."""
    if not product.is_whole:
        return total
    total = machine.rounded(total)
    if product.weights == "int8":
        return total
    return machine.times(total, machine.real(1 / operands.INT4_IN_INT8))  # exact
