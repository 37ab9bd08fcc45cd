# SPDX-License-Identifier: Apache-2.0
"""What each layer of a model costs in each scheme: bytes, and what the output loses when it alone is so.

    kl[g, s]  =  KL( model  |  model whose layers g are held in scheme s )      on some windows of tokens

Layers that are handed the same array, queries, keys and values or gate and up, go together: they are
multiplied as one weight where a kernel does it, and servers want one scheme for them. So do layers that
share a weight.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from qjax import assignment, evaluation, nnx_layers, observation, rescaling
from qjax.algorithms import round_nearest
from qjax.formats import device_bytes
from qjax.method import Method
from qjax.observation import Observed
from qjax.post_training import copied, quantize_model
from qjax.qtensor import QTensor
from qjax.scheme import Recipe, Rule, Scheme


@dataclass(frozen=True, kw_only=True)
class LayerGroup:
    """Layers that are held in one scheme.

    Attributes:
      layers: their paths.
      weights: numbers in all of them, a shared weight counted once.
      nbytes: what the weights take in each scheme that all the layers can be held in, scales and zeros
        included; None: as they are.
    """

    layers: tuple[str, ...]
    weights: int
    nbytes: Mapping[Scheme | None, int]

    def rule(self, scheme: Scheme | None) -> Rule:
        """The line of a recipe that holds these layers so.

        >>> LayerGroup(layers=("mlp/gate", "mlp/up"), weights=0, nbytes={}).rule(None).pattern
        'mlp/(gate|up)'
        """
        places, names = zip(*(path.rpartition("/")[::2] for path in self.layers), strict=True)
        if len(self.layers) == 1 or len(set(places)) > 1 or not places[0]:
            pattern = "|".join(map(re.escape, self.layers))
        else:
            pattern = f"{re.escape(places[0])}/({'|'.join(map(re.escape, names))})"
        return Rule(pattern=pattern, scheme=scheme)


def layer_groups(
    model: nnx.Module, tokens: Int[np.ndarray, "n length"], candidates: Sequence[Scheme]
) -> tuple[LayerGroup, ...]:
    """The layers of a model that one scheme for all would reach, in groups, and what they take.

    Args:
      model: from tokens to logits, not quantized; shapes in place of arrays will do, for nothing is
        computed.
      tokens: windows, of which the shape counts.
      candidates: schemes to hold layers in. One that a layer cannot be held in, because its groups do
        not divide the layer's inputs, is none of its group's.

    Returns:
      The groups in the order in which the model calls them.

    Raises:
      ValueError: there is no candidate, no layer can be held in any, or a layer is quantized already.
      NotImplementedError: a candidate quantizes activations.
    """
    if not candidates:
        raise ValueError("a budget chooses among candidates: give at least one")
    for scheme in candidates:
        if scheme.activations is not None:
            raise NotImplementedError(
                f"{scheme.name}: a budget chooses among schemes of weights alone, for what a layer "
                "with quantized activations costs would be another program for each"
            )
    assigned = assignment.assign(model, Recipe.uniform(candidates[0]))
    if held := [path for path in assigned.quantized if _is_quantized(assigned.layers[path])]:
        raise ValueError(f"{held[0]}: already quantized; start from the original")
    refusals: list[str] = []
    groups = []
    for layers in _together(model, tokens, assigned):
        own = {path: assigned.layers[path] for path in layers if path not in assigned.shared}
        arrays = [nnx_layers.weight_of(layer) for layer in own.values()]
        nbytes: dict[Scheme | None, int] = {}
        for scheme in candidates:
            try:
                nbytes[scheme] = sum(_held_bytes(path, own[path], scheme) for path in own)
            except ValueError as error:  # it names the layer and what does not fit
                refusals.append(str(error))
        nbytes[None] = device_bytes(arrays)
        weights = sum(array.size for array in arrays)
        groups.append(LayerGroup(layers=layers, weights=weights, nbytes=nbytes))
    if all(list(group.nbytes) == [None] for group in groups):
        raise ValueError(f"no layer can be held in any of the candidates: {refusals[0]}")
    return tuple(groups)


def measure(
    model: Any,
    tokens: Int[np.ndarray, "n length"],
    baseline: Float[np.ndarray, "n length V"],
    groups: Sequence[LayerGroup],
    *,
    method: str | Method = "rtn",
    observed: Observed | None = None,
    on_step: Callable[[str], None] = lambda what: None,
) -> tuple[dict[Scheme | None, float], ...]:
    """The divergence of a model's output from itself, one group in one scheme at a time.

    The model is compiled once: the values that a scheme makes of weights take the weights' places. It
    computes in its own dtype: in float32 what 8 bits cost is measured, in bfloat16 it drowns.

    Args:
      model: an ``nnx.Module`` from tokens to logits; left as it is.
      tokens: windows to measure on.
      baseline: the model's logits there (:func:`qjax.evaluation.logits_of`).
      groups: of its layers (:func:`layer_groups`).
      method: how weights are rounded, as in :func:`qjax.quantize_model`.
      observed: what the layers multiply, for a method that wants to see it.
      on_step: called after each of the :func:`steps`; for progress bars.

    Returns:
      For each group the divergence in nats a token by scheme; None, as it is: 0.

    Raises:
      ValueError: as :func:`qjax.quantize_model` and :func:`qjax.evaluate` do.
    """
    result = []
    for group in groups:
        found: dict[Scheme | None, float] = {}
        for scheme in group.nbytes:
            if scheme is None:
                found[None] = 0.0
            else:
                recipe = Recipe(rules=(group.rule(scheme),))
                found[scheme] = divergence(
                    model, tokens, baseline, recipe, method=method, observed=observed
                )
                on_step(f"{group.layers[0]} in {scheme.name}")
        result.append(found)
    return tuple(result)


def steps(groups: Sequence[LayerGroup]) -> int:
    """How many models :func:`measure` looks at."""
    return sum(len(group.nbytes) - 1 for group in groups)


def divergence(
    model: Any,
    tokens: Int[np.ndarray, "n length"],
    baseline: Float[np.ndarray, "n length V"],
    recipe: Recipe,
    *,
    method: str | Method = "rtn",
    observed: Observed | None = None,
) -> float:
    """The divergence of a model from what it is, when a recipe is applied to it.

    Args:
      model: an ``nnx.Module`` from tokens to logits; left as it is.
      tokens: windows to measure on.
      baseline: its logits there.
      recipe: of schemes of weights.
      method: as in :func:`measure`.
      observed: likewise.
    """
    held, _ = quantize_model(model, recipe, observed, method=method)
    changed = rescaling.simulated(copied(model), held)
    kl = evaluation.evaluate(changed, tokens, baseline=baseline).kl
    assert kl is not None
    return max(0.0, kl)  # what rounding of its sums may leave below


def _is_quantized(layer: nnx_layers.QuantizableLayer) -> bool:
    return isinstance(nnx_layers.weight_of(layer), QTensor)


def _held_bytes(path: str, layer: nnx_layers.QuantizableLayer, scheme: Scheme) -> int:
    axis, stacked = nnx_layers.contraction_axes(layer), nnx_layers.stacked_axes(layer)
    weight = nnx_layers.weight_of(layer)
    q = jax.eval_shape(
        lambda w: round_nearest.quantize(w, scheme, axis=axis, stacked=stacked, name=path), weight
    )
    return q.nbytes


def _together(
    model: nnx.Module, tokens: Int[np.ndarray, "n length"], assigned: assignment.Assignment
) -> list[tuple[str, ...]]:
    """The layers that are to be quantized, in groups of those that share an input or a weight."""
    graphdef, state = nnx.split(model)
    by_input: list[tuple[str, ...]] = []

    def watch(state: Any, batch: Any) -> None:
        traced = nnx.merge(graphdef, state)
        by_input.extend(observation.layers_by_input(traced, lambda: traced(batch)))

    jax.eval_shape(watch, state, jax.ShapeDtypeStruct((1, tokens.shape[1]), jnp.int32))
    wanted = assigned.quantized
    by_weight = [(path, earlier) for path, earlier in assigned.shared.items() if path in wanted]
    groups: list[tuple[str, ...]] = []
    for layers in (*by_input, *by_weight, *((path,) for path in wanted)):
        joined = tuple(path for path in layers if path in wanted)
        meeting = [group for group in groups if not set(group).isdisjoint(joined)]
        if not meeting:
            groups += [joined] if joined else []
            continue
        # Where the first of them stands, all of them.
        union = tuple(dict.fromkeys(path for group in (*meeting, joined) for path in group))
        groups[groups.index(meeting[0])] = union
        groups = [group for group in groups if group not in meeting[1:]]
    return groups
