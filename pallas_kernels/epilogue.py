# SPDX-License-Identifier: Apache-2.0
"""What becomes of the sums of a product before they are stored: neighbouring outputs of one token."""

from typing import Any

from pallas_kernels import operands
from pallas_kernels.machine import Machine, Real, Sum, Word
from pallas_kernels.product import Arrays, Product


def plus(machine: Machine, product: Product, sums: list[Sum], bits: list[Word]) -> list[Sum]:
    """Sums and the bits of further ones; none: the first."""
    if product.is_whole:
        return [a + b for a, b in zip(sums, bits, strict=True)] if sums else bits
    parts = [machine.as_real(word) for word in bits]
    return [machine.plus(a, b) for a, b in zip(sums, parts, strict=True)] if sums else parts


def finished(
    machine: Machine, product: Product, arrays: Arrays, sums: list[Sum], m: Word, n: Word
) -> list[Real]:
    """Applies to sums what applies to all of an output: scales, bias, residual.

    Args:
      machine: emits the instructions.
      product: what is computed.
      arrays: where scales, bias and residual lie.
      sums: of a token m, of outputs from n on, a multiple of their number; beyond the last ones anything.
      m: token.
      n: output.
    """
    count = len(sums)
    m, n = machine.minimum(m, product.m - 1), machine.minimum(n, product.n - count)
    first = machine.word(0)
    values = [_real(machine, product, value) for value in sums] if product.is_whole else sums

    def combined(function: Any, others: list[Real]) -> list[Real]:
        return [function(a, b) for a, b in zip(values, others, strict=True)]

    if not product.has_half_tokens and not product.has_blocks:
        token_scale = machine.real_at(arrays.token_scale, first if product.one_token_scale else m)
        values = combined(machine.times, [token_scale] * count)
        if product.one_scale:
            scales = [machine.real_at(arrays.scale, first)] * count
        else:
            scales = machine.reals_at(arrays.scale, n, count)
        values = combined(machine.times, scales)
    if arrays.bias is not None:
        values = combined(machine.plus, machine.reals_at(arrays.bias, n, count))
    if arrays.residual is not None:
        values = combined(machine.plus, machine.reals_at(arrays.residual, m * product.n + n, count))
    return values


def _real(machine: Machine, product: Product, total: Word) -> Real:
    """The float32 nearest to a whole sum."""
    total = machine.rounded(total)
    if product.weights == "int8":
        return total
    return machine.times(total, machine.real(1 / operands.INT4_IN_INT8))  # exact
