# SPDX-License-Identifier: Apache-2.0
"""The model that a recipe will make, in shapes alone: what a file will hold is known before the work."""

import functools
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from qjax import QTensor, Recipe, kv_cache, nnx_layers, quantize
from qjax.assignment import assign
from qjax_checkpoints.parameters import place
from qjax_models import Decoder

Tree = TypeVar("Tree")


def outline(model: Decoder, recipe: Recipe) -> Decoder:
    """Returns a model as it will be quantized, with shapes in place of arrays, in QTensors too.

    Args:
        model: not quantized yet, or in part; with arrays or shapes. It is left as it is.
        recipe: how it is going to be.

    Raises:
        ValueError: the recipe quantizes no layer, or a group size does not divide one (named).
    """
    graphdef, state = nnx.split(model)
    result = nnx.merge(graphdef, shapes(state))
    assigned = assign(result, recipe)
    for path, layer in assigned.layers.items():
        scheme = assigned.scheme(path)
        weight = nnx_layers.weight_of(layer)
        if scheme is None or isinstance(weight, QTensor):
            continue
        axis = nnx_layers.contraction_axes(layer)
        quantized = functools.partial(quantize, scheme=scheme, axis=axis, name=path)
        q = jax.eval_shape(quantized, weight)
        if scheme.is_static:
            q = q.replaced(input_scale=jax.ShapeDtypeStruct((), jnp.float32))
        place(layer, nnx_layers.variable_of(layer), q)
    kv_cache.expect(result)
    return result


def shapes(tree: Tree) -> Tree:
    """Returns a pytree with a shape in place of each array."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
