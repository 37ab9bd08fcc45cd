# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
from optax.contrib import muon

from shipped_model_training.optimizer import make_optimizer, schedule_factor
from shipped_model_training.settings import TrainingSettings


def test_stacked_matrices_move_as_each_would_alone() -> None:
    settings = TrainingSettings(matrix_decay=0.1)
    keys = jax.random.split(jax.random.key(0), 2)
    stack = {"w": jax.random.normal(keys[0], (3, 8, 12))}
    gradients = {"w": jax.random.normal(keys[1], (3, 8, 12))}
    optimizer = make_optimizer(settings)
    updates, _ = optimizer.update(gradients, optimizer.init(stack), stack)
    alone = muon(settings.matrix_rate, weight_decay=settings.matrix_decay)
    for layer in range(3):
        one = {"w": stack["w"][layer]}
        expected, _ = alone.update({"w": gradients["w"][layer]}, alone.init(one), one)
        np.testing.assert_allclose(updates["w"][layer], expected["w"], atol=1e-6)


def test_embeddings_and_norms_go_to_adam() -> None:
    optimizer = make_optimizer(TrainingSettings(other_rate=0.5))
    parameters = {"table": jnp.zeros((4, 3)), "norm": jnp.zeros((2, 3))}
    gradients = {"table": jnp.full((4, 3), 7.0), "norm": jnp.full((2, 3), -0.07)}
    updates, _ = optimizer.update(gradients, optimizer.init(parameters), parameters)
    # Adam's first step has the rate's size, whatever the gradient's; Nesterov makes it 1.4 / 0.95 of it.
    np.testing.assert_allclose(updates["table"], -0.5 * 1.4 / 0.95, rtol=1e-4)
    np.testing.assert_allclose(updates["norm"], 0.5 * 1.4 / 0.95, rtol=1e-4)


def test_schedule_rises_falls_and_ends_at_zero() -> None:
    factors = schedule_factor(jnp.arange(101), 100, 20)
    assert factors.argmax() in (19, 20)
    assert (jnp.diff(factors[:20]) > 0).all() and (jnp.diff(factors[21:]) < 0).all()
    assert factors[100] == 0.0 and factors.max() == 1.0


def test_schedule_in_the_warmup_does_not_know_the_end() -> None:
    steps = jnp.arange(20)
    assert jnp.array_equal(schedule_factor(steps, 100, 20), schedule_factor(steps, 2**30, 20))
