# SPDX-License-Identifier: Apache-2.0
"""Linen layers train in FP8: through Flax's TrainState without a line, and in a loop of one's own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.training.train_state import TrainState

from qjax.low_precision import DelayedDotGeneral, dot_general

OVERWRITTEN = "_overwrite_with_gradient"
HOOKS = {
    "none": {},
    "current": {"dot_general": dot_general},
    "delayed": {"dot_general_cls": functools.partial(DelayedDotGeneral, window=4)},
}


class Model(nn.Module):
    hooks: str

    @nn.compact
    def __call__(self, x):
        h = nn.gelu(nn.Dense(32, **HOOKS[self.hooks])(x))
        h = nn.DenseGeneral((2, 8), **HOOKS[self.hooks])(h)
        return nn.DenseGeneral(4, axis=(-2, -1), **HOOKS[self.hooks])(nn.gelu(h))


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((128, 8)), jnp.float32)
    return x, jnp.tanh(x @ jnp.asarray(rng.standard_normal((8, 4)), jnp.float32))


def trained(hooks, data, steps: int = 80):
    """Flax's own recipe: the variables are the parameters of the state."""
    model = Model(hooks)
    variables = jax.jit(model.init)(jax.random.key(0), data[0])
    state = TrainState.create(apply_fn=model.apply, params=variables, tx=optax.adam(1e-2))

    @jax.jit
    def train_step(state):
        def loss_fn(variables):
            return jnp.mean((state.apply_fn(variables, data[0]) - data[1]) ** 2)

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads), loss

    losses = []
    for _ in range(steps):
        state, loss = train_step(state)
        losses.append(float(loss))
    return losses, state


@pytest.fixture(scope="module")
def exact(data):
    return trained("none", data)[0]


@pytest.mark.parametrize("hooks", ["current", "delayed"])
def test_train_state(hooks, data, exact):
    losses, state = trained(hooks, data)
    assert exact[-1] < 0.2 * exact[0]
    assert losses[-1] < 1.15 * exact[-1] and losses != exact
    histories = jax.tree.leaves(state.params.get(OVERWRITTEN, {}))
    assert len(histories) == (9 if hooks == "delayed" else 0)
    assert all((h > 0).all() and h[-1] == 1 and h.shape == (5,) for h in histories)


def test_a_loop_of_ones_own(data):
    """One line: the gradients of that collection are its next values."""
    model = Model("delayed")
    variables = jax.jit(model.init)(jax.random.key(0), data[0])
    optimizer = optax.sgd(0.1)
    state = optimizer.init(variables["params"])

    @jax.jit
    def step(variables, state):
        def loss_fn(variables):
            return jnp.mean((model.apply(variables, data[0]) - data[1]) ** 2)

        loss, grads = jax.value_and_grad(loss_fn)(variables)
        updates, state = optimizer.update(grads["params"], state)
        params = optax.apply_updates(variables["params"], updates)
        return {"params": params, OVERWRITTEN: grads[OVERWRITTEN]}, state, loss

    losses = []
    for _ in range(20):
        variables, state, loss = step(variables, state)
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]
    first = variables[OVERWRITTEN]["Dense_0"]["DelayedDotGeneral_0"]["inputs"]
    largest = float(jnp.abs(data[0]).max())
    np.testing.assert_allclose(first, [largest] * 4 + [1], rtol=1e-6)


def test_attention_takes_the_hooks():
    layer = nn.MultiHeadDotProductAttention(
        num_heads=2, qkv_dot_general_cls=DelayedDotGeneral, out_dot_general_cls=DelayedDotGeneral
    )
    variables = jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((1, 3, 8)))
    assert len(jax.tree.leaves(variables[OVERWRITTEN])) == 12
