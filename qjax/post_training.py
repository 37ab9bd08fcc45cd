# SPDX-License-Identifier: Apache-2.0
"""Post-training quantization of a whole model: finds the weights, asks the recipe, calls an algorithm."""

import time
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Integer

from qjax import nnx_layers, qtensor
from qjax.algorithms import round_nearest
from qjax.qtensor import QTensor
from qjax.ranges import RangeSearch
from qjax.report import LayerReport, QuantizationReport
from qjax.scheme import Recipe, Rule, Scheme

Model = TypeVar("Model", bound=nnx.Module)


def quantize_model(
    model: Model,
    recipe: str | Recipe,
    *,
    search: RangeSearch = RangeSearch(),  # noqa: B008  frozen
    on_layer: Callable[[str], None] = lambda path: None,
) -> tuple[Model, QuantizationReport]:
    """Quantizes the weights of a Flax NNX model by rounding to nearest.

    Stock ``nnx.Linear``, ``nnx.LinearGeneral``, ``nnx.Einsum`` and ``nnx.Embed`` layers are reached;
    norms, embeddings and the output head only if a rule names them (:class:`qjax.Recipe`).

    Args:
      model: left as it is; its arrays are shared with the result where they stay unquantized.
      recipe: which layers are held how; a scheme's name means that scheme everywhere.
      search: how the range of each tile is chosen.
      on_layer: called with the path of each layer before it is quantized; for progress bars.

    Returns:
      The quantized model and the report of every layer.

    Raises:
      ValueError: no layer is quantized at all, a layer's weight holds NaN or a group size does not
        divide it, a layer is quantized already, or two layers share a weight that the recipe holds in
        two ways; the message begins with the layer's path.

    Example:
      >>> from flax import nnx
      >>> model = nnx.Linear(256, 64, rngs=nnx.Rngs(0))
      >>> quantized, report = quantize_model(nnx.Sequential(model), "w4a16-g128")
      >>> report.layers[0].path, report.layers[0].bytes_after
      ('layers/0', 8704)
    """
    recipe = Recipe.uniform(recipe) if isinstance(recipe, str) else recipe
    graphdef, state = nnx.split(model)
    # New variables around the same arrays: training the result must not move the original.
    result = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf, state))
    layers = list(nnx_layers.quantizable_layers(result))
    deciding = {
        path: recipe.rule_for(path, protected=isinstance(layer, nnx.Embed))
        for path, layer in layers
    }
    if not any(rule and rule.scheme for rule in deciding.values()):
        raise ValueError(_nothing_matches(recipe, [path for path, _ in layers]))
    first_of = _sharing(layers, deciding)
    reports = []
    for path, layer in layers:
        rule = deciding[path]
        if rule is None or rule.scheme is None:
            reason = "no rule names it" if rule is None else f"rule {rule.pattern!r} says so"
            reports.append(_left_alone(path, layer, reason))
            continue
        on_layer(path)
        if path in first_of:
            reports.append(_share(path, layer, rule.scheme, *first_of[path]))
            continue
        reports.append(_quantize_layer(path, layer, rule.scheme, search))
    used = {id(rule) for rule in deciding.values()}
    unmatched = tuple(rule.pattern for rule in recipe.rules if id(rule) not in used)
    return result, QuantizationReport(layers=tuple(reports), unmatched_rules=unmatched)


def _quantize_layer(
    path: str, layer: nnx_layers.QuantizableLayer, scheme: Scheme, search: RangeSearch
) -> LayerReport:
    start = time.perf_counter()
    w = nnx_layers.weight_of(layer)
    if isinstance(w, QTensor):
        raise ValueError(f"{path}: already quantized to {w.format.name}; start from the original")
    axis = _contraction_axes(path, layer)
    stacked = nnx_layers.stacked_axes(layer)
    q = round_nearest.quantize(w, scheme, axis=axis, stacked=stacked, search=search, name=path)
    error, saturated = _compared(w, q)
    nnx_layers.install(layer, q)
    return LayerReport(
        path=path,
        scheme=scheme.name,
        method="rtn",
        shape=tuple(w.shape),
        relative_output_error=float(error),
        bytes_before=w.nbytes,
        bytes_after=q.nbytes,
        seconds=time.perf_counter() - start,
        saturated=int(saturated),
    )


def _contraction_axes(path: str, layer: nnx_layers.QuantizableLayer) -> tuple[int, ...]:
    try:
        return nnx_layers.contraction_axes(layer)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _sharing(
    layers: list[tuple[str, nnx_layers.QuantizableLayer]], deciding: dict[str, Rule | None]
) -> dict[str, tuple[str, nnx_layers.QuantizableLayer]]:
    """Every layer that uses an earlier layer's weight variable, with that layer's path and itself.

    Raises:
      ValueError: the recipe holds the two in different ways.
    """
    first: dict[int, tuple[str, nnx_layers.QuantizableLayer]] = {}
    result = {}
    for path, layer in layers:
        earlier_path, earlier = first.setdefault(id(nnx_layers.variable_of(layer)), (path, layer))
        if earlier is layer:
            continue
        rules = deciding[path], deciding[earlier_path]
        ours, theirs = (rule.scheme if rule else None for rule in rules)
        if ours != theirs:
            names = [scheme.name if scheme else "plain" for scheme in (ours, theirs)]
            raise ValueError(
                f"{path}: is to be {names[0]}, but it shares its weight with {earlier_path}, which is "
                f"to be {names[1]}; give both the same scheme"
            )
        result[path] = earlier_path, earlier
    return result


def _share(
    path: str,
    layer: nnx_layers.QuantizableLayer,
    scheme: Scheme,
    earlier_path: str,
    earlier: nnx_layers.QuantizableLayer,
) -> LayerReport:
    """Gives a layer the QTensor of the earlier one; no bytes are counted twice."""
    ours, theirs = _contraction_axes(path, layer), nnx_layers.contraction_axes(earlier)
    if ours != theirs:
        raise ValueError(
            f"{path}: sums over axes {ours} of a weight that {earlier_path} shares and sums over "
            f"{theirs}; leave both plain"
        )
    nnx_layers.share(layer, earlier)
    return LayerReport(
        path=path,
        scheme=scheme.name,
        method="rtn",
        shape=nnx_layers.weight_of(layer).shape,
        relative_output_error=None,
        bytes_before=0,
        bytes_after=0,
        seconds=0.0,
        reason=f"shares the weight of {earlier_path}",
    )


def _left_alone(path: str, layer: nnx_layers.QuantizableLayer, reason: str) -> LayerReport:
    w = nnx_layers.weight_of(layer)
    return LayerReport(
        path=path,
        scheme=None,
        method=None,
        shape=tuple(w.shape),
        relative_output_error=None,
        bytes_before=w.nbytes,
        bytes_after=w.nbytes,
        seconds=0.0,
        reason=reason,
    )


@jax.jit
def _compared(w: Float[Array, "..."], q: QTensor) -> tuple[Float[Array, ""], Integer[Array, ""]]:
    """The relative error of the finite weights, and how many are infinite."""
    near = qtensor.dequantize(q, jnp.float32)
    known = jnp.isfinite(w)
    w = jnp.where(known, w.astype(jnp.float32), near)  # an infinity has no relative error
    wrong = jnp.linalg.norm(near - w)
    error = wrong / jnp.maximum(jnp.linalg.norm(w), jnp.finfo(jnp.float32).tiny)
    return error, jnp.sum(~known)


def _nothing_matches(recipe: Recipe, paths: list[str]) -> str:
    if not paths:
        return "the model has no nnx.Linear, nnx.LinearGeneral, nnx.Einsum or nnx.Embed layer"
    patterns = ", ".join(repr(rule.pattern) for rule in recipe.rules)
    return f"no rule ({patterns}) quantizes a layer; paths look like {', '.join(paths[:3])}"
