# SPDX-License-Identifier: Apache-2.0
"""The least cost within a budget, against trying everything."""

import itertools

import numpy as np
import pytest

from qjax.algorithms import multiple_choice_knapsack
from qjax.algorithms.multiple_choice_knapsack import solve


def solve_reference(costs, sizes, budget) -> float:
    """The least cost of all choices that fit."""
    return min(
        sum(cost[x] for cost, x in zip(costs, choice, strict=True))
        for choice in itertools.product(*(range(len(cost)) for cost in costs))
        if sum(size[x] for size, x in zip(sizes, choice, strict=True)) <= budget
    )


def total(values, choice):
    return sum(of[x] for of, x in zip(values, choice, strict=True))


def problem(rng, kind: str, groups: int):
    """Costs and sizes; as a model's (falling, of layers of a few shapes), anything, or with ties."""
    costs, sizes = [], []
    for _ in range(groups):
        options = int(rng.integers(1, 5))
        size = rng.integers(1, 40, options)
        cost = rng.uniform(0, 1, options)
        if kind == "model":
            size = np.array([18, 25, 33, 65][:options]) * int(rng.choice([2, 4, 24]))
            cost = np.sort(rng.exponential(1, options) ** 3)[::-1]
        elif kind == "ties":
            cost = rng.integers(0, 3, options).astype(float)
        costs.append(cost.copy())
        sizes.append(size)
    return costs, sizes


@pytest.mark.parametrize("kind", ["model", "any", "ties"])
@pytest.mark.parametrize("seed", range(8))
def test_nothing_that_fits_is_cheaper(kind, seed):
    rng = np.random.default_rng(seed)
    costs, sizes = problem(rng, kind, groups=int(rng.integers(1, 7)))
    least, most = (sum(getattr(size, end)() for size in sizes) for end in ("min", "max"))
    for budget in {int(b) for b in np.linspace(least, most + 1, 7)}:
        choice = solve(costs, sizes, budget)
        assert total(sizes, choice) <= budget
        expected = solve_reference(costs, sizes, budget)
        assert total(costs, choice) == pytest.approx(expected, rel=1e-8, abs=1e-8)
        assert solve(costs, sizes, budget) == choice


def test_more_groups_than_can_be_tried():
    """The rest of the gap to Lagrange's bound is proved closed by a plain table over all bytes."""
    rng = np.random.default_rng(0)
    costs, sizes = problem(rng, "model", groups=60)
    budget = int(sum(size.mean() for size in sizes))
    choice = solve(costs, sizes, budget)
    best = np.full(budget + 1, np.inf)
    best[0] = 0.0
    for cost, size in zip(costs, sizes, strict=True):
        longer = np.full_like(best, np.inf)
        for c, s in zip(cost, size, strict=True):
            longer[s:] = np.minimum(longer[s:], best[: len(best) - s] + c)
        best = longer
    assert total(sizes, choice) <= budget
    assert total(costs, choice) == pytest.approx(best.min(), rel=1e-8)


def test_the_budget_is_spent_to_the_last_byte_where_that_is_best():
    """What a greedy choice by cost saved per byte leaves: here it takes the 6, and the 5s are better."""
    costs = [np.array([7.0, 0.0]), np.array([5.0, 0.0]), np.array([5.0, 0.0])]
    sizes = [np.array([0, 6]), np.array([0, 5]), np.array([0, 5])]
    assert solve(costs, sizes, 10) == (0, 1, 1)


def test_among_equals_the_smallest():
    assert solve([np.array([1.0, 1.0, 1.0])], [np.array([9, 4, 7])], 20) == (1,)


def test_a_budget_for_nothing_is_refused():
    with pytest.raises(ValueError, match="smallest options take 7, the budget is 6"):
        solve([np.zeros(2), np.zeros(1)], [np.array([4, 9]), np.array([3])], 6)


def test_few_sums_are_kept_of_a_large_model():
    """Sums are dropped early: 320 groups of bytes in the billions, with noise, take no time."""
    rng = np.random.default_rng(1)
    shapes = np.array([8192 * 10240, 8192 * 8192, 8192 * 57344, 8192 * 28672] * 80)
    sizes = [shape // 64 * np.array([18, 25, 33, 65, 128]) for shape in shapes]
    costs = [rng.lognormal(-6, 1) * np.array([30.0, 4.0, 1.0, 0.01, 0.0]) for _ in shapes]
    budget = int(sum(shapes) * 4.25 / 8)
    choice = solve(costs, sizes, budget)
    assert 0 <= budget - total(sizes, choice) < 8192 * 28672
    price, known = multiple_choice_knapsack._relaxed(costs, sizes, budget)
    bound = sum((c + price * s).min() for c, s in zip(costs, sizes, strict=True)) - price * budget
    assert bound - 1e-9 <= total(costs, choice) <= known + 1e-9
