# SPDX-License-Identifier: Apache-2.0
"""The decoder of qjax as a pure function of a flat dictionary of parameters, stacked by layer.

`model/layers/*/mlp/up_proj/kernel` [layers, D, F] holds what the decoder calls
`model/layers/0/mlp/up_proj/kernel` [D, F] and so on. The optimizer wants it so; the decoder gets
its own names and shapes back.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from qjax_models.attention import AttentionImplementation
from qjax_models.decoder import Decoder
from qjax_models.families import config_from_hf

Parameters = dict[str, Array]

_LAYER = re.compile(r"/layers/(\d+)/")
# Matrices whose product is added to the residual stream. They start at zero, so that every block
# does.
_RESIDUAL_OUTPUTS = ("o_proj/kernel", "down_proj/kernel")


@dataclass(frozen=True, kw_only=True)
class Network:
    """A decoder without its parameters."""

    graph: nnx.GraphDef
    structure: PyTree  # tree definition of the decoder's state
    shapes: Mapping[str, tuple[int, ...]]  # of its parameters by path, in the state's order

    @property
    def num_parameters(self) -> int:
        """Number of weights; the tied head counts once."""
        return sum(jax.ShapeDtypeStruct(shape, jnp.float32).size for shape in self.shapes.values())


def make_network(
    hf_config: Mapping[str, Any], compute_dtype: str, attention: AttentionImplementation
) -> Network:
    """Return the decoder that a `config.json` describes, with float32 parameters."""
    decoder = Decoder.abstract(
        config_from_hf(hf_config), jnp.float32, compute_dtype=compute_dtype, attention=attention
    )
    graph, state = nnx.split(decoder)
    paths = ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(state)]
    leaves, structure = jax.tree.flatten(state)
    shapes = {path: leaf.shape for path, leaf in zip(paths, leaves, strict=True)}
    return Network(graph=graph, structure=structure, shapes=shapes)


def initial_parameters(network: Network, seed: int | Int[Array, ""]) -> Parameters:
    """Draw the weights: norms 1, residual outputs 0, other matrices with variance 1 / inputs.

    The token table has a standard deviation of 0.02: it is also the head, and larger logits would
    cost the first thousand steps.
    """
    key = jax.random.key(seed)
    drawn = {
        path: _initial(path, shape, jax.random.fold_in(key, index))
        for index, (path, shape) in enumerate(network.shapes.items())
    }
    groups: dict[str, list[Array]] = {}
    for path, array in drawn.items():
        groups.setdefault(_stacked_path(path), []).append(array)
    return {
        path: jnp.stack(arrays) if "*" in path else arrays[0] for path, arrays in groups.items()
    }


def unstacked(network: Network, parameters: Parameters) -> Parameters:
    """Return the parameters under the decoder's own paths."""
    arrays = {}
    for path in network.shapes:
        layer = _LAYER.search(path)
        stack = parameters[_stacked_path(path)]
        arrays[path] = stack[int(layer[1])] if layer else stack
    return arrays


def logits(
    network: Network, parameters: Parameters, tokens: Int[Array, "B T"]
) -> Float[Array, "B T V"]:
    """Apply the decoder."""
    leaves = list(unstacked(network, parameters).values())
    state = jax.tree.unflatten(network.structure, leaves)
    return nnx.merge(network.graph, state)(tokens)


def _stacked_path(path: str) -> str:
    return _LAYER.sub("/layers/*/", path)


def _initial(path: str, shape: tuple[int, ...], key: Array) -> Array:
    if len(shape) == 1:
        return jnp.ones(shape)
    if path.endswith(_RESIDUAL_OUTPUTS):
        return jnp.zeros(shape)
    deviation = shape[0] ** -0.5 if path.endswith("/kernel") else 0.02
    return deviation * jax.random.normal(key, shape)
