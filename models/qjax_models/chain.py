# SPDX-License-Identifier: Apache-2.0
"""A decoder as the chain of blocks that calibrated quantization works through."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax import kv_cache
from qjax.blockwise import Block, Blockwise, Cache, Channels, Fold, Stream
from qjax_models.config import DecoderConfig
from qjax_models.decoder import Decoder, DecoderBlock


def blockwise(model: Decoder, length: int) -> Blockwise:
    """The blocks of a decoder, and where factors for channels and rotations can hide.

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
    full, sliding = jax.jit(model.model.rotations, static_argnums=1)(positions, length)
    config = model.config
    return Blockwise(
        blocks=tuple(
            Block(
                path=f"model/layers/{index}",
                module=block,
                context=(sliding if config.is_sliding(index) else full, positions),
                folds=_folds(config, index),
            )
            for index, block in enumerate(model.model.layers)
        ),
        enter=model.model.embed,
        entrance=("model/embed_tokens",),
        apply=_apply,
        stream=_stream(config),
        cache=_cache(config),
    )


def _apply(block: DecoderBlock, x: Float[Array, "B T D"], context: tuple) -> Float[Array, "B T D"]:
    angles, positions = context
    return block(x, angles, positions)[0]


def _cache(config: DecoderConfig) -> Cache | None:
    if config.kv_cache is None or not config.has_static_cache:
        return None
    return Cache(
        scheme=kv_cache.scheme(config.kv_cache),
        scales=("self_attn/k_scale", "self_attn/v_scale"),
        kept=_kept,
    )


def _kept(block: DecoderBlock, x: Float[Array, "B T D"], context: tuple) -> tuple[Array, Array]:
    """The keys and values of a block."""
    angles, _ = context
    _, keys, values = block.self_attn.rotated_heads(block.input_layernorm(x), angles)
    return keys, values


def _folds(config: DecoderConfig, layer: int) -> tuple[Fold, ...]:
    """Those of a block: both norms, the values, and the half of the gated MLP without activation.

    With experts only the norm of attention and the values: what the second norm feeds is read by the
    router, too, which stays as it is. What is turned before down_proj no factor passes through.
    """
    before_attention, before_mlp = _readers(config)
    folds = before_attention, _values(config)
    if config.experts_of(layer) is not None:
        return folds
    if config.online_hadamard:
        return *folds, before_mlp
    return *folds, before_mlp, Fold(producer=_up(config), consumers=("mlp/down_proj",))


def _stream(config: DecoderConfig) -> Stream | None:
    """Where a decoder meets its residual stream, if it is one that a rotation passes through."""
    if config.post_norms or config.tied_embeddings or config.experts is not None:
        return None
    return Stream(
        table="model/embed_tokens",
        head=Fold(
            producer=Channels(path="model/norm"), consumers=("lm_head",), offset=config.norm_offset
        ),
        readers=_readers(config),
        writers=("self_attn/o_proj", "mlp/down_proj"),
        values=_values(config),
    )


def _readers(config: DecoderConfig) -> tuple[Fold, Fold]:
    """The norms before attention and MLP."""
    if config.fused_projections:
        queries_keys_values, gate_up = ("self_attn/qkv_proj",), ("mlp/gate_up_proj",)
    else:
        queries_keys_values = ("self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj")
        gate_up = ("mlp/gate_proj", "mlp/up_proj")
    before_mlp = "pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm"
    return (
        Fold(
            producer=Channels(path="input_layernorm"),
            consumers=queries_keys_values,
            offset=config.norm_offset,
        ),
        Fold(
            producer=Channels(path=before_mlp),
            consumers=gate_up,
            offset=config.norm_offset,
        ),
    )


def _values(config: DecoderConfig) -> Fold:
    """The values, which attention mixes head by head."""
    kv_size = config.num_kv_heads * config.head_size
    before = (config.num_heads + config.num_kv_heads) * config.head_size  # queries and keys
    return Fold(
        producer=Channels(path="self_attn/qkv_proj", first=before, count=kv_size)
        if config.fused_projections
        else Channels(path="self_attn/v_proj"),
        consumers=("self_attn/o_proj",),
        head_size=config.head_size,
        queries_per_head=config.queries_per_kv_head,
    )


def _up(config: DecoderConfig) -> Channels:
    """The half of the gated MLP without activation."""
    if config.fused_projections:
        return Channels(path="mlp/gate_up_proj", first=config.mlp_size)
    return Channels(path="mlp/up_proj")
