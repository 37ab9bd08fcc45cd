# SPDX-License-Identifier: Apache-2.0
"""The decoder-only language model.

    hidden = norm(block_L(... block_1(scale * table[tokens])))
    logits = cap(hidden @ head)

A parameter's path is its Hugging Face tensor name: `model/layers/0/self_attn/q_proj/kernel` is the
transpose of `model.layers.0.self_attn.q_proj.weight`.
"""

from dataclasses import replace

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from qjax import ops
from qjax.nnx_layers import named_variables
from qjax_models.attention import AttentionImplementation
from qjax_models.cache import KVCache, LayerKV
from qjax_models.config import DecoderConfig
from qjax_models.experts import ExpertsBlock
from qjax_models.layers import Numerics, PreNormBlock, RMSNorm, SandwichNormBlock, linear
from qjax_models.rope import Rotation, rotation

DecoderBlock = PreNormBlock | SandwichNormBlock | ExpertsBlock


class Backbone(nnx.Module):
    """Everything but the output head."""

    def __init__(self, config: DecoderConfig, numerics: Numerics, rngs: nnx.Rngs):
        """Token table, blocks and the final norm."""
        self.config = config
        self.activations = numerics.activations
        self.embed_tokens = nnx.Embed(
            config.vocab_size,
            config.hidden_size,
            param_dtype=numerics.dtype,
            embedding_init=nnx.initializers.normal(config.initializer_std),
            rngs=rngs,
        )
        self.layers = nnx.List(
            _block_kind(config, layer)(config, layer, numerics, rngs)
            for layer in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config, numerics)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "#B T"],
        length: int,
        cache: KVCache | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[LayerKV, ...]]:
        """Features of every token, and each layer's keys and values.

        Args:
            tokens: ids.
            positions: of the tokens in their rows.
            length: the most tokens a row can come to have.
            cache: what came before them; None: nothing did.
        """
        full, sliding = self.rotations(positions, length)
        x = self.embed(tokens)
        kept = []
        for index, block in enumerate(self.layers):
            angles = sliding if self.config.is_sliding(index) else full
            cached = None if cache is None else cache.layers[index]
            x, kv = block(x, angles, positions, cached)
            kept.append(kv)
        return self.norm(x), tuple(kept)

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Scaled rows of the token table, which may be quantized."""
        rows = ops.take(self.embed_tokens.embedding[...], tokens).astype(self.activations)
        # The scale is rounded to the type too, as in the published models.
        return rows * jnp.asarray(self.config.embedding_scale, rows.dtype)

    def rotations(self, positions: Int[Array, "#B T"], length: int) -> tuple[Rotation, Rotation]:
        """Angles of full and of sliding layers, for rows of at most `length` tokens."""
        config = self.config
        full = rotation(config.rope, config.head_size, positions, length)
        if config.sliding_rope is None:
            return full, full
        return full, rotation(config.sliding_rope, config.head_size, positions, length)


def _block_kind(config: DecoderConfig, layer: int) -> type[DecoderBlock]:
    if config.experts_of(layer) is not None:
        return ExpertsBlock
    return SandwichNormBlock if config.post_norms else PreNormBlock


class Decoder(nnx.Module):
    """A causal language model.

    Example:
        >>> config = DecoderConfig(vocab_size=64, hidden_size=32, mlp_size=48, num_layers=2,
        ...                        num_heads=4, num_kv_heads=2, head_size=8, max_positions=128)
        >>> model = Decoder(config, rngs=nnx.Rngs(0))
        >>> model(jnp.array([[1, 2, 3]])).shape
        (1, 3, 64)
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        compute_dtype: DTypeLike | None = None,
        attention: AttentionImplementation = "auto",
        rngs: nnx.Rngs,
    ):
        """A decoder with random weights.

        Args:
            config: its shape.
            dtype: of the parameters.
            compute_dtype: of the activations; None: the same.
            attention: how whole sequences attend, see `attention.causal_attention`.
            rngs: for the weights.
        """
        numerics = Numerics(
            dtype=dtype,
            compute_dtype=compute_dtype,
            attention=attention,
        )
        self.config = config
        self.model = Backbone(config, numerics, rngs)
        if not config.tied_embeddings:
            self.lm_head = linear(
                config.hidden_size,
                config.vocab_size,
                use_bias=False,
                std=config.initializer_std,
                numerics=numerics,
                rngs=rngs,
            )
            self.lm_head.preferred_element_type = jnp.float32

    @classmethod
    def abstract(
        cls,
        config: DecoderConfig,
        dtype: DTypeLike = jnp.float32,
        *,
        compute_dtype: DTypeLike | None = None,
        attention: AttentionImplementation = "auto",
    ) -> "Decoder":
        """The same model with shapes instead of arrays: takes no memory, to be filled by a loader."""
        return nnx.eval_shape(
            lambda: cls(
                config,
                dtype=dtype,
                compute_dtype=compute_dtype,
                attention=attention,
                rngs=nnx.Rngs(0),
            )
        )

    def reconfigured(self, config: DecoderConfig) -> "Decoder":
        """A decoder of another configuration that shares this one's arrays, where both have them.

        What only the other has is a shape.
        """
        result = Decoder.abstract(
            config,
            compute_dtype=self.model.activations,
            attention=self.model.layers[0].self_attn.implementation,
        )
        ours = named_variables(self)
        for path, variable in named_variables(result).items():
            if path in ours:
                variable.set_value(ours[path].get_value())
        return result

    def with_kv_cache(self, scheme: str) -> "Decoder":
        """The same decoder, which keeps keys and values in few bits.

        By a static scheme it does once their scales are found. The arrays are shared; the decoder may be
        quantized already.

        Args:
            scheme: one of `qjax.kv_cache.SCHEMES`; `qjax.quantize_sequentially` finds static scales.

        Raises:
            ValueError: there is no such scheme.
        """
        config = replace(self.config, kv_cache=scheme)
        result = nnx.merge(*nnx.split(self))
        result.config = result.model.config = config
        for block in result.model.layers:
            block.self_attn.keep_as(config)
        return result

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """Logits of the token after each token, in float32."""
        return self.logits(self.hidden(tokens))

    def hidden(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Final features of every token of whole sequences."""
        length = tokens.shape[1]
        hidden, _ = self.model(tokens, jnp.arange(length)[None], length)
        return hidden

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Scores of every token of the vocabulary, in float32."""
        if self.config.tied_embeddings:
            table = self.model.embed_tokens.embedding[...].astype(hidden.dtype)
            last_of_both = (((hidden.ndim - 1,), (1,)), ((), ()))
            logits = ops.dot_general(
                hidden, table, last_of_both, preferred_element_type=jnp.float32
            )
        else:
            logits = self.lm_head(hidden)
        cap = self.config.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def prefill(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], capacity: int
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Reads prompts into a fresh cache.

        Args:
            tokens: prompts, padded on the right with any ids.
            lengths: true length of each prompt, 1 to T.
            capacity: the most tokens a row will come to have, at least T.

        Returns:
            Features of every prompt token (those of the padding mean nothing), and the cache.

        Raises:
            ValueError: the prompts do not fit into the capacity.
        """
        if tokens.shape[1] > capacity:
            raise ValueError(f"prompts of {tokens.shape[1]} tokens exceed {capacity=}")
        hidden, layers = self.model(tokens, jnp.arange(tokens.shape[1])[None], capacity)
        padded = tuple(layer.padded(capacity) for layer in layers)
        return hidden, KVCache(layers=padded, lengths=lengths)

    def extend(
        self, tokens: Int[Array, "B T"], cache: KVCache
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Continues every row of the cache by T tokens."""
        positions = cache.lengths[:, None] + jnp.arange(tokens.shape[1])
        hidden, layers = self.model(tokens, positions, cache.capacity, cache)
        return hidden, KVCache(layers=layers, lengths=cache.lengths + tokens.shape[1])
