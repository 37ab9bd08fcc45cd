# SPDX-License-Identifier: Apache-2.0
"""The multiple-choice knapsack: one option of every group, the least cost in all that fits a budget.

    minimize over x    sum_i c[i, x_i]    such that    sum_i s[i, x_i] <= B

Groups are taken one after the other. Of the sums that some options of the first groups have, one that
is neither smaller nor cheaper than another is dropped, and so is one from which not even the relaxed
rest gets below a solution that is known. Both drop nothing that the least cost needs, so what is left
at the end is exact. The bound is Lagrange's: for any price of a byte, lambda >= 0,

    L(lambda)  =  sum_i min_x (c[i, x] + lambda s[i, x])  -  lambda B    <=    the least cost

==============  ===========================================================================
papers          here
==============  ===========================================================================
c, s            ``costs``, ``sizes``: of each group, of each option
B               ``budget``
lambda          ``price``, where ``L`` is greatest: the least at which the relaxed choice fits
upper bound     ``known``: the cost of the relaxed choice, which does fit there
==============  ===========================================================================

The relaxed choice is what a greedy one by cost saved per byte ends at; what it leaves unspent, at most
one option's step, is the gap that the exact one closes.

References:
  Everett, Generalized Lagrange Multiplier Method for Solving Problems of Optimum Allocation of
  Resources, Operations Research 11, 1963, https://doi.org/10.1287/opre.11.3.399 (the relaxed choice).
  Nemhauser, Ullmann, Discrete Dynamic Programming and Capital Allocation, Management Science 15, 1969,
  https://doi.org/10.1287/mnsc.15.9.494 (lists of sums without dominated ones).
  Sinha, Zoltners, The Multiple-Choice Knapsack Problem, Operations Research 27, 1979,
  https://doi.org/10.1287/opre.27.3.503.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

# Sums of the same numbers in another order differ by their last bits; a solution is not lost for those.
_ROUNDING = 1e-9
_HALVINGS = 128  # of an interval of prices: to the last bit of a float64 and then some

Costs = Sequence[Float[np.ndarray, " _"]]
Sizes = Sequence[Int[np.ndarray, " _"]]


def solve(costs: Costs, sizes: Sizes, budget: int) -> tuple[int, ...]:
    """Chooses an option of each group.

    Args:
      costs: of each group, of each of its options; finite.
      sizes: likewise.
      budget: what the sizes of the chosen options may add up to.

    Returns:
      The place of the chosen option in each group: the least cost, to a billionth; among choices of the
      same cost one of the smallest. The same input gives the same choice.

    Raises:
      ValueError: not even the smallest options fit.

    Example:
      >>> solve([np.array([0.0, 3.0]), np.array([0.0, 1.0])], [np.array([8, 4])] * 2, 12)
      (0, 1)
    """
    least = sum(int(size.min()) for size in sizes)
    if least > budget:
        raise ValueError(f"the smallest options take {least}, the budget is {budget}")
    price, known = _relaxed(costs, sizes, budget)
    # What the groups after each one take and cost, at best.
    least_size = _after([float(size.min()) for size in sizes])
    least_priced = _after([float((c + price * s).min()) for c, s in zip(costs, sizes, strict=True)])
    most = known + _ROUNDING * max(1.0, abs(known))
    total_cost, total_size = np.zeros(1), np.zeros(1, np.int64)
    ways = []
    for i, (cost, size) in enumerate(zip(costs, sizes, strict=True)):
        longer_cost = (total_cost[:, None] + cost).ravel()
        longer_size = (total_size[:, None] + size).ravel()
        bound = longer_cost + least_priced[i] - price * (budget - longer_size)
        kept = np.flatnonzero((longer_size + least_size[i] <= budget) & (bound <= most))
        kept = kept[_undominated(longer_cost[kept], longer_size[kept])]
        total_cost, total_size = longer_cost[kept], longer_size[kept]
        ways.append(np.divmod(kept, len(cost)))
    chosen, at = [], len(total_cost) - 1  # by growing size, so by falling cost
    for earlier, option in reversed(ways):
        chosen.append(int(option[at]))
        at = earlier[at]
    return tuple(reversed(chosen))


def _relaxed(costs: Costs, sizes: Sizes, budget: int) -> tuple[float, float]:
    """The least price at which the options that are best for it fit, and what those cost."""
    cost, size = _padded(costs, np.inf), _padded(sizes, 0)
    low, high = 0.0, 1.0 + float(max(map(np.ptp, costs)))  # sizes are whole numbers
    price = low
    for _ in range(_HALVINGS):
        # Of equally good options the smallest, so that a high price chooses the smallest of all.
        priced = cost + price * size
        best = priced == priced.min(axis=1, keepdims=True)
        if np.where(best, size, np.inf).min(axis=1).sum() <= budget:
            high = price
        else:
            low = price
        if high == low:
            break
        price = (low + high) / 2
    priced = cost + high * size
    best = priced == priced.min(axis=1, keepdims=True)
    smallest = np.where(best, size, np.inf).argmin(axis=1)
    return high, float(np.take_along_axis(cost, smallest[:, None], axis=1).sum())


def _padded(values: Sequence[np.ndarray], filling: float) -> Float[np.ndarray, "groups options"]:
    """One array of all groups, those of fewer options filled up."""
    most = max(map(len, values))
    return np.stack(
        [np.pad(v.astype(float), (0, most - len(v)), constant_values=filling) for v in values]
    )


def _after(values: Sequence[float]) -> np.ndarray:
    """The sum of all later entries, for each."""
    return np.cumsum([0, *values[:0:-1]])[::-1]


def _undominated(cost: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Places of the sums that no other is both as small and as cheap as, by growing size."""
    order = np.lexsort((cost, size))
    cheapest_before = np.minimum.accumulate(np.concatenate([[np.inf], cost[order][:-1]]))
    return order[cost[order] < cheapest_before]
