# SPDX-License-Identifier: Apache-2.0
"""Stock NNX layers train in FP8 by a user's own step; histories stay out of everybody's way."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import qjax
from qjax.low_precision import AmaxHistory, DelayedProduct, amax_history, end_fp8, train_in_fp8
from qjax.low_precision import value_and_grad as fp8_value_and_grad
from qjax.nnx_layers import Router
from qjax.scheme import Recipe
from qjax_models import Decoder, DecoderConfig

D, HEADS, SIZE, VOCABULARY = 16, 2, 8, 32


class Model(nnx.Module):
    """Each stock layer once, a head and a router that stay as they are, and tokens in."""

    def __init__(self, seed: int = 0):
        rngs = nnx.Rngs(seed)
        self.embed = nnx.Embed(VOCABULARY, D, rngs=rngs)
        self.up = nnx.Linear(D, 32, rngs=rngs)
        self.heads = nnx.LinearGeneral(32, (HEADS, SIZE), rngs=rngs)
        self.joined = nnx.Einsum("bhk,hkd->bd", (HEADS, SIZE, D), (D,), rngs=rngs)
        self.gate = Router(D, D, rngs=rngs)
        self.norm = nnx.LayerNorm(D, rngs=rngs)
        self.lm_head = nnx.Linear(D, VOCABULARY, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        h = self.joined(nnx.gelu(self.heads(nnx.gelu(self.up(x)))))
        return self.lm_head(self.norm(x + h * nnx.sigmoid(self.gate(x))))


IN_FP8 = {"up", "heads", "joined"}


def loss_fn(model, tokens, targets):
    return optax.softmax_cross_entropy_with_integer_labels(model(tokens), targets).mean()


def trained(model, value_and_grad, steps: int = 60):
    """A plain loop: what a user has."""
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer, tokens, targets):
        loss, grads = value_and_grad(loss_fn)(model, tokens, targets)
        optimizer.update(model, grads)
        return loss

    targets = jax.random.permutation(jax.random.key(3), VOCABULARY)
    tokens = jax.random.randint(jax.random.key(4), (steps, 64), 0, VOCABULARY)
    return [float(train_step(model, optimizer, t, targets[t])) for t in tokens], optimizer


def histories_of(model) -> dict[str, np.ndarray]:
    flat = nnx.to_flat_state(nnx.state(model, AmaxHistory))
    return {"/".join(map(str, path)): np.asarray(v[...]) for path, v in flat}


@pytest.mark.parametrize("scaling", ["current", "delayed"])
def test_which_layers(scaling):
    model = Model()
    before = nnx.to_flat_state(nnx.state(model, nnx.Param))
    assert set(train_in_fp8(model, scaling=scaling)) == IN_FP8
    assert type(model.up) is nnx.Linear
    after = nnx.to_flat_state(nnx.state(model, nnx.Param))
    assert [path for path, _ in after] == [path for path, _ in before]
    assert len(histories_of(model)) == (9 if scaling == "delayed" else 0)
    assert model.lm_head.dot_general is jax.lax.dot_general
    assert model.gate.dot_general is jax.lax.dot_general


@pytest.fixture(scope="module")
def exact():
    return trained(Model(), nnx.value_and_grad)[0]


class TestTraining:
    """Against the same loop in float32, with the same tokens."""

    def test_current_scaling_needs_no_line(self, exact):
        model = Model()
        train_in_fp8(model, scaling="current")
        losses, _ = trained(model, nnx.value_and_grad)
        assert exact[-1] < 0.5 * exact[0]
        assert np.mean(losses[-5:]) < 1.05 * np.mean(exact[-5:])
        assert losses != exact

    def test_delayed_scaling_takes_one(self, exact):
        model = Model()
        train_in_fp8(model, scaling="delayed", window=4)
        losses, optimizer = trained(model, fp8_value_and_grad)
        assert np.mean(losses[-5:]) < 1.05 * np.mean(exact[-5:])
        for path, history in histories_of(model).items():
            assert (history > 0).all() and history[-1] == 1, path
        # Neither are there moments of histories.
        moments = nnx.to_flat_state(nnx.state(optimizer.opt_state))
        assert not any("dot_general" in map(str, path) for path, _ in moments)

    def test_flax_s_own_step_works_with_histories_that_stay_empty(self, exact):
        """Who forgets the line trains with scales of 1, and no error."""
        model = Model()
        train_in_fp8(model, scaling="delayed")
        losses, _ = trained(model, nnx.value_and_grad, steps=3)
        assert np.isfinite(losses).all()
        assert all((history == 0).all() for history in histories_of(model).values())


def test_histories_are_the_largest_magnitudes():
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    train_in_fp8(model, window=2)
    step = nnx.jit(fp8_value_and_grad(lambda m, x: jnp.sum(m(x)) * 7))
    for size in (3.0, 5.0, 2.0):
        x = jnp.full((2, 4), size)
        loss, grads = step(model, x)
        assert set(nnx.to_pure_dict(grads)) == {"kernel", "bias"}
    hook = model.dot_general
    np.testing.assert_allclose(hook.inputs[...], [2, 5, 1])
    largest = float(jnp.abs(model.kernel[...]).max())
    np.testing.assert_allclose(hook.kernel[...], [largest, largest, 1], rtol=1e-6)
    np.testing.assert_allclose(hook.gradient[...], [7, 7, 1])


def test_evaluation_changes_nothing_and_auxiliaries_come_out():
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    train_in_fp8(model)
    model(jnp.ones((2, 4)))
    assert all((history == 0).all() for history in histories_of(model).values())
    (loss, aux), _ = fp8_value_and_grad(lambda m, x: (jnp.sum(m(x)), m(x)), has_aux=True)(
        model, jnp.ones((2, 4))
    )
    assert aux.shape == (2, 3) and float(loss) == pytest.approx(float(aux.sum()), rel=1e-6)


def test_a_layer_used_twice_and_one_not_used():
    class Two(nnx.Module):
        def __init__(self):
            self.twice = nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(0))
            self.never = nnx.Linear(4, 4, rngs=nnx.Rngs(1))

    model = Two()
    train_in_fp8(model, window=3)
    old = jnp.array([5.0, 2.0, 1.0, 1.0])
    model.never.dot_general.inputs[...] = old
    model.twice.kernel[...] = jnp.eye(4)
    step = nnx.jit(fp8_value_and_grad(lambda m, x: jnp.sum(m.twice(m.twice(x)))))
    for size in (64.0, 1.0, 1.0):
        step(model, jnp.full((2, 4), size))
        assert float(amax_history.reach(model.twice.dot_general.inputs[...])) == 128
    step(model, jnp.ones((2, 4)))
    assert float(amax_history.reach(model.twice.dot_general.inputs[...])) == 2
    np.testing.assert_array_equal(model.never.dot_general.inputs[...], old)


def test_stacked_layers_under_scan():
    """Layers that nnx.vmap made and nnx.scan runs have a history each."""

    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key):
        return nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(key))

    model = make(jax.random.split(jax.random.key(0), 3))
    model.kernel[...] = jnp.stack([jnp.eye(4) * f for f in (2.0, 4.0, 8.0)])
    assert train_in_fp8(model) == ("Linear",)

    def loss(model, x):
        return jnp.sum(
            nnx.scan(lambda m, x: m(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(model, x)
        )

    value, _ = fp8_value_and_grad(loss)(model, jnp.ones((2, 4)))
    assert float(value) == 8 * 64
    np.testing.assert_allclose(model.dot_general.inputs[:, 0], [1, 2, 8])
    np.testing.assert_allclose(model.dot_general.kernel[:, 0], [2, 4, 8])
    np.testing.assert_allclose(model.dot_general.gradient[:, 0], [32, 8, 1])


@pytest.mark.one_version
def test_a_decoder():
    config = DecoderConfig(
        vocab_size=32, hidden_size=16, mlp_size=32, num_layers=1, num_heads=2, num_kv_heads=1,
        head_size=8, max_positions=16,
    )  # fmt: skip
    model = Decoder(config, rngs=nnx.Rngs(0))
    paths = train_in_fp8(model)
    assert len(paths) == 7 and all("_proj" in path for path in paths)
    tokens = jnp.arange(16)[None]
    loss, grads = nnx.jit(fp8_value_and_grad(lambda m, t: jnp.mean(jnp.square(m(t)))))(
        model, tokens
    )
    assert all((history[0] > 0) for history in histories_of(model).values())
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("scaling", ["current", "delayed"])
def test_the_last_steps_in_their_own_dtype(scaling):
    """The same optimizer goes on, and the layers are a plain model's again, to the bit."""
    model, plain = Model(), Model()
    train_in_fp8(model, scaling=scaling)
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    train_step = nnx.jit(
        lambda model, optimizer, *batch: optimizer.update(
            model, fp8_value_and_grad(loss_fn)(model, *batch)[1]
        )
    )
    batch = jnp.arange(8), jnp.arange(8) + 1
    train_step(model, optimizer, *batch)
    in_fp8 = model(batch[0])
    assert set(end_fp8(model)) == IN_FP8
    assert not histories_of(model)
    nnx.update(plain, nnx.state(model, nnx.Param))
    np.testing.assert_array_equal(model(batch[0]), plain(batch[0]))
    assert not np.array_equal(in_fp8, plain(batch[0]))
    train_step(model, optimizer, *batch)
    assert int(optimizer.step[...]) == 2
    with pytest.raises(ValueError, match="no layer of the model multiplies in FP8: train_in_fp8"):
        end_fp8(model)


@pytest.mark.parametrize("scaling", ["current", "delayed"])
def test_afterwards_it_is_quantized_like_any_model(scaling):
    model = Model()
    train_in_fp8(model, scaling=scaling)
    quantized, _ = qjax.quantize_model(model, "w8a16-channel")
    plain, _ = qjax.quantize_model(Model(), "w8a16-channel")
    tokens = jnp.arange(4)
    np.testing.assert_allclose(
        jax.jit(quantized)(tokens), jax.jit(plain)(tokens), rtol=1e-5, atol=1e-6
    )


def test_a_recipe_decides():
    model = Model()
    recipe = Recipe.from_json([["up", None], ["lm_head", "fp8-dynamic"], [".*", "fp8-dynamic"]])
    assert set(train_in_fp8(model, recipe=recipe)) == {"heads", "joined", "lm_head"}
    assert isinstance(model.lm_head.dot_general, DelayedProduct)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([["nothing", "fp8-dynamic"]], "nothing"),
        ([["up", "w4a16"]], "up: w4a16-g128 is not trained in FP8: name fp8-dynamic, or null"),
        ([["up", "fp8-a16"]], "up: fp8-a16"),
        ([["embed", "fp8-dynamic"]], "embed: a table of embeddings has no product"),
    ],
)
def test_bad_recipes(rules, message):
    model = Model()
    with pytest.raises(ValueError, match=message):
        train_in_fp8(model, recipe=Recipe.from_json(rules))
    assert model.up.dot_general is jax.lax.dot_general  # and nothing has been changed


def test_other_bad_input():
    model, _ = qjax.quantize_model(Model(), "w8a16-channel")
    with pytest.raises(
        ValueError, match="is quantized already; FP8 training starts from plain weights"
    ):
        train_in_fp8(model)
    with pytest.raises(ValueError, match="'current' or 'delayed', got 'static'"):
        inspect.unwrap(train_in_fp8)(Model(), scaling="static")
    with pytest.raises(ValueError, match="at least one step, got window=0"):
        train_in_fp8(Model(), window=0)
    with pytest.raises(ValueError, match="0 or more, got margin=-1"):
        train_in_fp8(Model(), margin=-1)
