# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax_models.sampling import GREEDY, Sampling, choose, in_top_k, in_top_p, truncated


def plain_top_k(logits, k):
    """Of one row: the k most likely, nothing else."""
    chosen = np.zeros(len(logits), bool)
    chosen[np.argsort(-logits)[:k]] = True
    return chosen


def plain_top_p(logits, p):
    """Of one row: from the most likely on, until they have p together."""
    weights = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    chosen, mass = np.zeros(len(logits), bool), 0.0
    for token in np.argsort(-weights):
        chosen[token] = True
        mass += weights[token]
        if mass >= p:
            return chosen
    return chosen


@pytest.fixture
def logits():
    return 3 * np.random.default_rng(0).standard_normal((20, 50)).astype(np.float32)


@pytest.mark.parametrize("k", [1, 2, 7, 50, 80])
def test_top_k_is_the_plain_statement(logits, k):
    expected = np.stack([plain_top_k(row, k) for row in logits])
    np.testing.assert_array_equal(in_top_k(jnp.asarray(logits), k), expected)


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.99])
def test_top_p_is_the_plain_statement(logits, p):
    expected = np.stack([plain_top_p(row.astype(np.float64), p) for row in logits])
    np.testing.assert_array_equal(in_top_p(jnp.asarray(logits), p), expected)


def test_top_p_counts_what_top_k_left(logits):
    both = truncated(jnp.asarray(logits), Sampling(temperature=1.0, top_k=5, top_p=0.6))
    for row, found in zip(logits, both, strict=True):
        kept = np.where(plain_top_k(row, 5), row, -np.inf)
        np.testing.assert_array_equal(np.isfinite(found), plain_top_p(kept, 0.6))


def test_greedy_takes_the_most_likely(logits):
    keys = jax.random.split(jax.random.key(0), len(logits))
    np.testing.assert_array_equal(choose(jnp.asarray(logits), GREEDY, keys), logits.argmax(-1))
    one = Sampling(temperature=2.0, top_k=1)
    np.testing.assert_array_equal(choose(jnp.asarray(logits), one, keys), logits.argmax(-1))


def test_draws_have_the_tempered_frequencies():
    logits = jnp.array([2.0, 1.0, 0.0, -5.0])
    draws = 20_000
    keys = jax.random.split(jax.random.key(1), draws)
    sampling = Sampling(temperature=1.5, top_k=3)
    tokens = choose(jnp.broadcast_to(logits, (draws, 4)), sampling, keys)
    expected = jax.nn.softmax(logits[:3] / 1.5)
    found = np.bincount(tokens, minlength=4) / draws
    assert found[3] == 0
    # Four standard deviations of a frequency near one half.
    np.testing.assert_allclose(found[:3], expected, atol=4 * 0.5 / draws**0.5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 must be finite and not negative"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"top_p": 0.0}, r"top_p=0.0 must be in \(0, 1\]"),
        ({"top_p": 1.1}, r"top_p=1.1 must be in \(0, 1\]"),
    ],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**values)
