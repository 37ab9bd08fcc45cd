# SPDX-License-Identifier: Apache-2.0
"""Experts as one stack compute what they did one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax_models import Decoder, DecoderConfig, stack_experts
from qjax_models.config import ExpertsConfig
from qjax_models.expert_blocks import blocks_of
from qjax_models.experts import Experts

FORWARD = nnx.jit(Experts.__call__)


@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize(("tokens", "count", "per_token"), [(1, 8, 3), (9, 4, 2), (40, 3, 1)])
def test_every_row_is_in_a_block_of_its_expert(rows, tokens, count, per_token):
    keys = jax.random.split(jax.random.key(tokens), tokens)
    chosen = np.stack([jax.random.permutation(key, count)[:per_token] for key in keys])
    blocks = blocks_of(jnp.asarray(chosen), count, rows)
    for token, (experts, places) in enumerate(zip(chosen, blocks.places, strict=True)):
        for expert, place in zip(experts, places, strict=True):
            assert blocks.tokens[place // rows, place % rows] == token
            assert blocks.expert[place // rows] == expert
    assert np.sum(np.asarray(blocks.tokens) < tokens) == tokens * per_token
    assert len(set(np.asarray(blocks.places).flat)) == tokens * per_token


@pytest.fixture(scope="module")
def model() -> Decoder:
    experts = ExpertsConfig(count=6, per_token=2, mlp_size=32, normalized=True)
    config = DecoderConfig(
        vocab_size=64, hidden_size=32, mlp_size=48, num_layers=1, num_heads=2, num_kv_heads=1,
        head_size=16, max_positions=64, initializer_std=0.3, experts=experts,
    )  # fmt: skip
    return Decoder(config, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("scheme", [None, "w4a16-g16", "nvfp4"])
def test_a_stack_gives_what_its_experts_do(model, scheme):
    if scheme is not None:
        model, _ = qjax.quantize_model(model, scheme)
    apart = model.model.layers[0].sparse
    together = nnx.clone(model)
    stack_experts(together)
    stacked = together.model.layers[0].sparse
    assert stacked.stacked and not hasattr(stacked, "experts")
    for shape in ((1, 1, 32), (2, 20, 32)):
        x = jax.random.normal(jax.random.key(0), shape)
        found, expected = FORWARD(stacked, x), FORWARD(apart, x)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_experts_whose_inputs_stand_in_orders_of_their_own(model):
    """Each in another; one whose inputs stand as they are stays apart with all others."""
    model, _ = qjax.quantize_model(model, "w4a16-g16")
    apart = model.model.layers[0].sparse
    for i, expert in enumerate(apart.experts):
        for layer in (expert.gate_proj, expert.up_proj, expert.down_proj):
            q = layer.kernel.get_value()
            order = np.random.default_rng(i).permutation(q.shape[0]).astype(np.int32)
            layer.kernel.set_value(q.replaced(order=jnp.asarray(order)))
    together, mixed = nnx.clone(model), nnx.clone(model)
    stack_experts(together)
    stacked = together.model.layers[0].sparse
    assert stacked.stacked
    x = jax.random.normal(jax.random.key(0), (2, 20, 32))
    np.testing.assert_allclose(FORWARD(stacked, x), FORWARD(apart, x), rtol=1e-5, atol=1e-5)
    kernel = mixed.model.layers[0].sparse.experts[3].up_proj.kernel
    kernel.set_value(kernel.get_value().replaced(order=None))
    stack_experts(mixed)
    assert not mixed.model.layers[0].sparse.stacked


def test_experts_of_different_schemes_stay_apart(model):
    rules = [[".*experts/3/up_proj", "w8a16-g16"], [".*", "w4a16-g16"]]
    mixed, _ = qjax.quantize_model(model, qjax.Recipe.from_json(rules))
    stack_experts(mixed)
    assert not mixed.model.layers[0].sparse.stacked


def test_a_stacked_model_is_not_calibrated(model):
    stacked = nnx.clone(model)
    stack_experts(stacked)
    with pytest.raises(ValueError, match="needs one weight for all rows; this layer has a batch"):
        qjax.calibrate(stacked, [jnp.zeros((1, 4), jnp.int32)])
