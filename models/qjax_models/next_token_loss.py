# SPDX-License-Identifier: Apache-2.0
"""The loss of a language model on whole sequences, in the memory of one block and a few logits.

loss = - mean over every token but a row's first of ln p(token | tokens before it)

Two things are not kept for the backward pass, but computed again in it: what happens inside a block
(of each block only its input is kept), and logits, which are made for a few positions at a time. The
price is a second forward pass; what is saved is, for a model of 8 billion parameters and 4096 tokens,
tens of GB inside the blocks and 2 GB for each copy of the logits.

References:
    Chen, Xu, Zhang, Guestrin, Training Deep Nets with Sublinear Memory Cost, 2016,
    https://arxiv.org/abs/1604.06174.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from qjax_models.chain import blockwise
from qjax_models.decoder import Decoder


def next_token_loss(
    model: Decoder, tokens: Int[Array, "B T"], positions_at_once: int = 512
) -> Float[Array, ""]:
    """Mean negative log-likelihood of the tokens that a model predicts, in nats.

    Args:
        model: the decoder; gradients flow to whatever of it they are asked for.
        tokens: rows of two tokens or more, each an independent sequence.
        positions_at_once: for so many positions logits are in memory at a time.

    Raises:
        ValueError: rows have fewer than two tokens, or `positions_at_once` is below 1.

    Example:
        >>> from flax import nnx
        >>> from qjax_models import DecoderConfig
        >>> config = DecoderConfig(vocab_size=64, hidden_size=32, mlp_size=48, num_layers=2,
        ...                        num_heads=4, num_kv_heads=2, head_size=8, max_positions=128)
        >>> loss = next_token_loss(Decoder(config, rngs=nnx.Rngs(0)), jnp.array([[1, 2, 3]]))
        >>> bool(abs(loss - jnp.log(64)) < 0.5)
        True
    """
    if tokens.shape[1] < 2 or positions_at_once < 1:
        raise ValueError(
            f"need rows of 2 tokens or more, and at least 1 position at once, got {tokens.shape=} "
            f"and {positions_at_once=}"
        )
    return loss_of_features(model, _hidden(model, tokens), tokens, positions_at_once)


def loss_of_features(
    model: Decoder,
    features: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    positions_at_once: int = 512,
) -> Float[Array, ""]:
    """The same from what `Decoder.hidden` gives, however it was computed.

    Args:
        model: whose head makes the logits.
        features: of every token.
        tokens: rows of two tokens or more.
        positions_at_once: for so many positions logits are in memory at a time.
    """
    targets = tokens[:, 1:].reshape(-1)
    features = features[:, :-1].reshape(len(targets), -1)
    rows = min(positions_at_once, len(targets))
    missing = -len(targets) % rows
    features = jnp.pad(features, ((0, missing), (0, 0)))
    targets = jnp.pad(targets, (0, missing), constant_values=-1)

    @jax.checkpoint
    def add(total: Array, few: tuple[Array, Array]) -> tuple[Array, None]:
        features, targets = few
        scores = jax.nn.log_softmax(model.logits(features))
        nll = -jnp.take_along_axis(scores, targets[:, None], axis=-1)[:, 0]
        return total + jnp.sum(jnp.where(targets >= 0, nll, 0.0)), None

    parts = features.reshape(-1, rows, features.shape[-1]), targets.reshape(-1, rows)
    total, _ = lax.scan(add, jnp.float32(0), parts)
    return total / (len(targets) - missing)


def _hidden(model: Decoder, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """What `Decoder.hidden` gives; of each block only the input is kept for the backward pass."""
    chain = blockwise(model, tokens.shape[1])
    x = chain.enter(tokens)
    for block in chain.blocks:

        @jax.checkpoint
        def run(x: Array, block=block) -> Array:
            return chain.apply(block.module, x, block.context)

        x = run(x)
    return model.model.norm(x)
