# SPDX-License-Identifier: Apache-2.0
"""Adam in 8 bits is optax's Adam within what its formats allow, in a fourth of the memory."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from qjax import formats
from qjax.low_precision import adam_8bit, adamw_8bit, scale_by_adam_8bit

B1, B2, EPS = 0.9, 0.999, 1e-8
DEFAULTS = {"b1": B1, "b2": B2, "eps": EPS, "second": "blocks", "block_size": 256}
DEFAULTS |= {"rounding": "stochastic"}
WAYS = list(itertools.product(("blocks", "float16"), ("stochastic", "nearest")))


def gradients(rng, shape=(6, 300)):
    """Of five orders of magnitude, a row of them small, and some zeros."""
    g = rng.standard_normal(shape) * 10.0 ** rng.uniform(-4, 1, shape)
    g[0] *= 1e-3
    g[:, ::7] = 0
    return jnp.asarray(g, jnp.float32)


def moments(state, tree_index=0):
    """What the codes of the first leaf stand for, in numpy, with blocks of 256 along rows of 300."""
    m, v, m_scale, v_scale = (np.asarray(jax.tree.leaves(part)[tree_index]) for part in state[1:])

    def spread(scale):
        return np.repeat(scale, 256, axis=-1)[..., : m.shape[-1]] if scale.size > 1 else scale

    first = m.astype(np.float64) * spread(m_scale)
    if v.dtype == np.float16:
        return first, v.astype(np.float64) * v_scale
    share = np.where(v > 0, 2.0 ** ((v.astype(np.float64) - 255) / 6), 0)
    return first, share * spread(v_scale)


def bytes_of(state) -> int:
    return formats.device_bytes(state[1:])


@pytest.mark.parametrize(("second", "most"), [("blocks", 0.26), ("float16", 0.3751)])
def test_memory_against_float32(second, most):
    params = {"a": jnp.ones((512, 256)), "b": jnp.ones((3, 3, 16, 64)), "c": jnp.ones(1024)}
    state = jax.eval_shape(scale_by_adam_8bit(second=second).init, params)
    ours, plain = bytes_of(state), jax.eval_shape(optax.scale_by_adam().init, params)
    ratio = ours / formats.device_bytes((plain.mu, plain.nu))
    assert 0.25 < ratio < most
    assert jax.tree.map(jnp.shape, state.mu) == jax.tree.map(jnp.shape, params)
    assert jax.tree.map(jnp.shape, state.nu) == jax.tree.map(jnp.shape, params)


@pytest.mark.parametrize(("second", "rounding"), WAYS)
def test_what_is_stored_is_near(rng, second, rounding):
    """After one step, from nothing: the update is optax's, the moments within a gap of theirs."""
    g = gradients(rng)
    optimizer = scale_by_adam_8bit(B1, B2, EPS, second=second, rounding=rounding)
    plain = optax.scale_by_adam(B1, B2, EPS)
    update, state = jax.jit(optimizer.update)(g, jax.jit(optimizer.init)(g))
    want, exact = jax.jit(plain.update)(g, jax.jit(plain.init)(g))
    np.testing.assert_allclose(update, want, rtol=2e-6, atol=1e-30)
    first, root = moments(state)
    m, v = np.asarray(exact.mu, np.float64), np.asarray(exact.nu, np.float64)
    gaps = 1.0 if rounding == "stochastic" else 0.5
    rows = np.abs(m).max(keepdims=True) if second == "float16" else _block_max(np.abs(m))
    # e4m3: 2**-3 of the value, or 2**-9 of the scale where it is subnormal.
    assert (
        np.abs(first - m) <= gaps * np.maximum(2.0**-3 * np.abs(m), 2.0**-9 * rows / 448) * 1.0001
    ).all()
    assert ((root > 0) == (v > 0)).all()
    if second == "blocks":
        least = _block_max(v) * 2.0 ** (-254 / 6)
        allowed = gaps * (2 ** (1 / 6) - 1) * v * 1.001
    else:
        least = v.max() / 2.0**15 * 2.0**-24
        allowed = gaps * np.maximum(2.0**-10 * v, least) * 1.001
    inside = v >= least
    assert (np.abs(root - v) <= allowed)[inside].all()
    assert (root <= np.broadcast_to(least, v.shape) * 1.001)[~inside].all()


def _block_max(x):
    blocks = np.maximum.reduceat(x, [0, 256], axis=-1)
    return np.repeat(blocks, 256, axis=-1)[:, : x.shape[-1]]


@pytest.mark.parametrize(("second", "rounding"), WAYS)
def test_the_second_update_is_within_the_formats_bound(rng, second, rounding):
    """u = m / (sqrt(v) + eps), with m off by a gap times b1 and the root by half a gap of v."""
    g, g2 = gradients(rng), gradients(np.random.default_rng(5))
    optimizer = scale_by_adam_8bit(B1, B2, EPS, second=second, rounding=rounding)
    plain = optax.scale_by_adam(B1, B2, EPS)

    def two_steps(tx):
        return tx.update(g2, tx.update(g, tx.init(g))[1])[0]

    got, want = (
        np.asarray(jax.jit(two_steps, static_argnums=0)(tx), np.float64)
        for tx in (optimizer, plain)
    )
    m, v = (np.asarray(x, np.float64) for x in ((1 - B1) * g, (1 - B2) * g**2))
    largest = _block_max(np.abs(m)) if second == "blocks" else np.abs(m).max()
    off_m = B1 * np.maximum(2.0**-3 * np.abs(m), 2.0**-9 * largest / 448) / (1 - B1**2)
    root = np.sqrt((B2 * v + (1 - B2) * np.square(np.asarray(g2, np.float64))) / (1 - B2**2)) + EPS
    # Half a gap of v is what its root is off by: 2**(1/6) and 2**-10 of a step.
    off_root = 2 ** (1 / 12) - 1 if second == "blocks" else 2.0**-11
    bound = off_m / root / (1 - off_root) + np.abs(want) * off_root / (1 - off_root)
    # Of a v beneath the last value but not zero the root is too large, and the update too small.
    least = _block_max(v) * 2.0 ** (-254 / 6) if second == "blocks" else v.max() * 2.0**-29
    inside = (v == 0) | (v >= least)
    # And float32: 1 - b2**2 is what is left of 1 after nine bits.
    assert (np.abs(got - want) <= bound + 2.0**-13 * np.abs(want) + 1e-30)[inside].all()
    assert (np.abs(got) <= np.abs(want) * 1.001 + bound)[~inside].all()


@functools.partial(jax.jit, static_argnums=(0, 1))
def after(rounding, steps, then):
    """Both moments of 64 rows of 63, after 300 gradients of 1 and so many of ``then``."""
    optimizer = scale_by_adam_8bit(B1, B2, EPS, rounding=rounding, block_size=64)

    def step(state, g):
        gradient = jnp.full((64, 64), g).at[:, -1].set(4.0)  # the last of a block sets its scale
        return optimizer.update(gradient, state)[1], None

    g = jnp.concatenate([jnp.ones(300), jnp.full(steps, then)])
    state, _ = jax.lax.scan(step, optimizer.init(jnp.zeros((64, 64))), g)
    m = state.mu.astype(jnp.float32) * state.mu_scale
    v = state.nu.astype(jnp.float32)
    v = jnp.where(v > 0, 2 ** ((v - 255) / 6), 0) * state.nu_scale
    return m[:, :-1], v[:, :-1]


class TestRounding:
    """Why it is stochastic: with constant gradients each moment should come to a known value."""

    def test_the_second_moment_sticks_without_it(self):
        """Of gradients 1 and then 2, v goes from 1 - b2**300 towards 4; only the block's scale moves it there."""
        tended = B2**500 * (1 - B2**300) + 4 * (1 - B2**500)
        _, near = after("nearest", 500, 2.0)
        _, by_chance = after("stochastic", 500, 2.0)
        assert near.max() < tended / 3
        assert float(by_chance.mean()) == pytest.approx(tended, rel=0.03)

    def test_the_first_moment_stops_short_without_it(self):
        near, _ = after("nearest", 500, 2.0)
        by_chance, _ = after("stochastic", 500, 2.0)
        assert near.max() < 0.9 * 2
        assert float(by_chance.mean()) == pytest.approx(2.0, rel=0.02)

    def test_it_decays_in_the_mean(self):
        """No more gradients: v must shrink by b2 a step, which the nearest never does."""
        _, by_chance = after("stochastic", 500, 0.0)
        _, near = after("nearest", 500, 0.0)
        want = (1 - B2**300) * B2**500
        assert float(by_chance.mean()) == pytest.approx(want, rel=0.05)
        assert near.min() > 0 and len(np.unique(near)) == 1


@pytest.mark.one_version
def test_training_ends_where_adam_ends():
    """A classifier of a noisy teacher; mean of the last hundred losses, the same batches for all."""
    steps, keys = 400, jax.random.split(jax.random.key(0), 6)
    teacher = jax.random.normal(keys[0], (16, 8))
    params = {
        "a": jax.random.normal(keys[1], (16, 64)) / 4, "b": jnp.zeros(64),
        "c": jax.random.normal(keys[2], (64, 8)) / 8,
    }  # fmt: skip

    def loss(p, key):
        x = jax.random.normal(key, (64, 16))
        y = jax.random.categorical(jax.random.fold_in(key, 1), jnp.tanh(x) @ teacher)
        return optax.softmax_cross_entropy_with_integer_labels(
            jax.nn.gelu(x @ p["a"] + p["b"]) @ p["c"], y
        ).mean()

    @functools.partial(jax.jit, static_argnums=0)
    def trained(optimizer):
        def step(carry, key):
            p, state = carry
            value, g = jax.value_and_grad(loss)(p, key)
            updates, state = optimizer.update(g, state, p)
            return (optax.apply_updates(p, updates), state), value

        start = params, optimizer.init(params)
        losses = jax.lax.scan(step, start, jax.random.split(keys[5], steps))[1]
        return losses[0], losses[-100:].mean()

    rate = optax.cosine_decay_schedule(3e-3, steps)
    first, exact = map(float, trained(optax.adam(rate)))
    assert exact < 0.9 * first
    for second in ("blocks", "float16"):
        ours = trained(adamw_8bit(rate, weight_decay=0.0, second=second))[1]
        assert float(ours) == pytest.approx(exact, rel=0.005), second


def test_weight_decay_and_mask_are_those_of_adamw(rng):
    params = {"w": gradients(rng, (4, 8)), "b": jnp.ones(8)}
    mask = {"w": True, "b": False}
    ours, plain = (
        adamw_8bit(0.1, weight_decay=0.3, mask=mask),
        optax.adamw(0.1, weight_decay=0.3, mask=mask),
    )

    @functools.partial(jax.jit, static_argnums=0)
    def first(optimizer):
        return optimizer.update(params, optimizer.init(params), params)[0]

    got, want = first(ours), first(plain)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), got, want)


def test_it_composes(rng):
    """Masked, accumulated and clipped, in nnx.Optimizer; scalars and bfloat16 gradients among the leaves."""
    params = {
        "w": gradients(rng, (4, 8)).astype(jnp.bfloat16),
        "s": jnp.float32(2),
        "held": jnp.ones(3),
    }
    mask = {"w": True, "s": True, "held": False}
    optimizer = optax.MultiSteps(
        optax.chain(optax.clip_by_global_norm(1.0), optax.masked(scale_by_adam_8bit(), mask)), 2
    )

    @jax.jit
    def two_steps():
        _, state = optimizer.update(params, optimizer.init(params), params)
        return optimizer.update(params, state, params)[0]

    updates = two_steps()
    np.testing.assert_allclose(np.abs(float(updates["s"])), 1, rtol=1e-3)
    assert jnp.abs(updates["w"].astype(jnp.float32)).max() < 1.02

    model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, adamw_8bit(0.1), wrt=nnx.Param)
    before = model.kernel[...]

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, 8)))))(model))

    step(model, optimizer)
    assert (model.kernel[...] < before).all()


def test_nan_does_not_hide():
    optimizer = scale_by_adam_8bit()
    g = jnp.ones((2, 256)).at[0, 3].set(jnp.nan)
    updates = jax.jit(
        lambda: optimizer.update(jnp.ones_like(g), optimizer.update(g, optimizer.init(g))[1])[0]
    )()
    assert jnp.isnan(updates[0, 3]) and not jnp.isnan(updates[1]).any()


@pytest.mark.parametrize("steps", [adam_8bit.STEPS_PER_OCTAVE])
def test_the_byte_is_exact_on_its_own_values(steps):
    codes = np.arange(256)
    values = np.where(codes > 0, 2.0 ** ((codes - 255.0) / steps), 0)
    stored = adam_8bit._encode_logarithmic(jnp.asarray(values, jnp.float32), (256,), None)
    np.testing.assert_array_equal(stored.codes, codes)
    np.testing.assert_allclose(adam_8bit._decode_logarithmic(stored, (256,)), values, rtol=1e-5)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"b1": 1.0}, r"\[0, 1\), got b1=1.0"),
        ({"b2": -0.1}, r"\[0, 1\), got b2=-0.1"),
        ({"eps": -1.0}, "not negative, got eps=-1.0"),
        ({"second": "int8"}, "'blocks' or 'float16', got 'int8'"),
        ({"block_size": 0}, "at least one element, got block_size=0"),
        ({"rounding": "up"}, "'stochastic' or 'nearest', got 'up'"),
    ],
)
def test_bad_choices(choices, message):
    with pytest.raises(ValueError, match=message):
        adam_8bit._check(**DEFAULTS | choices)
