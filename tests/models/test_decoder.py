# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qjax_models import Decoder

forward = nnx.jit(Decoder.__call__)
prefill = nnx.jit(Decoder.prefill, static_argnames="capacity")
extend = nnx.jit(Decoder.extend)

CHUNKS = (1, 3, 1)  # tokens per step after the prefill
LENGTHS = np.array([13, 4])  # of the prompts
CAPACITY = 24


def test_cached_steps_give_the_logits_of_the_full_forward(golden):
    model, tokens = golden.model(), jnp.asarray(golden.tokens)
    total = LENGTHS.max() + sum(CHUNKS)
    full = forward(model, tokens[:, :total])
    # The padding is longer than one row's prompt and shorter than the capacity.
    hidden, cache = prefill(model, tokens[:, :14], jnp.asarray(LENGTHS, jnp.int32), CAPACITY)
    rows = np.arange(2)
    found = model.logits(hidden)
    np.testing.assert_allclose(found[rows, LENGTHS - 1], full[rows, LENGTHS - 1], atol=2e-5)

    starts = LENGTHS.copy()
    for count in CHUNKS:
        positions = starts[:, None] + np.arange(count)
        hidden, cache = extend(model, tokens[rows[:, None], positions], cache)
        np.testing.assert_allclose(model.logits(hidden), full[rows[:, None], positions], atol=2e-5)
        starts += count
    assert cache.lengths.tolist() == starts.tolist()


def test_prompts_beyond_the_capacity_are_refused(goldens):
    model = goldens["llama"].model()
    with pytest.raises(ValueError, match="prompts of 40 tokens exceed capacity=8"):
        model.prefill(jnp.asarray(goldens["llama"].tokens), jnp.array([40, 40]), 8)


def test_a_window_longer_than_the_sequence_changes_nothing(goldens):
    golden = goldens["mistral"]
    tokens = jnp.asarray(golden.tokens)
    wide = golden.model(replace(golden.config, sliding_window=tokens.shape[1]))
    full = golden.model(replace(golden.config, sliding_window=None, sliding_layers=()))
    np.testing.assert_allclose(forward(wide, tokens), forward(full, tokens), atol=1e-6)


def test_later_tokens_change_nothing_before_them(golden):
    model, tokens = golden.model(), jnp.asarray(golden.tokens)
    changed = tokens.at[:, 20:].set(3)
    before = forward(model, tokens)[:, :20]
    np.testing.assert_array_equal(before, forward(model, changed)[:, :20])


def test_gradients_are_finite_and_reach_every_parameter(golden):
    graph, params = nnx.split(golden.model())
    tokens = jnp.asarray(golden.tokens)

    def loss(params):
        logits = nnx.merge(graph, params)(tokens[:, :-1])
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)
        return -picked.mean()

    gradients = nnx.to_flat_state(jax.jit(jax.grad(loss))(params))
    for path, gradient in gradients:
        values = np.asarray(gradient[...])
        assert np.isfinite(values).all(), path
        # A bias on all keys shifts a query's scores alike: softmax does not see it.
        assert np.abs(values).max() > 0 or path[-2:] == ("k_proj", "bias"), path


def test_a_gradient_is_the_slope_of_the_loss(goldens):
    golden = goldens["gemma2"]
    graph, params = nnx.split(golden.model())
    tokens = jnp.asarray(golden.tokens)[:, :12]

    @jax.jit
    def loss(params):
        return (nnx.merge(graph, params)(tokens) ** 2).mean()

    direction = jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(x.size), x.shape) * 1e-3, params
    )
    plus = loss(jax.tree.map(jnp.add, params, direction))
    minus = loss(jax.tree.map(jnp.subtract, params, direction))
    products = jax.tree.map(lambda g, d: (g * d).sum(), jax.grad(loss)(params), direction)
    slope = sum(jax.tree.leaves(products))
    assert float(slope) == pytest.approx(float(plus - minus) / 2, rel=2e-2)


@pytest.mark.parametrize("types", [{"dtype": "bfloat16"}, {"compute_dtype": "bfloat16"}])
@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3"])
def test_bfloat16_stays_near_float32(goldens, name, types):
    golden = goldens[name]
    model, tokens = golden.model(**types), jnp.asarray(golden.tokens)
    hidden = nnx.jit(Decoder.hidden)(model, tokens)
    assert hidden.dtype == jnp.bfloat16
    logits = model.logits(hidden)
    assert logits.dtype == jnp.float32
    error = np.linalg.norm(logits - golden.logits) / np.linalg.norm(golden.logits)
    assert error < 0.05
    expected = jnp.bfloat16 if "dtype" in types else jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(expected)}


def test_bfloat16_steps_agree_with_bfloat16_full_forward(goldens):
    golden = goldens["llama"]
    model, tokens = golden.model(dtype="bfloat16"), jnp.asarray(golden.tokens)[:1]
    full = forward(model, tokens)
    _, cache = prefill(model, tokens[:, :8], jnp.array([8], jnp.int32), 16)
    hidden, _ = extend(model, tokens[:, 8:9], cache)  # a single row takes its own road on a CPU
    error = np.abs(model.logits(hidden)[:, 0] - full[:, 8]).max()
    assert error < 0.05 * np.abs(full).max()


def test_abstract_has_the_shapes_of_the_model_and_no_arrays(golden):
    abstract = Decoder.abstract(golden.config, "bfloat16")
    leaves = jax.tree.leaves(nnx.state(abstract))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    made = nnx.state(Decoder(golden.config, dtype="bfloat16", rngs=nnx.Rngs(0)))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), nnx.state(abstract)) == jax.tree.map(
        lambda x: (x.shape, x.dtype), made
    )
    assert nnx.graphdef(abstract) == nnx.graphdef(
        Decoder(golden.config, dtype="bfloat16", rngs=nnx.Rngs(0))
    )


WRONG = [
    ({"num_kv_heads": 3}, "num_heads=4 must be a multiple of num_kv_heads=3"),
    ({"head_size": 5}, "head_size=5 must be even"),
    ({"vocab_size": 0}, "vocab_size=0 must be positive"),
    ({"sliding_layers": (0,), "sliding_window": None}, "sliding_window is None"),
    ({"sliding_layers": (7,), "sliding_window": 4}, r"sliding_layers \[7\] lie outside 0..2"),
    ({"sliding_window": 0}, "sliding_window=0 must be positive"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_sizes_that_do_not_fit_are_refused(goldens, change, message):
    with pytest.raises(ValueError, match=message):
        replace(goldens["llama"].config, **change)
