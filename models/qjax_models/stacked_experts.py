# SPDX-License-Identifier: Apache-2.0
"""The experts of a layer as one module, whose weights are those of all: what `expert_blocks` computes."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax_models.decoder import Decoder
from qjax_models.experts import Experts, ExpertsBlock


def stack_experts(model: Decoder) -> None:
    """Stacks the experts of each layer, wherever all hold their weights in the same way.

    A layer whose experts a recipe holds in different schemes stays as it is. Codes and scales stay bit
    for bit what they were; sums over a token's experts are taken in another order.

    To be done when a model is loaded to be run, before `qjax.prepare`: calibration takes experts apart,
    and so do files, so a stacked model is neither calibrated nor saved.

    Args:
        model: changed in place, layer by layer: never more than one layer's experts are held twice.

    Example:
        >>> from qjax_models.config import DecoderConfig, ExpertsConfig
        >>> experts = ExpertsConfig(count=4, per_token=2, mlp_size=48, normalized=True)
        >>> config = DecoderConfig(vocab_size=64, hidden_size=32, mlp_size=48, num_layers=2, num_heads=4,
        ...                        num_kv_heads=2, head_size=8, max_positions=128, experts=experts)
        >>> model = Decoder(config, rngs=nnx.Rngs(0))
        >>> stack_experts(model)
        >>> model.model.layers[0].sparse.stack.up_proj.kernel.shape
        (4, 32, 48)
    """
    for block in model.model.layers:
        if isinstance(block, ExpertsBlock) and not block.sparse.stacked:
            _stack(block.sparse)


def _stack(sparse: Experts) -> None:
    graphdefs, states = zip(*map(nnx.split, sparse.experts), strict=True)
    if len({_kind(*parts) for parts in zip(graphdefs, states, strict=True)}) > 1:
        return
    # Until it is there the parts are held too; waiting keeps that to one layer at a time.
    stacked = jax.block_until_ready(_stacked(list(states)))
    sparse.stack, sparse.stacked = nnx.merge(graphdefs[0], stacked), True
    del sparse.experts


def _kind(graphdef: Any, state: Any) -> Any:
    """What experts have alike that can be stacked."""
    leaves, tree = jax.tree.flatten(state)
    return graphdef, tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


@jax.jit
def _stacked(states: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
