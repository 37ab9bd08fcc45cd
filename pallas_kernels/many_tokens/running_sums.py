# SPDX-License-Identifier: Apache-2.0
"""The main loop of the kernel for many tokens where one sum goes on over all inputs.

Product follows product: one is under way while the operands of the next are made ready. That of the next
step is made ready at the end of a step, also where it belongs to the next tile. Where codes are operands
as they lie in shared memory there is nothing to make ready: all products of a step go out together.
"""

from dataclasses import dataclass
from typing import Any

from pallas_kernels.machine import Sum, Word
from pallas_kernels.many_tokens import tiling
from pallas_kernels.many_tokens.fragments import Fragments
from pallas_kernels.many_tokens.tiling import PRODUCTS


def begun(weights: Fragments) -> list[Word]:
    """What a lane has ready for the first product of all."""
    if tiling.takes_rows(weights.product):
        return []
    first = weights.machine.word(0)
    weights.stream.wait(first)
    return _Ahead.of(weights, first, 0, [], []).flat()


def of_tile(
    weights: Fragments, turn: Word, carry: list[Word]
) -> tuple[list[list[Sum]], list[Word]]:
    """The sums of a tile, of each fragment, and what is ready for the next one.

    Args:
      weights: of this warp.
      turn: which tile of this block.
      carry: what is ready for this one.
    """
    if tiling.takes_rows(weights.product):
        return _tile_of_rows(weights, turn), carry
    machine, stream, size = weights.machine, weights.stream, len(carry)

    def one_step(own_step: Word, carry: list[Any]) -> list[Any]:
        ahead, sums = _Ahead.filled(weights, carry[:size]), weights.by_fragment(carry[size:])
        ahead, sums = _multiply_step(weights, turn * stream.steps + own_step, ahead, sums)
        return [*ahead.flat(), *weights.flat(sums)]

    zeros = weights.flat(weights.no_sums())
    carry = machine.loop(machine.word(stream.steps), [*carry, *zeros], one_step)
    return machine.wait(0, weights.by_fragment(carry[size:])), carry[:size]


@dataclass(frozen=True)
class _Ahead:
    """What a lane has ready for the next product."""

    operands: list[list[Word]]  # A of each fragment
    codes: list[Word]  # of the 128 bytes of tokens that are multiplied
    scales: list[Word]  # of the step

    @staticmethod
    def of(
        weights: Fragments, step: Word, product: int, codes: list[Word], scales: list[Word]
    ) -> "_Ahead":
        """That of a product of a step; of the first one scales, of each fourth one codes are new."""
        if product == 0:
            scales = weights.scales(step)
        if product % PRODUCTS == 0:
            codes = weights.codes(step, product // PRODUCTS)
        return _Ahead(weights.operands(step, product, codes, scales), codes, scales)

    def flat(self) -> list[Word]:
        """All of it in one list."""
        return [*(word for part in self.operands for word in part), *self.codes, *self.scales]

    @staticmethod
    def filled(weights: Fragments, flat: list[Word]) -> "_Ahead":
        """What :meth:`flat` made a list of."""
        fragments = weights.config.fragments
        operands = [flat[4 * i : 4 * i + 4] for i in range(fragments)]
        codes = flat[4 * fragments :][: weights.code_words]
        return _Ahead(operands, codes, flat[4 * fragments + len(codes) :])


def _multiply_step(
    weights: Fragments, step: Word, ahead: _Ahead, sums: list[list[Sum]]
) -> tuple[_Ahead, list[list[Sum]]]:
    """Adds the products of a step, the first of which is ready; makes that of the next step ready."""
    machine, stream, last = weights.machine, weights.stream, PRODUCTS * weights.config.span - 1
    for i in range(last + 1):
        sums = weights.multiplied(step, i, ahead.operands, sums)
        sums = machine.wait(1, sums)
        if i == 0:
            # The last product of the step before, if there was one, is done.
            stream.leave(step + 0xFFFFFFFF, machine.word(0) < step)
            stream.begin_ahead(step)
        if i < last:
            ahead = _Ahead.of(weights, step, i + 1, ahead.codes, ahead.scales)
        else:
            after = stream.after(step)
            stream.wait(after)
            ahead = _Ahead.of(weights, after, 0, ahead.codes, ahead.scales)
    return ahead, sums


def _tile_of_rows(weights: Fragments, turn: Word) -> list[list[Sum]]:
    """The sums of a tile, whose codes products take from shared memory."""
    machine, stream = weights.machine, weights.stream
    products = PRODUCTS * weights.config.span

    def one_step(own_step: Word, carry: list[Any]) -> list[Any]:
        step, sums = turn * stream.steps + own_step, weights.by_fragment(carry)
        stream.wait(step)
        for i in range(products):
            sums = weights.multiplied(step, i, weights.rows(step, i), sums)
        sums = machine.wait(products, sums)  # those of the step before are done
        stream.leave(step + 0xFFFFFFFF, machine.word(0) < own_step)
        stream.begin_ahead(step)
        return weights.flat(sums)

    zeros = weights.flat(weights.no_sums())
    carry = machine.loop(machine.word(stream.steps), zeros, one_step)
    sums = machine.wait(0, weights.by_fragment(carry))
    stream.leave(turn * stream.steps + (stream.steps - 1))
    return sums
