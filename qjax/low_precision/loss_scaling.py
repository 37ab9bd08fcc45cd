# SPDX-License-Identifier: Apache-2.0
"""Dynamic loss scaling: float16 training that loses no small gradients and survives large ones.

    g = grad(scale * loss) / scale,       in float32
    finite:    inner update;  after ``growth_interval`` such steps in a row    scale <- growth * scale
    not:       no update, inner state as it was, one more skipped step,        scale <- backoff * scale

float16 ends at 65504 above and at 2**-24 below, where many gradients lie. Multiplying the loss moves them
all up; too large a scale overflows, which shows, and then the step is left out and the scale shrinks.

=====================================  =================================================================
paper                                  here
=====================================  =================================================================
scaling factor S                       ``DynamicLossScale.loss_scale``
"unscale before the weight update"     in float32, before ``inner``: clipping and moments see true sizes
"skip the update when an overflow is   :func:`dynamic_loss_scaling`; ``skipped_steps`` counts
detected" (section 3.2)
FP32 master copy (section 3.1)         the parameters themselves: see below
=====================================  =================================================================

The paper keeps float32 masters beside float16 weights. In Flax the parameters *are* the masters: a layer
with ``dtype=jnp.float16, param_dtype=jnp.float32`` casts its float32 kernel in each call, and the
gradient of that cast is float32 again. Nothing else need be held.

The factor is not let below ``least``. An overflow there cannot be the scale's doing: the step is skipped
as ever, the scale stays, and ``stuck_steps`` counts it, so that a training loop can stop on a model that
makes NaN. The paper names no numbers for growth; 2**15, 2000 and 2 are common.

References:
  Micikevicius, Narang, Alben, Diamos, Elsen, Garcia, Ginsburg, Houston, Kuchaiev, Venkatesh, Wu, Mixed
  Precision Training, ICLR 2018, https://arxiv.org/abs/1710.03740.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree


class DynamicLossScale(NamedTuple):
    """State of :func:`dynamic_loss_scaling`.

    Attributes:
      loss_scale: what the loss is to be multiplied by in the next step; float32.
      good_steps: steps without overflow since the scale last changed.
      skipped_steps: steps left out because a gradient was not finite, in all.
      stuck_steps: those of them with the scale already at its least.
      inner_state: of the wrapped optimizer.
    """

    loss_scale: Float[Array, ""]
    good_steps: Int[Array, ""]
    skipped_steps: Int[Array, ""]
    stuck_steps: Int[Array, ""]
    inner_state: Any


def dynamic_loss_scaling(
    inner: optax.GradientTransformation,
    *,
    initial: float = 2.0**15,
    growth_interval: int = 2000,
    growth: float = 2.0,
    backoff: float = 0.5,
    least: float = 1.0,
    greatest: float = 2.0**24,
) -> optax.GradientTransformationExtraArgs:
    """Lets an optimizer work on gradients of a scaled loss, and skips steps that overflowed.

    The check is over all gradients of all devices: under ``jit`` a sharded array is one array. Clipping
    and everything else that looks at sizes belongs inside ``inner``. So does ``optax.MultiSteps``: a
    micro-batch that overflows is left out and counted. The other way round it would not work, for
    ``MultiSteps`` empties its sums by multiplying with zero, and an infinity among them stays as NaN.

    Args:
      inner: the optimizer.
      initial: scale of the first step.
      growth_interval: steps without overflow after which the scale grows.
      growth: factor of growth, above 1.
      backoff: factor after an overflow, in (0, 1).
      least: the scale does not fall below it.
      greatest: the scale does not grow beyond it.

    Raises:
      ValueError: a number is out of its range.

    Example:
      >>> optimizer = dynamic_loss_scaling(optax.adam(1e-3))
      >>> params = {"w": jnp.ones(3)}
      >>> state = optimizer.init(params)
      >>> loss = lambda p: jnp.sum(p["w"] ** 2) * loss_scale(state)  # the one line
      >>> updates, state = optimizer.update(jax.grad(loss)(params), state, params)
      >>> float(loss_scale(state)), int(state.skipped_steps)
      (32768.0, 0)
    """
    _check(initial, growth_interval, growth, backoff, least, greatest)
    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> DynamicLossScale:
        zero = jnp.zeros((), jnp.int32)
        return DynamicLossScale(
            loss_scale=jnp.float32(initial), good_steps=zero, skipped_steps=zero, stuck_steps=zero,
            inner_state=inner.init(params),
        )  # fmt: skip

    def update(
        updates: PyTree, state: DynamicLossScale, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, DynamicLossScale]:
        finite = _all_finite(updates)
        true = jax.tree.map(lambda g: g.astype(jnp.float32) / state.loss_scale, updates)
        stepped, inner_state = inner.update(true, state.inner_state, params, **extra)
        stepped = jax.tree.map(lambda u: jnp.where(finite, u, jnp.zeros_like(u)), stepped)
        inner_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), inner_state, state.inner_state
        )
        grows = finite & (state.good_steps + 1 >= growth_interval)
        grown = jnp.minimum(state.loss_scale * growth, greatest)
        shrunk = jnp.maximum(state.loss_scale * backoff, least)
        skipped = jnp.logical_not(finite)
        stuck = skipped & (state.loss_scale <= least)
        return stepped, DynamicLossScale(
            loss_scale=jnp.where(finite, jnp.where(grows, grown, state.loss_scale), shrunk),
            good_steps=jnp.where(finite & ~grows, state.good_steps + 1, 0),
            skipped_steps=state.skipped_steps + skipped.astype(jnp.int32),
            stuck_steps=state.stuck_steps + stuck.astype(jnp.int32),
            inner_state=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def loss_scale(opt_state: Any) -> Float[Array, ""]:
    """The factor for the loss, wherever in an optimizer's state it lies.

    Args:
      opt_state: of optax, or ``nnx.Optimizer.opt_state``.

    Raises:
      ValueError: no :func:`dynamic_loss_scaling` is part of the optimizer, or several are.
    """
    found = optax.tree.get_all_with_path(opt_state, "loss_scale")
    if len(found) != 1:
        raise ValueError(
            f"the optimizer's state holds {len(found)} loss scales, need 1: wrap the optimizer in "
            "dynamic_loss_scaling, once"
        )
    return jnp.asarray(found[0][1])


def _all_finite(tree: PyTree) -> Bool[Array, ""]:
    leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(leaves)) if leaves else jnp.array(True)


def _check(
    initial: float,
    growth_interval: int,
    growth: float,
    backoff: float,
    least: float,
    greatest: float,
) -> None:
    for name, value in {"initial": initial, "least": least, "greatest": greatest}.items():
        if not 0 < value < math.inf:
            raise ValueError(f"a loss scale is a positive number, got {name}={value}")
    if not least <= initial <= greatest:
        raise ValueError(f"need least <= initial <= greatest, got {least=} {initial=} {greatest=}")
    if growth_interval < 1:
        raise ValueError(f"growth_interval counts steps, at least 1, got {growth_interval=}")
    if not 1 < growth < math.inf:
        raise ValueError(f"a growth factor is above 1, got {growth=}")
    if not 0 < backoff < 1:
        raise ValueError(f"a backoff factor lies in (0, 1), got {backoff=}")
