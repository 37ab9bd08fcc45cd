# SPDX-License-Identifier: Apache-2.0
"""The loss in little memory against the plain one, by optax from whole logits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from qjax_models import Decoder, DecoderConfig, next_token_loss

EPSILON = float(jnp.finfo(jnp.float32).eps)


def plain_loss(model: Decoder, tokens):
    logits = model(tokens)[:, :-1]
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


@pytest.fixture(scope="module")
def model() -> Decoder:
    config = DecoderConfig(
        vocab_size=50, hidden_size=16, mlp_size=24, num_layers=2, num_heads=2, num_kv_heads=1,
        head_size=8, max_positions=32, tied_embeddings=True, logit_softcap=2.0, sliding_window=4,
        sliding_layers=(1,),
    )  # fmt: skip
    return Decoder(config, rngs=nnx.Rngs(0))


TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 50, (2, 9)), jnp.int32)


def test_loss_and_gradients_are_those_of_whole_logits(model):
    """Of 16 positions 5 at a time, so that the last part is filled up."""

    def ours(model, tokens):
        return next_token_loss(model, tokens, positions_at_once=5)

    value, gradients = nnx.jit(nnx.value_and_grad(ours))(model, TOKENS)
    expected, expected_gradients = nnx.jit(nnx.value_and_grad(plain_loss))(model, TOKENS)
    assert abs(value - expected) < 10 * EPSILON * expected
    for found, wanted in zip(
        jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True
    ):
        np.testing.assert_allclose(
            found, wanted, rtol=0, atol=100 * EPSILON * max(1e-2, np.abs(wanted).max())
        )


def test_fewer_positions_than_at_once_are_no_part_of_them(model):
    value = nnx.jit(next_token_loss)(model, TOKENS)
    assert abs(value - nnx.jit(plain_loss)(model, TOKENS)) < 10 * EPSILON * value


@pytest.mark.parametrize(("shape", "positions"), [((2, 1), 512), ((2, 8), 0)])
def test_nothing_to_predict_is_refused(model, shape, positions):
    with pytest.raises(ValueError, match="^need rows of 2 tokens or more, and at least 1 position"):
        next_token_loss(model, jnp.zeros(shape, jnp.int32), positions_at_once=positions)
