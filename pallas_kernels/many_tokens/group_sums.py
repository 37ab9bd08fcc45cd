# SPDX-License-Identifier: Apache-2.0
"""The main loop of the kernel for many tokens where 128 inputs have a sum and a scale of their own.

A step is one group. Its four products follow each other; then its sums are scaled and added to the total,
in float32, while another warpgroup multiplies. DeepSeek-V3 Technical Report, 2024, section 3.3.2, has the
same for its reason: the tensor cores add 8-bit floats up with about 14 bits only.
"""

from typing import Any

from pallas_kernels.machine import Real, Word
from pallas_kernels.many_tokens.fragments import Fragments
from pallas_kernels.many_tokens.tiling import PRODUCTS


def begun(weights: Fragments) -> list[Word]:
    """What a lane has ready for the first step of all."""
    first = weights.machine.word(0)
    weights.stream.wait(first)
    return _ready(weights, first)


def of_tile(
    weights: Fragments, turn: Word, carry: list[Word]
) -> tuple[list[list[Real]], list[Word]]:
    """The totals of a tile, of each fragment, and what is ready for the next one.

    Args:
      weights: of this warp.
      turn: which tile of this block.
      carry: what is ready for this one.
    """
    machine, steps, size = weights.machine, weights.stream.steps, len(carry)

    def one_step(own_step: Word, state: list[Any]) -> list[Any]:
        totals = weights.by_fragment(state[size:])
        ready, totals = _added_step(weights, turn * steps + own_step, state[:size], totals)
        return [*ready, *weights.flat(totals)]

    state = [*carry, *weights.flat(weights.no_sums())]
    state = machine.loop(machine.word(steps), state, one_step)
    return weights.by_fragment(state[size:]), state[:size]


def _added_step(
    weights: Fragments, step: Word, ready: list[Word], totals: list[list[Real]]
) -> tuple[list[Word], list[list[Real]]]:
    """``totals + sums * factors`` of a step, the factors repeated; makes the next step ready."""
    machine, stream = weights.machine, weights.stream
    sums = _multiplied(weights, step, ready)
    stream.begin_ahead(step)
    factors = weights.factors(step, weights.scales(step))
    after = stream.after(step)
    stream.wait(after)
    ready = _ready(weights, after)
    sums = machine.wait(0, sums)
    stream.leave(step)
    totals = [
        [
            machine.fma(part, by[i % len(by)], total)
            for i, (part, total) in enumerate(zip(parts, of_fragment, strict=True))
        ]
        for parts, by, of_fragment in zip(sums, factors, totals, strict=True)
    ]
    return ready, totals


def _multiplied(weights: Fragments, step: Word, ready: list[Word]) -> list[list[Real]]:
    """The sums of a step, under way."""
    # Codes that are operands as they are: loaded here and not carried on, or the assembler would let no
    # products overlap.
    size = 4 * weights.config.fragments
    ready, sums = ready or _operands(weights, step), None
    for i in range(PRODUCTS):
        own = ready[size * i :][:size]
        sums = weights.multiplied(step, i, [own[j : j + 4] for j in range(0, size, 4)], sums)
    assert sums is not None
    return sums


def _ready(weights: Fragments, step: Word) -> list[Word]:
    return [] if weights.are_operands else _operands(weights, step)


def _operands(weights: Fragments, step: Word) -> list[Word]:
    """A of the products of a step, of each fragment."""
    codes = weights.codes(step, 0)
    return [
        word
        for i in range(PRODUCTS)
        for fragment in weights.operands(step, i, codes, [])
        for word in fragment
    ]
