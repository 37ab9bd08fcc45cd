# SPDX-License-Identifier: Apache-2.0
"""Experts that few calibration tokens reach.

An expert that is calibrated with the tokens routed to it sees a part of them. Where those are fewer than
sixteen for each of its inputs, its statistics are filled up to that with the average over all tokens.
"""

from collections.abc import Callable
from dataclasses import replace

from qjax import statistics
from qjax.observation import Observed

# Tokens for each input of an expert that are enough; what is missing comes from the average. The shipped
# model's fourth gate_proj (256 inputs, w4a16-g128, GPTQ), its tokens dealt to eight experts by a random
# router, two for each, and errors of the output on other tokens of the same expert (2 CPU cores, jax
# 0.10.2, 2026-11-28, 16,384 tokens to calibrate and 16,384 others, means of four experts):
#
#   tokens an input        1/4      1      2      4      8
#   its own alone        0.1128 0.1070 0.0957 0.0811 0.0787
#   filled up to 1       0.0778 0.1070 0.0957 0.0811 0.0787
#   filled up to 4       0.0767 0.0764 0.0774 0.0811 0.0787
#   filled up to 8       0.0767 0.0762 0.0763 0.0754 0.0787
#   filled up to 16      0.0768 0.0764 0.0764 0.0754 0.0756
#   all tokens           0.0769 0.0769 0.0769 0.0769 0.0769
#   rounded to nearest   0.1043 0.1043 0.1043 0.1043 0.1043
_ENOUGH = 16


def filled_up(
    observed: Observed, observe_all: Callable[[list[str]], Observed]
) -> tuple[Observed, dict[str, int]]:
    """Statistics of a block in which no expert is short of tokens, and how many those had that were.

    Args:
      observed: of the tokens that were routed to each.
      observe_all: from paths of experts' layers to their statistics over all tokens.
    """
    entries = list(zip(observed.layers, observed.inputs, observed.routed, strict=True))
    few = {
        path: int(found.rows)
        for layers, found, routed in entries
        for path in layers
        if routed and int(found.rows) < _ENOUGH * len(found.magnitude)
    }
    if not few:
        return observed, few
    # All experts, whichever are short: in the next block others are, and the program is the same.
    every = observe_all([path for layers, _, routed in entries if routed for path in layers])
    inputs = (
        statistics.filled_up(found, every[layers[0]], _ENOUGH * len(found.magnitude))
        if layers[0] in few
        else found
        for layers, found, _ in entries
    )
    return replace(observed, inputs=tuple(inputs)), few
