# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters for the layers of a model: added, merged into its weights, quantized again.

A layer stays the stock Flax layer that it was, at its path; the adapter of :mod:`qjax.low_rank` goes into
its hook: ``layers/0/q_proj/dot_general/lora_a``. So the frozen model is trained by Flax's own means:

    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    gradients = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model, batch)

``wrt=nnx.Param`` would be more than that: Flax's LoRAParam is a Param, and so are norms and biases.
"""

import math
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from qjax import assignment, layer_quantization, low_rank, nnx_layers, qtensor
from qjax.assignment import Assignment
from qjax.low_rank import AdaptedDot, AdaptedEinsum, Adapter, Factors, KernelAxes
from qjax.method import Method
from qjax.nnx_layers import QuantizableLayer, QuantizedParam, Router
from qjax.post_training import copied
from qjax.qtensor import QTensor
from qjax.report import LayerReport, QuantizationReport
from qjax.scheme import Recipe, Rule

Model = TypeVar("Model", bound=nnx.Module)


def add_lora(
    model: Model,
    rank: int = 16,
    alpha: float = 32.0,
    layers: str | Sequence[str] = ".*_proj",
    *,
    seed: int = 0,
    dtype: DTypeLike = "float32",
) -> Model:
    """Freezes layers of a model, and puts a trainable low-rank correction beside each.

    Args:
      model: of stock ``nnx.Linear``, ``nnx.LinearGeneral`` and ``nnx.Einsum`` layers, stacked ones too;
        quantized (:func:`qjax.quantize_model`) or plain. It is left as it is; its arrays are shared.
      rank: of the corrections.
      alpha: corrections are scaled by ``alpha / rank``.
      layers: a regular expression for the whole slash-joined path of a layer, or several. As in a recipe,
        output heads and routers are meant only where an expression names them.
      seed: of the first factors; the second start as zeros.
      dtype: of the factors. A product casts them to the dtype of its activations.

    Returns:
      A model that computes what it did before. The kernels of its adapted layers are
      :class:`qjax.QuantizedParam`, the factors ``nnx.LoRAParam``.

    Raises:
      ValueError: an expression matches no layer, alpha is not a number above 0, or a matching layer has
        an adapter already, is smaller than the rank, or cannot have one (the message begins with the
        layer's path).

    Example:
      >>> import jax.numpy as jnp
      >>> import qjax
      >>> model = nnx.Sequential(nnx.Linear(64, 32, rngs=nnx.Rngs(0)))
      >>> model, _ = qjax.quantize_model(model, "nf4")
      >>> adapted = add_lora(model, rank=4, layers="layers/.*")
      >>> bool((adapted(jnp.ones((1, 64))) == model(jnp.ones((1, 64)))).all())
      True
      >>> {k: v.shape for k, v in nnx.state(adapted, nnx.LoRAParam).layers[0].dot_general.items()}
      {'lora_a': (64, 4), 'lora_b': (4, 32)}
    """
    result = copied(model)
    chosen = _chosen(result, [layers] if isinstance(layers, str) else layers)
    keys = jax.random.split(jax.random.key(seed), len(chosen))
    for (path, layer), key in zip(chosen.items(), keys, strict=True):
        axes = _kernel_axes(path, layer)
        try:
            shape = nnx_layers.weight_of(layer).shape
            factors = low_rank.initial(key, shape, axes, rank, dtype)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        adapt(path, layer, factors, alpha)
    return result


def adapt(path: str, layer: QuantizableLayer, factors: Factors, alpha: float) -> None:
    """Freezes a layer and puts an adapter into its hook.

    Args:
      path: of the layer, for messages.
      layer: changed in place.
      factors: of the correction.
      alpha: the correction is scaled by ``alpha / rank``.

    Raises:
      ValueError: the layer has an adapter already, has no hook for one, the factors do not fit it, or
        alpha is not a number above 0; the message begins with the path.
    """
    if low_rank.adapter_of(layer) is not None:
        raise ValueError(f"{path}: has an adapter already; merge that first (qjax.merge_lora)")
    if isinstance(layer, nnx.Embed) or getattr(layer, "dot_general_cls", None) is not None:
        raise ValueError(
            f"{path}: an adapter needs the layer's dot_general= or einsum_op=, which a "
            f"{type(layer).__name__} does not have or does not use here"
        )
    if not 0 < alpha < math.inf:
        raise ValueError(f"{path}: alpha must be a number above 0, got {alpha}")
    axes, shape = _kernel_axes(path, layer), nnx_layers.weight_of(layer).shape
    k, n = axes.sides(shape)
    lead, rank = tuple(shape[i] for i in axes.lead), factors.a.shape[-1]
    if factors.a.shape != (*lead, k, rank) or factors.b.shape != (*lead, rank, n):
        raise ValueError(
            f"{path}: factors of shapes {factors.a.shape} and {factors.b.shape} do not fit a weight of "
            f"{k} inputs and {n} outputs"
        )
    if not isinstance(layer.kernel, QuantizedParam):
        setattr(layer, "kernel", QuantizedParam(layer.kernel.get_value()))  # noqa: B010
    kind = AdaptedEinsum if isinstance(layer, nnx.Einsum) else AdaptedDot
    name = _hook(layer)
    setattr(layer, name, nnx.data(kind(getattr(layer, name), factors, alpha)))


def adapters(model: nnx.Module) -> dict[str, Adapter]:
    """The adapters in a model by the path of their layer."""
    found = (
        (path, low_rank.adapter_of(layer)) for path, layer in nnx_layers.quantizable_layers(model)
    )
    return {path: adapter for path, adapter in found if adapter is not None}


def merge_lora(model: Model) -> Model:
    """Adds each correction to the weight beside it.

    Args:
      model: with adapters. It is left as it is.

    Returns:
      A model without adapters: adapted layers hold ``W + alpha / rank A B`` as a plain ``nnx.Param``, in
      the dtype that the quantized weight stands for; all others are as they were, quantized ones too.

      Where a quantized layer quantizes its input as well (``w8a8``), the merged one no longer does.

    Raises:
      ValueError: the model has no adapter.

    Example:
      >>> import jax.numpy as jnp
      >>> model = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
      >>> merged = merge_lora(add_lora(model, rank=2, layers=".*"))
      >>> bool((merged.layers[0].kernel[...] == model.layers[0].kernel[...]).all())
      True
    """
    result = copied(model)
    _check_adapted(result)
    for path, layer in nnx_layers.quantizable_layers(result):
        _merge(path, layer)
    return result


def requantize_lora(
    model: Model, recipe: str | Recipe | None = None
) -> tuple[Model, QuantizationReport]:
    """Merges adapters and rounds the merged weights to nearest, layer by layer.

    A model in 4 bits is never whole in 16. For other methods than rounding to nearest, merge first and
    give the plain model to :func:`qjax.quantize_sequentially`.

    Args:
      model: with adapters. It is left as it is.
      recipe: how layers are to be held, or the name of a scheme; None: each as it was, so that plain ones
        stay plain.

    Returns:
      A model without adapters, and the report of every layer. Layers without an adapter keep their
      codes if their scheme stays the same.

    Raises:
      ValueError: the model has no adapter; or no layer is to be quantized; or the recipe is None and a
        layer holds some inputs as they are, beside its codes (the message begins with its path).

    Example:
      >>> import qjax
      >>> model, _ = qjax.quantize_model(nnx.Sequential(nnx.Linear(64, 32, rngs=nnx.Rngs(0))), "nf4")
      >>> adapted = add_lora(model, rank=4, layers=".*")
      >>> requantize_lora(adapted)[0].layers[0].kernel[...]
      QTensor(nf4, shape=(64, 32), tile=(64, 1))
    """
    result = copied(model)
    _check_adapted(result)
    recipe = Recipe.uniform(recipe) if isinstance(recipe, str) else recipe
    assigned = _as_it_was(result) if recipe is None else assignment.assign(result, recipe)
    # What was one weight with two corrections is two.
    apart = {path for path in assigned.layers if path in adapters(result)}
    shared = {a: b for a, b in assigned.shared.items() if not {a, b} & apart}
    assigned = replace(assigned, shared=shared)
    rounding = Method.parse("rtn", None, recipe)
    reports = [_requantized(path, assigned, rounding) for path in assigned.layers]
    return result, QuantizationReport(
        layers=tuple(reports), unmatched_rules=assigned.unmatched_rules
    )


def _requantized(path: str, assigned: Assignment, rounding: Method) -> LayerReport:
    layer, scheme = assigned.layers[path], assigned.scheme(path)
    before, begun = nnx_layers.weight_of(layer), time.perf_counter()
    merged = _merge(path, layer)
    if isinstance(before, QTensor) and not merged:
        held = qtensor.plain(before).scheme
        if scheme == held:
            return LayerReport(
                path=path, scheme=held.name, method=None, shape=before.shape,
                relative_output_error=None, bytes_before=before.nbytes, bytes_after=before.nbytes,
                seconds=0.0, reason="has no adapter: its codes are as they were",
            )  # fmt: skip
        _hold(layer, qtensor.dequantize(before))
    report = layer_quantization.quantize_layer(path, assigned, rounding)
    return replace(report, bytes_before=before.nbytes, seconds=time.perf_counter() - begun)


def _as_it_was(model: nnx.Module) -> Assignment:
    """Each layer in the scheme that it has."""
    layers = dict(nnx_layers.quantizable_layers(model))
    deciding: dict[str, Rule | None] = dict.fromkeys(layers)
    for path, q in nnx_layers.quantized_layers(model).items():
        if q.outliers is not None:
            raise ValueError(
                f"{path}: holds some inputs as they are, which rounding to nearest does not choose; "
                "say by a recipe how it is to be held"
            )
        deciding[path] = Rule(pattern=re.escape(path), scheme=qtensor.plain(q).scheme)
    if not any(deciding.values()):
        raise ValueError("no layer is quantized, so a recipe must say how they are to be held")
    return Assignment(layers=layers, deciding=deciding, shared={}, unmatched_rules=())


def _chosen(model: nnx.Module, patterns: Sequence[str]) -> dict[str, QuantizableLayer]:
    """The layers that patterns match, each of which must match one."""
    layers = {
        path: layer
        for path, layer in nnx_layers.quantizable_layers(model)
        if not isinstance(layer, nnx.Embed)
    }
    chosen = {}
    for pattern in patterns:
        rule = Recipe(rules=(Rule(pattern=pattern, scheme=None),))
        matching = {
            path: layer
            for path, layer in layers.items()
            if rule.rule_for(path, protected=isinstance(layer, Router))
        }
        if not matching:
            raise ValueError(
                f"{pattern!r} matches no layer that can be adapted; paths look like "
                f"{', '.join(list(layers)[:3])}"
                if layers
                else "the model has no nnx.Linear, nnx.LinearGeneral or nnx.Einsum layer"
            )
        chosen |= matching
    return chosen


def _check_adapted(model: nnx.Module) -> None:
    if not adapters(model):
        raise ValueError("the model has no adapters; qjax.add_lora makes some")


def _kernel_axes(path: str, layer: QuantizableLayer) -> KernelAxes:
    """What the axes of a layer's kernel are there for."""
    ndim, stacked = nnx_layers.weight_of(layer).ndim, nnx_layers.stacked_axes(layer)
    try:
        summed = tuple(a % ndim for a in nnx_layers.contraction_axes(layer))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    batch: list[int] = []
    match layer:
        case nnx.LinearGeneral():
            batch = list(range(stacked, stacked + len(layer.batch_axis)))
        case nnx.Einsum():
            given, kernel = (layer.einsum_str or "").partition("->")[0].split(",")
            batch = [
                stacked + i
                for i, c in enumerate(kernel)
                if c in given and stacked + i not in summed
            ]
    lead = (*range(stacked), *batch)
    free = tuple(i for i in range(ndim) if i not in lead + summed)
    return KernelAxes(lead=lead, summed=summed, free=free)


def _merge(path: str, layer: QuantizableLayer) -> bool:
    """Merges the adapter of a layer in place, if it has one; says whether it had."""
    adapter = low_rank.adapter_of(layer)
    if adapter is None:
        return False
    w, axes = nnx_layers.weight_of(layer), _kernel_axes(path, layer)
    _hold(layer, _merged(w, adapter.factors, adapter.scaling, axes))
    was = adapter.base
    restored = nnx.data(was) if isinstance(was, nnx.Module) else nnx.static(was)
    setattr(layer, _hook(layer), restored)
    return True


def _hold(layer: QuantizableLayer, w: Float[Array, "..."]) -> None:
    """Lets a layer hold a plain weight."""
    setattr(layer, "embedding" if isinstance(layer, nnx.Embed) else "kernel", nnx.Param(w))


def _hook(layer: QuantizableLayer) -> str:
    return "einsum_op" if isinstance(layer, nnx.Einsum) else "dot_general"


@partial(jax.jit, static_argnames=("scaling", "axes"))
def _merged(w: Any, factors: Factors, scaling: float, axes: KernelAxes) -> Float[Array, "..."]:
    return low_rank.merged(w, factors, scaling, axes)
