# SPDX-License-Identifier: Apache-2.0
"""Training on the grid itself: parameters are always worth what they will be once quantized.

    m  <-  m + inner(gradient at Q(m)),       parameters  <-  Q(m)

The full-precision weights ``m`` are part of the optimizer's state; what the model sees, and what any
checkpoint of its parameters holds, lies on the quantization grid ``Q``. This is the straight-through
estimator told from the optimizer's side: the gradient at the rounded weights moves the unrounded ones.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from qjax.qat import form, parameter_tree
from qjax.qat.parameter_tree import Axes, Weights
from qjax.scheme import Recipe

Stages = Sequence[tuple[int, str | Recipe]]


class StraightThroughState(NamedTuple):
    """State of :func:`straight_through`.

    Attributes:
      step: updates so far.
      masters: all parameters, in float32.
      inner: of the optimizer inside.
    """

    step: Int[Array, ""]
    masters: Any
    inner: Any


def straight_through(
    inner: optax.GradientTransformation,
    recipe: str | Recipe | Stages,
    *,
    frozen: Mapping[str, int] | None = None,
    axes: Axes | None = None,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer whose parameters stay on a quantization grid.

    ``init`` takes full-precision parameters; :func:`on_grid` gives those that the model is to begin with.
    Each update ends on the grid to within the rounding of one addition in the parameters' dtype, since
    optax adds updates to parameters; the masters are exact, and float32 whatever the parameters are.

    Args:
      inner: moves the masters.
      recipe: which layers are held how; or stages of a schedule, ``[(first step, recipe), ...]`` from
        step 0 on, each tightening the grid of the one before: the same layers in fewer bits.
      frozen: the update from which on the masters of layers stay as they are, by regular expressions over
        their whole paths; the first that matches decides. A later stage still tightens their grid.
      axes: as in :func:`qjax.fake_quant`.

    Raises:
      ValueError: stages that do not begin at 0 or are not in order; and in ``init`` what
        :func:`qjax.fake_quant` raises, a pattern that matches no quantized layer, or a stage that is of
        other layers than the one before or gives one more bits.

    Example:
      >>> params = {"kernel": jnp.linspace(-1, 1, 8).reshape(4, 2)}
      >>> optimizer = straight_through(optax.sgd(0.1), "w4a16-channel")
      >>> state = optimizer.init(params)
      >>> params = on_grid(params, "w4a16-channel")
      >>> updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
      >>> sorted(masters(state))
      ['kernel']
    """
    stages = _stages(recipe)

    def found(params: Any) -> list[Weights]:
        return [parameter_tree.weights_of(params, rules, axes) for _, rules in stages]

    def init(params: Any) -> StraightThroughState:
        first, *later = found(params)
        for before, after, (step, _) in zip([first, *later], later, stages[1:], strict=False):
            _check_tightens(before, after, step)
        for pattern in frozen or {}:
            if not any(re.fullmatch(pattern, path) for path in first.forms):
                raise ValueError(
                    f"frozen: {pattern!r} matches no quantized layer; paths look like "
                    f"{', '.join(list(first.forms)[:3])}"
                )
        # Copies, even of what is not quantized: both may be given up for the next step's.
        full = jax.tree.map(_full, params)
        return StraightThroughState(jnp.zeros((), jnp.int32), full, inner.init(full))

    def update(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, StraightThroughState]:
        if params is None:
            raise ValueError(
                "straight_through needs the parameters: update(gradients, state, params)"
            )
        moves, inner_state = optax.with_extra_args_support(inner).update(
            updates, state.inner, state.masters, **extra
        )
        weights = found(params)
        moved = optax.apply_updates(state.masters, moves)
        moved = weights[0].map(
            lambda path, new, old: _kept(path, frozen or {}, state.step, new, old),
            moved, state.masters,
        )  # fmt: skip
        places = [
            lambda tree=tree, known=known: known.map(
                lambda path, w: form.fake_quantize(w, known.forms[path]), tree
            )
            for tree, known in ((moved, known) for known in weights)
        ]
        begun = sum((state.step >= first).astype(jnp.int32) for first, _ in stages[1:])
        target = jax.lax.switch(begun, places) if len(places) > 1 else places[0]()
        steps = jax.tree.map(_difference, target, params)
        return steps, StraightThroughState(state.step + 1, moved, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def on_grid(params: Any, recipe: str | Recipe | Stages, *, axes: Axes | None = None) -> Any:
    """The parameters that a model begins with under :func:`straight_through`.

    Args:
      params: in full precision.
      recipe: as there; of stages the first counts.
      axes: as there.
    """
    known = parameter_tree.weights_of(params, _stages(recipe)[0][1], axes)
    return known.map(lambda path, w: form.fake_quantize(w, known.forms[path]), params)


def masters(state: Any) -> Any:
    """The full-precision parameters in an optimizer's state, however deep they are.

    Args:
      state: of an optimizer that holds one :func:`straight_through`, alone or in a chain.

    Raises:
      ValueError: it holds none, or several.
    """

    def is_ours(node: Any) -> bool:
        return isinstance(node, StraightThroughState)

    found = [node for node in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(node)]
    if len(found) != 1:
        raise ValueError(f"one state of straight_through is needed, found {len(found)}")
    return found[0].masters


def _stages(recipe: str | Recipe | Stages) -> list[tuple[int, Recipe]]:
    stages = [(0, recipe)] if isinstance(recipe, str | Recipe) else list(recipe)
    starts = [first for first, _ in stages]
    if not stages or starts[0] != 0 or starts != sorted(set(starts)):
        raise ValueError(f"stages begin at step 0 and follow one another, got {starts}")
    return [
        (first, Recipe.uniform(rules) if isinstance(rules, str) else rules)
        for first, rules in stages
    ]


def _check_tightens(before: Weights, after: Weights, step: int) -> None:
    """Checks that a stage holds the layers of the one before it, in no more bits."""
    for path in [*before.forms, *after.forms]:
        bits = [
            weights.forms[path].scheme.weights.format.bits if path in weights.forms else None
            for weights in (before, after)
        ]
        if bits[0] is None or bits[1] is None or bits[1] > bits[0]:
            was, will = (f"{b} bits" if b else "not quantized" for b in bits)
            raise ValueError(
                f"{path}: {was} before step {step} and {will} from then on; stages tighten the grids of "
                "the same layers"
            )


def _full(leaf: Array) -> Array:
    """A copy in full precision."""
    leaf = jnp.copy(leaf)
    return leaf.astype(jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def _kept(path: str, frozen: Mapping[str, int], step: Any, new: Any, old: Any) -> Any:
    """The moved weight, or where its layer is frozen, the old one."""
    for pattern, first in frozen.items():
        if re.fullmatch(pattern, path):
            return jnp.where(step >= first, old, new)
    return new


def _difference(target: Float[Array, "..."], now: Float[Array, "..."]) -> Float[Array, "..."]:
    """What, added to where a parameter is, comes as near to its target as a sum can."""
    target = target.astype(now.dtype)
    step = target - now
    return step + (target - (now + step))
