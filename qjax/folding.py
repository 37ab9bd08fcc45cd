# SPDX-License-Identifier: Apache-2.0
"""Moving a factor for each channel from what feeds some layers into their weights.

    producer / s,   s * W   of each consumer:    (x / s) (s * W)  =  x W

The block computes what it did, but for rounding; what changes is which channels are large where they
are quantized. AWQ and SmoothQuant choose ``s``.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from qjax.blockwise import Fold


def fold(block: nnx.Module, where: Fold, scale: Float[Array, " c"]) -> None:
    """Divides the producer of a fold by a scale and multiplies its consumers with it, in place.

    Args:
      block: the module that the fold's paths begin at; no layer of the fold is quantized yet.
      where: the fold.
      scale: positive, one entry a channel of the producer.
    """
    modules = modules_of(block)
    _divide(modules[where.producer.path], where, scale)
    at_input = spread(where, scale)
    for path in where.consumers:
        layer = modules[path]
        assert isinstance(layer, nnx.Linear)
        layer.kernel.set_value(_scaled(layer.kernel.get_value(), at_input[:, None]))


def spread(where: Fold, scale: Float[Array, " c"]) -> Float[Array, " k"]:
    """The scale of each input of the consumers: heads of values stand there once for each query head."""
    if where.head_size is None:
        return scale
    heads = scale.reshape(-1, where.head_size)
    return jnp.repeat(heads, where.queries_per_head, axis=0).reshape(-1)


def gathered(where: Fold, per_input: Float[Array, " k"]) -> Float[Array, "queries c"]:
    """What is known of each input, with those that share a channel of the producer in a column."""
    if where.head_size is None:
        return per_input[None]
    grouped = per_input.reshape(-1, where.queries_per_head, where.head_size)
    return grouped.swapaxes(0, 1).reshape(where.queries_per_head, -1)


def modules_of(block: nnx.Module) -> dict[str, nnx.Module]:
    """The modules in a block by their slash-joined path."""
    return {"/".join(map(str, path)): module for path, module in nnx.iter_modules(block)}


def _divide(producer: nnx.Module, where: Fold, scale: Float[Array, " c"]) -> None:
    """Divides a norm's factors, or some outputs of a layer and their biases."""
    outputs = where.producer.slice
    if isinstance(producer, nnx.Linear):
        kernel = producer.kernel.get_value()
        divided = _scaled(kernel[:, outputs], 1 / scale)
        producer.kernel.set_value(kernel.at[:, outputs].set(divided))
        if producer.bias is not None:
            bias = producer.bias.get_value()
            producer.bias.set_value(bias.at[outputs].set(_scaled(bias[outputs], 1 / scale)))
        return
    set_norm_factors(producer, where, norm_factors(producer, where) / scale)


def norm_factors(norm: nnx.Module, where: Fold) -> Float[Array, " c"]:
    """What a norm multiplies its channels by, in float32."""
    return where.offset + _norm_weight(norm).get_value().astype(jnp.float32)


def set_norm_factors(norm: nnx.Module, where: Fold, factors: Float[Array, " c"]) -> None:
    """Lets a norm multiply its channels by other factors."""
    variable = _norm_weight(norm)
    variable.set_value((factors - where.offset).astype(variable.get_value().dtype))


def _norm_weight(norm: nnx.Module) -> nnx.Variable:
    """The factors of a norm: Flax calls them ``scale``, models of the Hugging Face world ``weight``."""
    for name in ("weight", "scale"):
        if isinstance(variable := getattr(norm, name, None), nnx.Variable):
            return variable
    raise ValueError(f"a {type(norm).__name__} has no factors to fold a scale into")


@jax.jit
def _scaled(w: Float[Array, "..."], by: Float[Array, "..."]) -> Float[Array, "..."]:
    """A product in float32, rounded once to the weight's dtype."""
    return (w.astype(jnp.float32) * by).astype(w.dtype)
