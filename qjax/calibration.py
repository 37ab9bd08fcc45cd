# SPDX-License-Identifier: Apache-2.0
"""Calibration of a whole model at once: every layer's statistics, in the model as it is."""

import functools
from collections.abc import Iterable
from typing import Any

import jax
from flax import nnx

from qjax import observation
from qjax.observation import ExpertTokens, Observed


def calibrate(
    model: nnx.Module,
    batches: Iterable[Any],
    *,
    hessians: bool = True,
    experts: ExpertTokens = "routed",
) -> Observed:
    """Runs a model on calibration data and keeps statistics of what its layers multiply.

    All Hessians are alive together, four bytes for each pair of inputs of a layer;
    :func:`qjax.quantize_sequentially` keeps those of one block at a time.

    Args:
      model: any NNX module of stock layers, called as ``model(batch)``. Batches of equal shape are
        compiled once; arrays that are sharded over a mesh are taken as they lie.
      batches: what it is called with.
      hessians: whether to take second moments, as GPTQ needs; extremes and magnitudes are always taken.
      experts: what an expert is calibrated with: ``"routed"``, the tokens that are sent to it, or
        ``"all"``.

    Returns:
      The statistics, for :func:`qjax.quantize_model`.

    Raises:
      TypeError: the model is no NNX module.
      ValueError: no batch, a layer that is called twice in a pass, or one that multiplies a batch of
        weights.

    Example:
      >>> import jax.numpy as jnp
      >>> model = nnx.Sequential(nnx.Linear(8, 4, rngs=nnx.Rngs(0)))
      >>> calibrate(model, [jnp.ones((3, 8)), jnp.zeros((3, 8))])["layers/0"].rows.item()
      6
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"calibration looks at the layers of an nnx.Module, got {type(model).__name__}: in a "
            "function, or a module of another kind, they cannot be found"
        )
    graphdef, state = nnx.split(model)
    total = None
    for batch in batches:
        found = _observed(graphdef, state, batch, hessians=hessians, experts=experts)
        total = observation.merged(total, found)
    if total is None:
        raise ValueError("calibration needs at least one batch")
    return total


@functools.partial(jax.jit, static_argnames=("graphdef", "hessians", "experts"))
def _observed(
    graphdef: Any, state: Any, batch: Any, *, hessians: bool, experts: ExpertTokens
) -> Observed:
    model = nnx.merge(graphdef, state)
    return observation.observe(model, lambda: model(batch), hessians=hessians, experts=experts)
