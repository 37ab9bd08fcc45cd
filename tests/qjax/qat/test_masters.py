# SPDX-License-Identifier: Apache-2.0
"""The optimizer's side of the straight-through estimator, alone and in optax's compositions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import qjax

SCHEME = "w4a16-channel"


def params():
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "up": {"kernel": jax.random.normal(keys[0], (16, 8)), "bias": jnp.zeros(8)},
        "down": {"kernel": jax.random.normal(keys[1], (8, 4))},
    }


def loss(params, x):
    h = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"])
    return jnp.mean((h @ params["down"]["kernel"] - jnp.cos(x[:, :4])) ** 2)


def batch(step: int):
    return jax.random.normal(jax.random.key(step + 10), (32, 16))


def run(optimizer, steps: int, recipe=SCHEME):
    """A user's own loop; yields the parameters and the state behind each step."""
    state = optimizer.init(params())
    now = qjax.on_grid(params(), recipe)

    @jax.jit
    def step(now, state, x):
        updates, state = optimizer.update(jax.grad(loss)(now, x), state, now)
        return optax.apply_updates(now, updates), state

    for number in range(steps):
        now, state = step(now, state, batch(number))
        yield now, state


def by_hand(inner, steps: int, recipe=SCHEME):
    """Masters outside, the gradient at what they are worth."""
    full, state = params(), inner.init(params())
    for number in range(steps):
        gradients = jax.grad(loss)(qjax.fake_quant(full, recipe), batch(number))
        updates, state = inner.update(gradients, state, full)
        full = optax.apply_updates(full, updates)
        yield full


def assert_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: tx,
        lambda tx: optax.chain(optax.clip_by_global_norm(1e9), tx),
        lambda tx: optax.with_extra_args_support(tx),
    ],
    ids=["alone", "chain", "extra"],
)
def test_equals_the_estimator_by_hand(wrap) -> None:
    inner = optax.adamw(optax.linear_schedule(0.05, 0.0, 20), weight_decay=0.01)
    ours = run(wrap(qjax.straight_through(inner, SCHEME)), 12)
    for (now, state), full in zip(ours, by_hand(inner, 12), strict=True):
        assert_close(qjax.masters(state), full, rtol=1e-4, atol=1e-6)
        on_grid = qjax.fake_quant(qjax.masters(state), SCHEME)
        # One addition in float32 away, and the same codes.
        assert_close(now, on_grid, rtol=2e-7, atol=1e-7)


def test_buffers_may_be_given_up() -> None:
    tx = qjax.straight_through(optax.adam(0.1), SCHEME)
    now, state = qjax.on_grid(params(), SCHEME), tx.init(params())

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(now, state):
        updates, state = tx.update(jax.grad(loss)(now, batch(0)), state, now)
        return optax.apply_updates(now, updates), state

    for _ in range(3):
        now, state = step(now, state)
    assert_close(now, qjax.fake_quant(qjax.masters(state), SCHEME), rtol=2e-7, atol=1e-7)


def test_masters_of_16_bit_parameters_move_by_less_than_those_could() -> None:
    first = {"kernel": jnp.full((16, 4), 1.0, jnp.bfloat16).at[0].set(2.0)}
    tx = qjax.straight_through(optax.sgd(1e-4), "w8a16-channel")
    now, state = qjax.on_grid(first, "w8a16-channel"), tx.init(first)
    for _ in range(200):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, now), state, now)
        now = optax.apply_updates(now, updates)
    assert (
        qjax.masters(state)["kernel"].dtype == jnp.float32 and now["kernel"].dtype == jnp.bfloat16
    )
    np.testing.assert_allclose(qjax.masters(state)["kernel"][1:], 0.98, rtol=1e-4)
    worth = qjax.fake_quant(qjax.masters(state), "w8a16-channel", dtype=jnp.bfloat16)["kernel"]
    np.testing.assert_allclose(now["kernel"].astype(jnp.float32), worth, rtol=2**-8)


def test_gradient_accumulation() -> None:
    tx = optax.MultiSteps(qjax.straight_through(optax.sgd(0.1), SCHEME), every_k_schedule=2)
    seen = [now for now, _ in run(tx, 4)]
    assert_close(seen[0], qjax.on_grid(params(), SCHEME), rtol=0, atol=0)
    gradients = [jax.grad(loss)(qjax.on_grid(params(), SCHEME), batch(i)) for i in (0, 1)]
    full = jax.tree.map(lambda p, a, b: p - 0.05 * (a + b), params(), *gradients)
    assert_close(seen[1], qjax.fake_quant(full, SCHEME), rtol=1e-5, atol=1e-6)


def test_masked() -> None:
    mask = {"up": True, "down": False}
    tx = optax.chain(
        optax.masked(qjax.straight_through(optax.sgd(0.1), SCHEME), mask),
        optax.masked(optax.set_to_zero(), {"up": False, "down": True}),
    )
    *_, (now, state) = run(tx, 3)
    assert set(qjax.masters(state)) == {"up", "down"}
    assert_close(now["down"], qjax.on_grid(params(), SCHEME)["down"], rtol=0, atol=0)
    assert_close(
        now["up"], qjax.fake_quant(qjax.masters(state)["up"], SCHEME), rtol=2e-7, atol=1e-7
    )


def test_bits_are_annealed() -> None:
    stages = [(0, "w8a16-channel"), (3, "w4a16-channel"), (5, "w2a16-channel")]
    values = []
    for now, state in run(qjax.straight_through(optax.sgd(0.05), stages), 7, stages):
        stage = stages[sum(len(values) >= first for first, _ in stages) - 1][1]
        assert_close(now, qjax.fake_quant(qjax.masters(state), stage), rtol=1e-6, atol=1e-6)
        values.append(len(np.unique(np.round(np.asarray(now["up"]["kernel"][:, 0]), 4))))
    assert max(values[5:]) <= 4 < min(values[:3])


def test_layers_freeze_one_after_the_other() -> None:
    tx = qjax.straight_through(optax.sgd(0.1), SCHEME, frozen={"up": 2, "down": 4})
    seen = [now for now, _ in run(tx, 6)]
    moved = [
        {layer: bool((a[layer]["kernel"] != b[layer]["kernel"]).any()) for layer in ("up", "down")}
        for a, b in zip(seen, seen[1:], strict=False)
    ]
    assert [m["up"] for m in moved] == [True, False, False, False, False]
    assert [m["down"] for m in moved] == [True, True, True, False, False]


def test_one_bad_gradient_shows_in_the_parameters() -> None:
    tx = qjax.straight_through(optax.adam(1e-2), SCHEME)
    state, now = tx.init(params()), qjax.on_grid(params(), SCHEME)
    gradients = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), now)
    updates, state = jax.jit(tx.update)(gradients, state, now)
    now = optax.apply_updates(now, updates)
    assert all(jnp.isnan(leaf).all() for leaf in jax.tree.leaves(now))


def test_every_master_is_float32() -> None:
    narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params())
    state = qjax.straight_through(optax.adam(1e-2), SCHEME).init(narrow)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(qjax.masters(state))} == {"float32"}


def test_stages_tighten_the_same_layers() -> None:
    one = qjax.Recipe.from_json([["down", None], ["up", "w2a16-channel"]])
    for later, match in {
        "w8a16-channel": "down: 4 bits before step 3 and 8 bits from then on",
        one: "down: 4 bits before step 3 and not quantized from then on",
    }.items():
        with pytest.raises(ValueError, match=match):
            qjax.straight_through(optax.sgd(1.0), [(0, SCHEME), (3, later)]).init(params())


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="stages begin at step 0 and follow one another"):
        qjax.straight_through(optax.sgd(1.0), [(5, SCHEME)])
    with pytest.raises(
        ValueError, match="frozen: 'layer' matches no quantized layer; paths look like"
    ):
        qjax.straight_through(optax.sgd(1.0), SCHEME, frozen={"layer": 1}).init(params())
    tx = qjax.straight_through(optax.sgd(1.0), SCHEME)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(params(), tx.init(params()))
    with pytest.raises(ValueError, match="no rule .* quantizes a leaf"):
        qjax.straight_through(optax.sgd(1.0), SCHEME).init({"bias": jnp.ones(3)})
    with pytest.raises(ValueError, match="found 0"):
        qjax.masters(optax.adam(1.0).init(params()))
