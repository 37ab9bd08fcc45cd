# SPDX-License-Identifier: Apache-2.0
"""Decoders in a form that a rotation of the residual stream passes through.

A head that is the token table cannot stay so: the final norm's factors move into the head, and not into
the table that the stream begins with. Where activations get 4 bits, the inputs of down_proj, which no
weights before it can rotate, are turned at run time:

    down(a(gate(x)) * up(x))  =  (H^T down)(H (a(gate(x)) * up(x)))

The paper turns the inputs of o_proj at run time, too, across heads; within them the weights do it.
Perplexity of the model that ships with qjax in w4a4 by `rotation`, over [24, 512] tokens in float32 (2
CPU cores, jax 0.10.2, 2026-11-28; 6.178 unquantized): nothing turned at run time 11.021, down_proj 8.428,
both 8.475; with six channels of each norm 48 times as large 11.112, 8.460, 8.466. So down_proj alone is.
"""

from dataclasses import replace
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.algorithms import rotation
from qjax.nnx_layers import quantized_layers
from qjax.scheme import Recipe
from qjax_models.config import DecoderConfig
from qjax_models.decoder import Decoder
from qjax_models.experts import ExpertsBlock

Weight = TypeVar("Weight", jax.Array, jax.ShapeDtypeStruct)


def rotatable(model: Decoder, recipe: str | Recipe) -> Decoder:
    """A decoder that computes the same and whose residual stream can be rotated.

    Args:
        model: left as it is, its arrays are shared. Shapes in place of arrays will do.
        recipe: how it is going to be held; activations of 4 bits are turned online.

    Raises:
        ValueError: no rotation passes through the model, or a layer is quantized already (named).

    Example:
        >>> config = DecoderConfig(vocab_size=64, hidden_size=32, mlp_size=48, num_layers=2,
        ...                        num_heads=4, num_kv_heads=2, head_size=8, max_positions=128,
        ...                        tied_embeddings=True)
        >>> rotatable(Decoder(config, rngs=nnx.Rngs(0)), "w4a4-g16").config.tied_embeddings
        False
    """
    recipe = Recipe.uniform(recipe) if isinstance(recipe, str) else recipe
    if why := why_not_rotatable(model.config):
        raise ValueError(f"rotation: {why}: take a method without it")
    for path, q in quantized_layers(model).items():
        raise ValueError(f"{path}: already quantized to {q.format.name}; start from the original")
    online = model.config.online_hadamard or _needs_online_hadamard(recipe)
    config = replace(model.config, tied_embeddings=False, online_hadamard=online)
    if config == model.config:
        return model
    result = model.reconfigured(config)
    if model.config.tied_embeddings:
        table = model.model.embed_tokens.embedding.get_value()
        result.lm_head.kernel.set_value(_transposed(table))
    if online and not model.config.online_hadamard:
        for block in result.model.layers:
            assert not isinstance(block, ExpertsBlock)  # see why_not_rotatable
            _turn_inputs(block.mlp.down_proj)
    return result


def why_not_rotatable(config: DecoderConfig) -> str | None:
    """Why no rotation passes through the residual stream of decoders of this shape; None: one does."""
    if config.post_norms:
        return (
            "this model normalizes what each block adds to the residual stream and multiplies it channel "
            "by channel (post_attention_layernorm, post_feedforward_layernorm), and no rotation passes "
            "through that"
        )
    if config.experts is not None:
        return "the norm before the experts feeds their router, too, which stays as it is"
    return None


def _needs_online_hadamard(recipe: Recipe) -> bool:
    """Whether a recipe holds the activations of some layer in 4 bits."""
    schemes = [rule.scheme for rule in recipe.rules if rule.scheme is not None]
    return any(s.activations is not None and s.activations.format.bits <= 4 for s in schemes)


def _turn_inputs(layer: nnx.Linear) -> None:
    """Turns the weights behind what a model turns at run time, in place; shapes stay as they are."""
    kernel = layer.kernel.get_value()
    if not isinstance(kernel, jax.ShapeDtypeStruct):
        layer.kernel.set_value(rotation.turned(kernel, axis=0))


def _transposed(table: Weight) -> Weight:
    if isinstance(table, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(table.shape[::-1], table.dtype)
    return jnp.transpose(table)
