# SPDX-License-Identifier: Apache-2.0
"""The parts of a decoder block, built from stock Flax layers.

Attribute names are those of the Hugging Face tensors, so that a parameter's path is its name there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from qjax import kv_cache, ops
from qjax.algorithms import rotation
from qjax.kv_cache import CacheScale
from qjax_models.attention import (
    AttentionImplementation,
    ScoreRule,
    cached_attention,
    causal_attention,
)
from qjax_models.cache import Keeping, LayerKV
from qjax_models.config import Activation, DecoderConfig
from qjax_models.rope import Rotation, rotate

Linear = TypeVar("Linear", bound=nnx.Linear)


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """In which types a decoder is held and computed, and by which attention."""

    dtype: DTypeLike = jnp.float32  # of the parameters
    compute_dtype: DTypeLike | None = None  # of activations; None: the same as `dtype`
    attention: AttentionImplementation = "auto"

    @property
    def activations(self) -> DTypeLike:
        """The type that flows from layer to layer."""
        return self.dtype if self.compute_dtype is None else self.compute_dtype


def linear(
    in_features: int,
    out_features: int,
    *,
    use_bias: bool,
    std: float,
    numerics: Numerics,
    rngs: nnx.Rngs,
    kind: type[Linear] = nnx.Linear,
) -> Linear:
    """A stock linear layer in the decoder's types."""
    return kind(
        in_features,
        out_features,
        use_bias=use_bias,
        dtype=numerics.activations,
        param_dtype=numerics.dtype,
        kernel_init=nnx.initializers.normal(std),
        dot_general=ops.dot_general,
        rngs=rngs,
    )


class RMSNorm(nnx.Module):
    """Root-mean-square normalization of the last axis.

    y = x / sqrt(mean(x^2) + eps) * (offset + weight), in float32, rounded once to x's type.

    References:
        Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, https://arxiv.org/abs/1910.07467.
    """

    def __init__(self, size: int, config: DecoderConfig, numerics: Numerics):
        """A norm that starts as the identity scale."""
        self.weight = nnx.Param(jnp.full((size,), 1.0 - config.norm_offset, numerics.dtype))
        self.eps = config.norm_eps
        self.offset = config.norm_offset

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Normalizes the last axis."""
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.eps)
        scale = self.offset + self.weight[...].astype(jnp.float32)
        return (normed * scale).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    k_scale: CacheScale  # these two where a static scheme keeps keys and values
    v_scale: CacheScale

    def __init__(self, config: DecoderConfig, layer: int, numerics: Numerics, rngs: nnx.Rngs):
        """Attention of layer number `layer`, whose window depends on the number."""
        self.config = config
        self.rule = ScoreRule(
            scale=config.attention_scale,
            softcap=config.attention_softcap,
            window=config.window(layer),
        )
        self.implementation: AttentionImplementation = numerics.attention
        # Of this layer: where it is False in the configuration, `join_projections` may set it here.
        self.fused = config.fused_projections
        query_size = config.num_heads * config.head_size
        kv_size = config.num_kv_heads * config.head_size

        def project(in_features: int, out_features: int, use_bias: bool) -> nnx.Linear:
            return linear(
                in_features,
                out_features,
                use_bias=use_bias,
                std=config.initializer_std,
                numerics=numerics,
                rngs=rngs,
            )

        if self.fused:
            self.qkv_proj = project(config.hidden_size, query_size + 2 * kv_size, config.qkv_bias)
        else:
            self.q_proj = project(config.hidden_size, query_size, config.qkv_bias)
            self.k_proj = project(config.hidden_size, kv_size, config.qkv_bias)
            self.v_proj = project(config.hidden_size, kv_size, config.qkv_bias)
        self.o_proj = project(query_size, config.hidden_size, config.output_bias)
        if config.query_key_norm:
            self.q_norm = RMSNorm(config.head_size, config, numerics)
            self.k_norm = RMSNorm(config.head_size, config, numerics)
        self.keep_as(config)

    def keep_as(self, config: DecoderConfig) -> None:
        """Takes a configuration that differs in `kv_cache` alone; static scales that are there stay."""
        self.config = config
        for name in ("k_scale", "v_scale"):
            if config.has_static_cache and not hasattr(self, name):
                setattr(self, name, CacheScale(None))
            elif not config.has_static_cache and hasattr(self, name):
                delattr(self, name)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        angles: Rotation,
        positions: Int[Array, "#B T"],
        cached: LayerKV | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerKV]:
        """Lets tokens attend to each other, or to a cache after writing themselves into it.

        Args:
            x: the tokens' features.
            angles: of their positions.
            positions: of the tokens in their rows.
            cached: what this layer remembers; None: x is the whole sequence.

        Returns:
            The mixed features, and the layer's keys and values: of x alone, or of the whole cache.
        """
        queries, keys, values = self.rotated_heads(x, angles)
        keeping = self._keeping()
        queries, keys, values = keeping.turned(queries, keys, values)
        kv = keeping.kept(_head_major(keys), _head_major(values))
        if cached is None:
            # What a whole sequence sees is what later tokens will.
            seen = keeping.rounded(keys, values)
            mixed = causal_attention(queries, *seen, self.rule, self.implementation)
        else:
            kv = cached.write(kv, positions)
            seen = keeping.read(kv, self.config.head_size, queries.dtype)
            mixed = cached_attention(queries, *seen, positions, self.rule)
        mixed = keeping.turned_back(mixed)
        return self.o_proj(mixed.reshape(*x.shape[:2], -1)), kv

    def rotated_heads(
        self, x: Float[Array, "B T D"], angles: Rotation
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Queries, keys and values of tokens, the first two rotated by their positions."""
        queries, keys, values = self._heads(x)
        return rotate(queries, angles), rotate(keys, angles), values

    def _keeping(self) -> Keeping:
        """How keys and values are kept: by static scales once they are found."""
        if self.config.kv_cache is None:
            return Keeping()
        scheme = kv_cache.scheme(self.config.kv_cache)
        if not scheme.static:
            return Keeping(scheme)
        if self.k_scale.get_value() is None:
            return Keeping()
        return Keeping(scheme, self.k_scale[...], self.v_scale[...])

    def _heads(
        self, x: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Query, key and value heads before rotation."""
        config = self.config
        if self.fused:
            heads = self.qkv_proj(x).reshape(*x.shape[:2], -1, config.head_size)
            ends = (config.num_heads, config.num_heads + config.num_kv_heads)
            queries, keys, values = jnp.split(heads, ends, axis=2)
        else:
            queries, keys, values = (
                project(x).reshape(*x.shape[:2], -1, config.head_size)
                for project in (self.q_proj, self.k_proj, self.v_proj)
            )
        if config.query_key_norm:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        return queries, keys, values


def _head_major(heads: Float[Array, "B T K H"]) -> Float[Array, "BK T H"]:
    batch, length, num_heads, size = heads.shape
    return heads.swapaxes(1, 2).reshape(batch * num_heads, length, size)


class GatedMLP(nnx.Module):
    """y = down(activation(gate(x)) * up(x)).

    References:
        Shazeer, GLU Variants Improve Transformer, 2020, https://arxiv.org/abs/2002.05202.
    """

    def __init__(self, config: DecoderConfig, numerics: Numerics, rngs: nnx.Rngs):
        """The family's choice of activation, biases and fusion."""
        self.activation: Activation = config.activation
        self.fused = config.fused_projections
        self.online_hadamard = config.online_hadamard

        def project(in_features: int, out_features: int) -> nnx.Linear:
            return linear(
                in_features,
                out_features,
                use_bias=config.mlp_bias,
                std=config.initializer_std,
                numerics=numerics,
                rngs=rngs,
            )

        if self.fused:
            self.gate_up_proj = project(config.hidden_size, 2 * config.mlp_size)
        else:
            self.gate_proj = project(config.hidden_size, config.mlp_size)
            self.up_proj = project(config.hidden_size, config.mlp_size)
        self.down_proj = project(config.mlp_size, config.hidden_size)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Transforms each token by itself."""
        if self.fused:
            gate, up = jnp.split(self.gate_up_proj(x), 2, axis=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        inner = activate(self.activation, gate) * up
        if self.online_hadamard:
            inner = rotation.turned(inner, axis=-1)
        return self.down_proj(inner)


def activate(kind: Activation, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The named activation, computed in float32 and rounded once, as PyTorch does."""
    wide = x.astype(jnp.float32)
    match kind:
        case "silu":
            result = jax.nn.silu(wide)
        case "gelu_tanh":
            result = jax.nn.gelu(wide, approximate=True)
        case "gelu":
            result = jax.nn.gelu(wide, approximate=False)
    return result.astype(x.dtype)


class PreNorm(nnx.Module):
    """x + attention(norm(x)), then x + f(norm(x)), of whatever `f` a block makes its `transform`."""

    def __init__(self, config: DecoderConfig, layer: int, numerics: Numerics, rngs: nnx.Rngs):
        """Block number `layer`, without what follows the attention."""
        self.input_layernorm = RMSNorm(config.hidden_size, config, numerics)
        self.self_attn = Attention(config, layer, numerics, rngs)
        # The published name: it follows the attention, but normalizes the input of what comes then.
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config, numerics)

    @property
    def transform(self) -> Callable[[Array], Array]:
        """What transforms each token by itself."""
        raise NotImplementedError

    def __call__(
        self,
        x: Float[Array, "B T D"],
        angles: Rotation,
        positions: Int[Array, "#B T"],
        cached: LayerKV | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerKV]:
        """One block; arguments as those of `Attention`."""
        mixed, kv = self.self_attn(self.input_layernorm(x), angles, positions, cached)
        x = x + mixed
        return x + self.transform(self.post_attention_layernorm(x)), kv


class PreNormBlock(PreNorm):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: DecoderConfig, layer: int, numerics: Numerics, rngs: nnx.Rngs):
        """Block number `layer`."""
        super().__init__(config, layer, numerics, rngs)
        self.mlp = GatedMLP(config, numerics, rngs)

    @property
    def transform(self) -> GatedMLP:
        """The MLP."""
        return self.mlp


class SandwichNormBlock(nnx.Module):
    """x + norm(attention(norm(x))), then x + norm(mlp(norm(x)))."""

    def __init__(self, config: DecoderConfig, layer: int, numerics: Numerics, rngs: nnx.Rngs):
        """Block number `layer`."""
        self.input_layernorm = RMSNorm(config.hidden_size, config, numerics)
        self.self_attn = Attention(config, layer, numerics, rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config, numerics)
        self.pre_feedforward_layernorm = RMSNorm(config.hidden_size, config, numerics)
        self.mlp = GatedMLP(config, numerics, rngs)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config, numerics)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        angles: Rotation,
        positions: Int[Array, "#B T"],
        cached: LayerKV | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerKV]:
        """One block; arguments as those of `Attention`."""
        mixed, kv = self.self_attn(self.input_layernorm(x), angles, positions, cached)
        x = x + self.post_attention_layernorm(mixed)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x))), kv
