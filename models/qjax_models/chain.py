# SPDX-License-Identifier: Apache-2.0
"""A decoder as the chain of blocks that calibrated quantization works through."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax.blockwise import Block, Blockwise, Channels, Fold
from qjax_models.config import DecoderConfig
from qjax_models.decoder import Decoder
from qjax_models.layers import PreNormBlock, SandwichNormBlock


def blockwise(model: Decoder, length: int) -> Blockwise:
    """The blocks of a decoder, and where factors for channels can hide in each.

    Args:
        model: the decoder; its modules are shared.
        length: tokens of every row.

    Example:
        >>> from flax import nnx
        >>> config = DecoderConfig(vocab_size=64, hidden_size=32, mlp_size=48, num_layers=2,
        ...                        num_heads=4, num_kv_heads=2, head_size=8, max_positions=128)
        >>> chain = blockwise(Decoder(config, rngs=nnx.Rngs(0)), 16)
        >>> chain.blocks[1].path, chain.blocks[1].folds[1].consumers
        ('model/layers/1', ('self_attn/o_proj',))
    """
    positions = jnp.arange(length)[None]
    full, sliding = model.model.rotations(positions, length)
    config = model.config
    return Blockwise(
        blocks=tuple(
            Block(
                path=f"model/layers/{index}",
                module=block,
                context=(sliding if config.is_sliding(index) else full, positions),
                folds=_folds(config),
            )
            for index, block in enumerate(model.model.layers)
        ),
        enter=model.model.embed,
        entrance=("model/embed_tokens",),
        apply=_apply,
    )


def _apply(
    block: PreNormBlock | SandwichNormBlock, x: Float[Array, "B T D"], context: tuple
) -> Float[Array, "B T D"]:
    angles, positions = context
    return block(x, angles, positions)[0]


def _folds(config: DecoderConfig) -> tuple[Fold, ...]:
    """The four of a block: both norms, the values, and the half of the gated MLP without activation."""
    kv_size = config.num_kv_heads * config.head_size
    query_size = config.num_heads * config.head_size
    if config.fused_projections:
        queries_keys_values = ("self_attn/qkv_proj",)
        values = Channels(path="self_attn/qkv_proj", first=query_size + kv_size, count=kv_size)
        gate_up = ("mlp/gate_up_proj",)
        up = Channels(path="mlp/gate_up_proj", first=config.mlp_size)
    else:
        queries_keys_values = ("self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj")
        values = Channels(path="self_attn/v_proj")
        gate_up = ("mlp/gate_proj", "mlp/up_proj")
        up = Channels(path="mlp/up_proj")
    before_mlp = "pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm"
    return (
        Fold(
            producer=Channels(path="input_layernorm"),
            consumers=queries_keys_values,
            offset=config.norm_offset,
        ),
        Fold(
            producer=values,
            consumers=("self_attn/o_proj",),
            head_size=config.head_size,
            queries_per_head=config.queries_per_kv_head,
        ),
        Fold(
            producer=Channels(path=before_mlp),
            consumers=gate_up,
            offset=config.norm_offset,
        ),
        Fold(producer=up, consumers=("mlp/down_proj",)),
    )
