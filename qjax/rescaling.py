# SPDX-License-Identifier: Apache-2.0
"""Finding, for each place of a block where a factor can hide, the one under which rounding costs least.

A few candidates come from a formula, that of AWQ, SmoothQuant or Outlier Suppression+; each is folded in,
the layers behind it are rounded to nearest, and the block's output on some calibration tokens is compared
with what it was. Where one weight follows and its input stays as it is, the same is read off the Hessian
of its input.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from qjax import activations, folding, nnx_layers, observation, qtensor
from qjax.algorithms import awq, outlier_suppression, round_nearest, smoothquant
from qjax.blockwise import Block, Fold
from qjax.method import Rescaling
from qjax.observation import Observed
from qjax.qtensor import QTensor
from qjax.scheme import Scheme
from qjax.statistics import InputStatistics

Model = TypeVar("Model", bound=nnx.Module)


def rescale(
    block: Block,
    observed: Observed,
    schemes: Mapping[str, Scheme | None],
    options: Rescaling,
    samples: Float[Array, "B T D"],
    apply: Callable[..., Any],
    compute_dtype: Any,
) -> Observed:
    """Folds the best factors into a block, in place.

    Args:
      block: not quantized yet.
      observed: what its layers multiply.
      schemes: how each layer is going to be held, by path in the block; None: as it is. A fold is used
        only when all its consumers are quantized, in one scheme.
      options: which formula.
      samples: the block's input for some calibration tokens.
      apply: runs a block, as in :class:`qjax.blockwise.Blockwise`.
      compute_dtype: what layers compute in; None: what they would.

    Returns:
      What the layers multiply now.
    """
    for where in block.folds:
        held = {schemes.get(path) for path in where.consumers}
        if None in held or len(held) > 1:
            continue
        (scheme,) = held
        assert scheme is not None
        inputs = observed[where.consumers[0]]
        weights = _weights(block.module, where)
        scales = candidates(weights, where, inputs, scheme, options)
        if bool(jnp.all(scales == 1)):
            continue
        graphdef, state = nnx.split(block.module)
        if len(weights) == 1 and scheme.activations is None and inputs.hessian is not None:
            (weight,) = weights
            losses = _product_losses(weight, inputs.hessian, scales, where=where, scheme=scheme)
        else:
            losses = _block_losses(
                graphdef, state, scales, samples, block.context, inputs.absmax, where=where,
                scheme=scheme, apply=apply, compute_dtype=compute_dtype,
            )  # fmt: skip
        best = int(jnp.argmin(losses))
        if best > 0:
            folding.fold(block.module, where, scales[best])
            observed = _divided(observed, where, scales[best])
    return observed


def candidates(
    weights: Sequence[Float[Array, "k _"]],
    where: Fold,
    inputs: InputStatistics,
    scheme: Scheme,
    options: Rescaling,
) -> Float[Array, "candidates c"]:
    """The factors of each ratio or strength that is tried; those of doing nothing come first.

    Args:
      weights: of the fold's consumers.
      where: the fold.
      inputs: what they multiply.
      scheme: how they are going to be held.
      options: which formula.
    """
    match options:
        case awq.Options():
            magnitudes = folding.gathered(where, inputs.mean_magnitude).mean(axis=0)
            relative = awq.relative_magnitude(weights, scheme.weights.group_size)
            relative = folding.gathered(where, relative).mean(axis=0)
            scales = [awq.scale(magnitudes, relative, ratio) for ratio in awq.RATIOS]
        case outlier_suppression.Options():
            magnitudes = folding.gathered(where, inputs.mean_magnitude).mean(axis=0)
            scales = outlier_suppression.scales(magnitudes)
        case smoothquant.Options():
            magnitudes = folding.gathered(where, inputs.absmax).max(axis=0)
            largest = jnp.max(jnp.abs(jnp.concatenate(weights, axis=1)), axis=1)
            largest = folding.gathered(where, largest.astype(jnp.float32)).max(axis=0)
            tried = smoothquant.STRENGTHS if options.strength is None else (options.strength,)
            scales = [smoothquant.scale(magnitudes, largest, strength) for strength in tried]
    return jnp.stack([jnp.ones_like(scales[0]), *scales])


def _weights(module: nnx.Module, where: Fold) -> list[Array]:
    layers = dict(nnx_layers.quantizable_layers(module))
    return [nnx_layers.weight_of(layers[path]) for path in where.consumers]


def _divided(observed: Observed, where: Fold, scale: Float[Array, " c"]) -> Observed:
    at_input = folding.spread(where, scale)
    return replace(
        observed,
        inputs=tuple(
            inputs.divided_by(at_input) if where.consumers[0] in layers else inputs
            for layers, inputs in zip(observed.layers, observed.inputs, strict=True)
        ),
    )


@functools.partial(jax.jit, static_argnames=("where", "scheme"))
def _product_losses(
    weight: Float[Array, "k n"],
    hessian: Float[Array, "k k"],
    scales: Float[Array, "candidates c"],
    *,
    where: Fold,
    scheme: Scheme,
) -> Float[Array, " candidates"]:
    """The squared error of one product over all calibration rows: ``tr(D^T H D)``.

    D = Q(s W) / s - W
    """

    def loss(scale: Float[Array, " c"]) -> Float[Array, ""]:
        at_input = folding.spread(where, scale)[:, None]
        wide = weight.astype(jnp.float32)
        q = round_nearest.quantize((wide * at_input).astype(weight.dtype), scheme)
        wrong = qtensor.dequantize(q, jnp.float32) / at_input - wide
        return jnp.sum(wrong * jnp.matmul(hessian, wrong, precision="highest"))

    return lax.map(loss, scales)


@functools.partial(
    jax.jit, static_argnames=("graphdef", "where", "scheme", "apply", "compute_dtype")
)
def _block_losses(
    graphdef: Any,
    state: Any,
    scales: Float[Array, "candidates c"],
    samples: Float[Array, "B T D"],
    context: Any,
    absmax: Float[Array, " k"],
    *,
    where: Fold,
    scheme: Scheme,
    apply: Callable[..., Any],
    compute_dtype: Any,
) -> Float[Array, " candidates"]:
    """The squared error of the block's output on the samples, consumers rounded to nearest."""

    def output(module: nnx.Module) -> Float[Array, "B T D"]:
        return observation.computed(
            module, lambda: apply(module, samples, context), compute_dtype=compute_dtype
        ).astype(jnp.float32)

    target = output(nnx.merge(graphdef, state))

    def loss(scale: Float[Array, " c"]) -> Float[Array, ""]:
        # New variables, which belong to this trace.
        module = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf, state))
        folding.fold(module, where, scale)
        for path, layer in nnx_layers.quantizable_layers(module):
            if path in where.consumers:
                q = round_nearest.quantize(nnx_layers.weight_of(layer), scheme)
                if q.activations is not None and q.activations.static:
                    reached = absmax / folding.spread(where, scale)
                    q = q.replaced(input_scale=activations.static_scale(reached, q.activations))
                simulate(layer, q)
        return jnp.mean((output(module) - target) ** 2)

    return lax.map(loss, scales)


def simulate(layer: nnx_layers.QuantizableLayer, q: QTensor) -> None:
    """Lets a layer compute what it will when it holds a QTensor: by plain values where only weights are.

    Blocks of plain values are one compiled program, whichever weights they hold.
    """
    if q.activations is None:
        nnx_layers.variable_of(layer).set_value(_dequantized(q))
    else:
        nnx_layers.install(layer, q)


_dequantized = jax.jit(qtensor.dequantize)  # one program, where each of its steps would be one


def simulated(blank: Model, quantized: nnx.Module) -> Model:
    """A plain model or block with the values of the quantized one, where only weights are quantized.

    All that were alike before they were quantized are one compiled program then. Where products quantize
    their activations, the QTensors themselves take the weights' places.

    Args:
      blank: as it was before; changed in place, and returned.
      quantized: the same with QTensors in some layers.
    """
    ours, theirs = nnx_layers.named_variables(blank), nnx_layers.named_variables(quantized)
    for path, variable in theirs.items():
        value = variable.get_value()
        if not isinstance(value, QTensor):
            ours[path].set_value(value)
    layers = dict(nnx_layers.quantizable_layers(quantized))
    for path, layer in nnx_layers.quantizable_layers(blank):
        q = nnx_layers.weight_of(layers[path])
        if isinstance(q, QTensor):
            simulate(layer, q)
    return blank
