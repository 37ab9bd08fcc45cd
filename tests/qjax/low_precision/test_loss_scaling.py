# SPDX-License-Identifier: Apache-2.0
"""Loss scaling leaves an optimizer as it is where nothing overflows, and the state where something does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qjax.low_precision import dynamic_loss_scaling, loss_scale

PARAMS = {"w": jnp.array([1.0, -2.0, 3.0]), "b": jnp.array(0.5)}
GOOD = {"w": jnp.array([0.1, 0.2, -0.3]), "b": jnp.array(-1.0)}


def scaled(gradients, state):
    return jax.tree.map(lambda g: g * loss_scale(state), gradients)


def with_one(bad: float):
    return GOOD | {"w": jnp.array([0.1, bad, -0.3])}


@pytest.mark.parametrize("inner", [optax.sgd(0.1), optax.adam(0.1), optax.adamw(0.1)])
def test_without_overflow_it_is_the_inner_optimizer(inner):
    """A scale that is a power of two rounds nothing; XLA may still fuse two programs differently."""
    wrapped = dynamic_loss_scaling(inner, growth_interval=2)
    state, plain = wrapped.init(PARAMS), inner.init(PARAMS)
    update = jax.jit(wrapped.update)
    for step in range(5):
        gradients = jax.tree.map(lambda g: g * (step + 1), GOOD)  # noqa: B023  used at once
        want, plain = jax.jit(inner.update)(gradients, plain, PARAMS)
        got, state = update(scaled(gradients, state), state, PARAMS)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, want)
    assert float(loss_scale(state)) == 2.0**17 and int(state.good_steps) == 1


@pytest.mark.parametrize("bad", [jnp.inf, -jnp.inf, jnp.nan])
def test_an_overflow_is_skipped_and_counted(bad):
    optimizer = dynamic_loss_scaling(optax.adam(0.1), initial=8.0)
    _, before = optimizer.update(scaled(GOOD, state := optimizer.init(PARAMS)), state, PARAMS)
    updates, after = jax.jit(optimizer.update)(with_one(bad), before, PARAMS)
    assert all((u == 0).all() for u in jax.tree.leaves(updates))
    jax.tree.map(np.testing.assert_array_equal, after.inner_state, before.inner_state)
    assert float(after.loss_scale) == 4 and int(after.good_steps) == 0
    assert int(after.skipped_steps) == 1 and int(after.stuck_steps) == 0


def test_growth_and_its_end():
    optimizer = dynamic_loss_scaling(
        optax.sgd(0.1), initial=4.0, growth_interval=3, growth=3.0, greatest=20.0
    )
    state, scales = optimizer.init(PARAMS), []
    # An overflow in the middle starts the count anew.
    for bad in (False, False, True, False, False, False, False, False, False, False):
        gradients = with_one(jnp.nan) if bad else GOOD
        _, state = optimizer.update(gradients, state, PARAMS)
        scales.append(float(state.loss_scale))
    assert scales == [4, 4, 2, 2, 2, 6, 6, 6, 18, 18]
    for _ in range(3):
        _, state = optimizer.update(GOOD, state, PARAMS)
    assert float(state.loss_scale) == 20 and int(state.skipped_steps) == 1


def test_at_the_least_scale_it_stays_and_says_so():
    optimizer = dynamic_loss_scaling(optax.sgd(0.1), initial=4.0, least=1.5)
    state = optimizer.init(PARAMS)
    seen = []
    for _ in range(4):
        _, state = optimizer.update(with_one(jnp.nan), state, PARAMS)
        seen.append((float(state.loss_scale), int(state.skipped_steps), int(state.stuck_steps)))
    assert seen == [(2.0, 1, 0), (1.5, 2, 0), (1.5, 3, 1), (1.5, 4, 2)]


def test_gradients_that_float16_loses_come_back():
    """2**-28 lies below float16's least number; 2**15 times that does not."""
    x = jnp.float16(2.0**-14)

    def loss(w, scale):
        return (w.astype(jnp.float16) * x * jnp.float16(2.0**-14)).astype(jnp.float32) * scale

    optimizer = dynamic_loss_scaling(optax.sgd(1.0))
    w = jnp.float32(1)
    state = optimizer.init(w)
    assert float(jax.grad(loss)(w, 1.0)) == 0
    updates, _ = optimizer.update(jax.grad(loss)(w, loss_scale(state)), state, w)
    assert float(updates) == -(2.0**-28)


class TestInside:
    """Wherever the wrapper stands, the scale is found and a step is skipped as a whole."""

    @pytest.mark.parametrize(
        "outer",
        [
            pytest.param(lambda o: optax.chain(optax.identity(), o), id="chain"),
            pytest.param(lambda o: optax.masked(o, {"w": True, "b": False}), id="masked"),
            pytest.param(
                lambda o: optax.partition(
                    {"x": o, "y": optax.sgd(0.0)}, lambda _: {"w": "x", "b": "y"}
                ),
                id="partition",
            ),
        ],
    )
    def test_others(self, outer):
        optimizer = outer(dynamic_loss_scaling(optax.adam(0.1), initial=16.0))
        state = optimizer.init(PARAMS)
        updates, state = jax.jit(optimizer.update)(with_one(jnp.inf), state, PARAMS)
        assert (updates["w"] == 0).all() and float(loss_scale(state)) == 8
        updates, state = jax.jit(optimizer.update)(GOOD, state, PARAMS)
        assert (jnp.sign(updates["w"]) == -jnp.sign(GOOD["w"])).all()

    def test_multi_steps_inside(self):
        """Only that micro-batch is left out."""
        inner = optax.MultiSteps(optax.sgd(0.1), 2)
        optimizer = dynamic_loss_scaling(inner.gradient_transformation(), initial=16.0)
        state = optimizer.init(PARAMS)
        for gradients in (GOOD, with_one(jnp.inf), GOOD):
            updates, state = jax.jit(optimizer.update)(scaled(gradients, state), state, PARAMS)
        np.testing.assert_allclose(updates["w"], -0.1 * GOOD["w"], rtol=1e-6)

    def test_extra_arguments_reach_the_inner_optimizer(self):
        inner = optax.contrib.reduce_on_plateau(patience=1, factor=0.5)
        optimizer = dynamic_loss_scaling(inner)
        updates, _ = optimizer.update(GOOD, optimizer.init(PARAMS), PARAMS, value=jnp.float32(1.0))
        assert updates["w"].shape == (3,)


def test_one_shard_that_overflows_stops_all():
    mesh = Mesh(jax.devices()[:2], ("x",))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    params = jax.device_put(jnp.ones(8), sharding)
    gradients = jax.device_put(jnp.ones(8).at[7].set(jnp.inf), sharding)
    optimizer = dynamic_loss_scaling(optax.sgd(1.0))
    updates, state = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
    assert (updates == 0).all() and updates.sharding.spec == PartitionSpec("x")
    assert int(state.skipped_steps) == 1


@pytest.mark.one_version
def test_a_float16_model_with_float32_parameters_trains(rng):
    """From a scale that overflows at first, to the loss that float32 reaches."""
    x = jnp.asarray(rng.standard_normal((64, 8)), jnp.float32)
    y = jnp.tanh(x @ jnp.asarray(rng.standard_normal((8, 4)), jnp.float32))

    def trained(dtype):
        model = nnx.Sequential(
            nnx.Linear(8, 32, dtype=dtype, rngs=nnx.Rngs(0)), nnx.gelu,
            nnx.Linear(32, 4, dtype=dtype, rngs=nnx.Rngs(1)),
        )  # fmt: skip
        wrapped = dynamic_loss_scaling(optax.adam(1e-2), initial=2.0**24)
        optimizer = nnx.Optimizer(model, wrapped, wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            def loss_fn(model):
                loss = jnp.mean((model(x).astype(jnp.float32) - y) ** 2)
                return loss * loss_scale(optimizer.opt_state), loss

            (_, loss), gradients = nnx.value_and_grad(loss_fn, has_aux=True)(model)
            optimizer.update(model, gradients)
            return loss

        losses = [float(step(model, optimizer)) for _ in range(150)]
        assert model.layers[0].kernel[...].dtype == jnp.float32
        return losses, int(optimizer.opt_state.skipped_steps[...])

    (exact, none_skipped), (half, skipped) = trained(jnp.float32), trained(jnp.float16)
    assert none_skipped == 0 and 1 <= skipped <= 12
    assert half[-1] < 0.2 * half[0] and half[-1] < 1.1 * exact[-1 - skipped]


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"initial": 0.0}, "positive number, got initial=0.0"),
        ({"initial": float("nan")}, "positive number, got initial=nan"),
        ({"least": -1.0}, "positive number, got least=-1.0"),
        ({"greatest": float("inf")}, "positive number, got greatest=inf"),
        ({"initial": 0.5}, "least <= initial <= greatest"),
        ({"growth_interval": 0}, "at least 1, got growth_interval=0"),
        ({"growth": 1.0}, "above 1, got growth=1.0"),
        ({"backoff": 1.0}, r"\(0, 1\), got backoff=1.0"),
    ],
)
def test_bad_numbers(choices, message):
    with pytest.raises(ValueError, match=message):
        dynamic_loss_scaling(optax.sgd(0.1), **choices)


def test_a_state_without_a_scale_or_with_two():
    with pytest.raises(ValueError, match="holds 0 loss scales"):
        loss_scale(optax.adam(0.1).init(PARAMS))
    twice = dynamic_loss_scaling(dynamic_loss_scaling(optax.sgd(0.1)))
    with pytest.raises(ValueError, match="holds 2 loss scales"):
        loss_scale(twice.init(PARAMS))
