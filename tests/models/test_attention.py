# SPDX-License-Identifier: Apache-2.0
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import kv_cache
from qjax_models import attention
from qjax_models.attention import Heads, ScoreRule, cached_attention, causal_attention


def plain_attention(queries, keys, values, rule):
    """The formula, one query of one head at a time, in float64."""
    rows, length, num_heads, size = queries.shape
    group = num_heads // keys.shape[2]
    out = np.zeros(queries.shape)
    for b, t, n in np.ndindex(rows, length, num_heads):
        first = 0 if rule.window is None else max(0, t - rule.window + 1)
        seen = slice(first, t + 1)
        scores = rule.scale * keys[b, seen, n // group] @ queries[b, t, n]
        if rule.softcap is not None:
            scores = rule.softcap * np.tanh(scores / rule.softcap)
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ values[b, seen, n // group]
    return out


def heads(length, num_heads=4, num_kv_heads=2, size=8, rows=2, seed=0):
    random = np.random.default_rng(seed)
    shapes = [(rows, length, n, size) for n in (num_heads, num_kv_heads, num_kv_heads)]
    return [random.standard_normal(shape) for shape in shapes]


RULES = [
    ScoreRule(scale=0.3),
    ScoreRule(scale=1.0, softcap=2.0),
    ScoreRule(scale=0.3, window=1),
    ScoreRule(scale=0.3, window=5),
    ScoreRule(scale=0.3, window=100, softcap=3.0),
]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("implementation", ["by_row", "batched"])
@pytest.mark.parametrize("length", [1, 4, 13])
def test_blocks_give_the_plain_formula(monkeypatch, rule, implementation, length):
    monkeypatch.setattr(attention, "MIN_QUERY_BLOCK", 3)
    queries, keys, values = heads(length)
    found = causal_attention(*map(jnp.float32, (queries, keys, values)), rule, implementation)
    np.testing.assert_allclose(found, plain_attention(queries, keys, values, rule), atol=2e-6)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_cached_attention_gives_the_last_queries_of_the_plain_formula(rule, num_kv_heads):
    queries, keys, values = heads(12, num_kv_heads=num_kv_heads)
    expected = plain_attention(queries, keys, values, rule)
    starts, new = np.array([9, 4]), 3
    positions = starts[:, None] + np.arange(new)
    rows = np.arange(2)[:, None]

    def slots(x):  # leftovers beyond a row's own tokens must not be seen
        return jnp.float32(np.pad(x, ((0, 0), (0, 4), (0, 0), (0, 0)), constant_values=7.0))

    def head_major(x):
        return slots(x).swapaxes(1, 2).reshape(-1, 16, 8)

    found = cached_attention(
        jnp.float32(queries[rows, positions]),
        Heads(head_major(keys)),
        Heads(head_major(values)),
        jnp.asarray(positions, jnp.int32),
        rule,
    )
    np.testing.assert_allclose(found, expected[rows, positions], atol=2e-6)


def cached(queries, keys, values) -> np.ndarray:
    positions = jnp.full((len(queries), 1), keys.entries.shape[1] - 1)
    rule = ScoreRule(scale=0.3, window=20)
    return np.asarray(cached_attention(queries, keys, values, positions, rule), np.float32)


@pytest.mark.parametrize("name", kv_cache.SCHEMES)
@pytest.mark.parametrize("size", [8, 80, 128, 192])
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 2e-6), (jnp.bfloat16, 0.02)])
def test_scales_that_multiply_last_give_what_decoded_heads_do(name, size, dtype, tolerance):
    """In bfloat16 a decoded head is rounded again, by up to 2^-9, and attention to it."""
    how, random = kv_cache.scheme(name), np.random.default_rng(0)
    static = jnp.full(1, 4 / how.format.high) if how.static else None
    queries = jnp.asarray(random.standard_normal((2, 1, 4, size)), dtype)
    sizes = np.exp(random.normal(0, 1, (2, 4, 24, 1)))  # rows and heads, 2 x 2
    keys, values = (
        kv_cache.encoded(
            jnp.asarray(random.standard_normal((4, 24, size)) * s, jnp.float32), how, static
        )
        for s in sizes
    )
    expected = cached(
        queries, *(Heads(kv_cache.decoded(x, how, size, dtype, static)) for x in (keys, values))
    )
    found = cached(
        queries,
        *(Heads(*kv_cache.factors(x, how, size, static), how.group_size) for x in (keys, values)),
    )
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max())


def test_small_scales_do_not_drown_in_float16():
    how, random = kv_cache.scheme("kv-int8"), np.random.default_rng(0)
    queries, keys, values = (random.standard_normal((2, n, 8)) for n in (4, 24, 24))
    queries = jnp.asarray(queries[:, None], jnp.float16)

    def held(x):
        kept = kv_cache.encoded(jnp.asarray(x, jnp.float32), how)
        return Heads(*kv_cache.factors(kept, how, 8))

    found = cached(queries, held(keys), held(1e-3 * values))
    exact = cached(queries.astype(jnp.float32), held(keys), held(1e-3 * values))
    np.testing.assert_allclose(found, exact, atol=2e-3 * np.abs(exact).max())


def test_slots_that_hold_nothing_yet_add_nothing():
    codes, scale = jnp.zeros((1, 4, 8), jnp.int8), jnp.zeros((1, 4, 1))
    held = Heads(codes.at[0, 3].set(5), scale)
    assert (cached(jnp.ones((1, 1, 1, 8)), held, held) == 0).all()


def test_scores_stay_finite_and_exact_for_large_values():
    queries, keys, values = heads(6)
    rule = ScoreRule(scale=1.0)
    found = causal_attention(*map(jnp.float32, (100 * queries, keys, values)), rule, "by_row")
    np.testing.assert_allclose(found, plain_attention(100 * queries, keys, values, rule), atol=2e-3)


def test_gradients_of_both_forms_agree():
    queries, keys, values = map(jnp.float32, heads(9))
    rule = ScoreRule(scale=0.3, window=4, softcap=2.0)

    def loss(implementation):
        return jax.grad(lambda qkv: (causal_attention(*qkv, rule, implementation) ** 2).sum())(
            (queries, keys, values)
        )

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), loss("by_row"), loss("batched")
    )


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="asks XLA's compiler for CPUs")
def test_all_blocks_multiply_in_the_type_of_their_heads():
    like = jax.ShapeDtypeStruct((2, 512, 4, 64), jnp.bfloat16)
    program = jax.jit(lambda *heads: causal_attention(*heads, ScoreRule(scale=0.125)))
    text = program.lower(like, like, like).compile().as_text()
    dtypes = dict(re.findall(r"(%[\w.-]+) = (\w+)\[", text))
    products = re.findall(r" dot\((%[\w.-]+), (%[\w.-]+)\)", text)
    assert len(products) == 8  # four blocks
    assert len({dtypes[operand] for operands in products for operand in operands}) == 1


def test_cudnn_refuses_a_soft_cap():
    queries, keys, values = map(jnp.bfloat16, heads(2))
    with pytest.raises(ValueError, match="no soft cap .* caps at 2.0"):
        causal_attention(queries, keys, values, ScoreRule(scale=1.0, softcap=2.0), "cudnn")


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("size", [8, 64, 80, 128, 136])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("length", [13, 128, 200])
def test_what_a_gpu_takes_by_itself_gives_the_plain_formula_and_gradient(rule, size, length):
    exact = [np.asarray(jnp.bfloat16(x), float) for x in heads(length, size=size)]
    queries, keys, values = map(jnp.bfloat16, exact)
    found = causal_attention(queries, keys, values, rule)
    # Weights and values are rounded to eight bits, and sums of both lie within the values' range.
    bound = 2**-8 * 2 * np.abs(exact[2]).max()
    np.testing.assert_allclose(np.float64(found), plain_attention(*exact, rule), atol=bound)

    def gradients(implementation, dtype):
        def loss(qkv):
            return (causal_attention(*qkv, rule, implementation).astype(jnp.float32) ** 2).sum()

        return jax.grad(loss)(tuple(x.astype(dtype) for x in (queries, keys, values)))

    # A query's gradient is a difference of products of values and their gradients, which have eight bits:
    # where a query sees one key alone nothing else is left of it.
    q, k, v = (np.linalg.norm(x, axis=-1).max() for x in exact)
    rounding = 2**-7 * rule.scale * 2 * v * v * np.sqrt(queries.size / size)
    pairs = zip(gradients("auto", jnp.bfloat16), gradients("batched", jnp.float32), strict=True)
    for (one, other), left in zip(pairs, (rounding * k, rounding * q, 0.0), strict=True):
        error = np.linalg.norm(np.float64(one) - np.float64(other))
        assert error <= 2e-2 * np.linalg.norm(np.float64(other)) + left
