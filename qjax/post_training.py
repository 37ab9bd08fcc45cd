# SPDX-License-Identifier: Apache-2.0
"""Post-training quantization of a whole model at once: asks the recipe about each layer, quantizes it."""

from collections.abc import Callable
from typing import TypeVar

import jax
from flax import nnx

from qjax import assignment, layer_quantization
from qjax.method import Method
from qjax.observation import Observed
from qjax.ranges import RangeSearch
from qjax.report import QuantizationReport
from qjax.scheme import Recipe

Model = TypeVar("Model", bound=nnx.Module)


def quantize_model(
    model: Model,
    recipe: str | Recipe,
    observed: Observed | None = None,
    *,
    method: str | Method = "rtn",
    search: RangeSearch | None = None,
    on_layer: Callable[[str], None] = lambda path: None,
) -> tuple[Model, QuantizationReport]:
    """Quantizes the weights of a Flax NNX model.

    Stock ``nnx.Linear``, ``nnx.LinearGeneral``, ``nnx.Einsum`` and ``nnx.Embed`` layers are reached;
    norms, embeddings and the output head only if a rule names them (:class:`qjax.Recipe`).

    Args:
      model: left as it is; its arrays are shared with the result where they stay unquantized.
      recipe: which layers are held how; a scheme's name means that scheme everywhere.
      observed: what the layers multiplied (:func:`qjax.calibrate`), all of them in the unquantized
        model; :func:`qjax.quantize_sequentially` lets each see the quantized ones before it.
      method: how weights are rounded, or its name. Layers that were not observed, that saw fewer tokens
        than a Hessian needs, as experts may, and tables of embeddings are rounded to nearest; the report
        says so.
      search: how the range of each tile is chosen, where ``method`` is a name; None: as suits it.
      on_layer: called with the path of each layer before it is quantized; for progress bars.

    Returns:
      The quantized model and the report of every layer.

    Raises:
      ValueError: no layer is quantized at all, a layer's weight holds NaN or a group size does not
        divide it, a layer is quantized already, two layers share a weight that the recipe holds in
        two ways (the message begins with the layer's path), or the method or a static scheme needs to
        see activations and ``observed`` is missing.

    Example:
      >>> from flax import nnx
      >>> model = nnx.Linear(256, 64, rngs=nnx.Rngs(0))
      >>> quantized, report = quantize_model(nnx.Sequential(model), "w4a16-g128")
      >>> report.layers[0].path, report.layers[0].bytes_after
      ('layers/0', 8704)
    """
    recipe = Recipe.uniform(recipe) if isinstance(recipe, str) else recipe
    method = Method.parse(method, search, recipe) if isinstance(method, str) else method
    method.check(recipe)
    if method.by_block:
        raise ValueError(
            f"{method.name} changes what feeds a layer, or layers together, which needs the model in "
            "blocks; qjax.quantize_sequentially takes it block by block"
        )
    if method.looks_at_inputs(recipe) and observed is None:
        scheme = recipe.static_scheme
        needing = method.name if method.calibrated or scheme is None else scheme.name
        raise ValueError(f"{needing} needs what the layers multiply: give qjax.calibrate's result")
    result = copied(model)
    assigned = assignment.assign(result, recipe)
    known = {} if observed is None else layer_quantization.inputs_of(observed)
    reports = []
    for path in assigned.layers:
        if assigned.scheme(path) is not None:
            on_layer(path)
        inputs, fallback = known.get(path), ""
        how = method
        if inputs is not None and method.needs_hessians and inputs.shortage:
            fallback = f"{inputs.shortage}: rounded to nearest"
            inputs, how = inputs.without_hessian, method.without_inputs
        reports.append(layer_quantization.quantize_layer(path, assigned, how, inputs, fallback))
    return result, QuantizationReport(
        layers=tuple(reports), unmatched_rules=assigned.unmatched_rules
    )


def copied(model: Model) -> Model:
    """New variables around the same arrays: training or quantizing them does not move the original."""
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf, state))
