# SPDX-License-Identifier: Apache-2.0
"""Perplexity and divergence, against numpy in float64."""

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.evaluation import logits_of

VOCABULARY = 11
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, VOCABULARY, (7, 6)).astype(np.int32)
# A model is a table: logits of the next token by the last one, and by how far it stands in the window.
TABLES = [RNG.standard_normal((VOCABULARY, VOCABULARY)).astype(np.float32) * 2 for _ in range(2)]


def table_model(table: np.ndarray):
    def logits(tokens):
        return jnp.asarray(table)[tokens] + jnp.arange(tokens.shape[1])[None, :, None] * 0.01

    return logits


MODEL, BASELINE = map(table_model, TABLES)


def numpy_logs(table: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    logits = table.astype(np.float64)[tokens] + np.arange(tokens.shape[1])[None, :, None] * 0.01
    return (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[:, :-1]


LOG_Q, LOG_P = (numpy_logs(table, TOKENS) for table in TABLES)
NLL = -np.mean([LOG_Q[i, t, TOKENS[i, t + 1]] for i in range(7) for t in range(5)])
KL = (np.exp(LOG_P) * (LOG_P - LOG_Q)).sum(-1).mean()
AGREEMENT = (LOG_P.argmax(-1) == LOG_Q.argmax(-1)).mean()


@pytest.mark.parametrize("batch_size", [None, 1, 2, 3, 7, 100])
def test_is_the_plain_mean(batch_size):
    """Also where the last batch is ragged: its filling counts for nothing."""
    result = qjax.evaluate(MODEL, TOKENS, baseline=BASELINE, batch_size=batch_size)
    assert result.tokens == 7 * 5
    np.testing.assert_allclose(result.nll, NLL, rtol=1e-6)
    np.testing.assert_allclose(result.perplexity, np.exp(NLL), rtol=1e-5)
    np.testing.assert_allclose(result.kl, KL, rtol=1e-5)
    np.testing.assert_allclose(result.top1_agreement, AGREEMENT, rtol=1e-6)


@pytest.mark.parametrize("batch_size", [None, 2, 100])
def test_a_baseline_may_be_its_logits(batch_size):
    known = logits_of(BASELINE, TOKENS)
    assert known.shape == (7, 6, VOCABULARY)
    ours = qjax.evaluate(MODEL, TOKENS, baseline=known, batch_size=batch_size)
    assert ours == qjax.evaluate(MODEL, TOKENS, baseline=BASELINE, batch_size=batch_size)
    with pytest.raises(ValueError, match=r"shape \(6, 6, 11\), need \(7, 6, 11\)"):
        qjax.evaluate(MODEL, TOKENS, baseline=known[1:])


def test_without_a_baseline():
    result = qjax.evaluate(MODEL, TOKENS)
    assert (result.kl, result.top1_agreement) == (None, None)
    np.testing.assert_allclose(result.nll, NLL, rtol=1e-6)


def test_a_model_agrees_with_itself():
    result = qjax.evaluate(MODEL, TOKENS, baseline=MODEL)
    assert result.kl == 0 and result.top1_agreement == 1


def test_a_uniform_model_knows_nothing():
    result = qjax.evaluate(lambda tokens: jnp.zeros((*tokens.shape, 32)), TOKENS)
    np.testing.assert_allclose(result.perplexity, 32, rtol=1e-6)


def test_tokens_that_the_baseline_rules_out_add_nothing():
    ruled_out = np.array(TABLES[0])
    ruled_out[:, 3] = -np.inf
    tokens = TOKENS[:, :2] * 0 + [[1, 2]] * 7
    result = qjax.evaluate(
        table_model(ruled_out), tokens.astype(np.int32), baseline=table_model(ruled_out)
    )
    assert result.kl == 0 and np.isfinite(result.nll)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_short_logits_are_scored_in_float32(dtype):
    table = TABLES[0].astype(dtype)
    result = qjax.evaluate(lambda tokens: jnp.asarray(table)[tokens], TOKENS)
    logits = table.astype(np.float64)[TOKENS]
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.take_along_axis(logs[:, :-1], TOKENS[:, 1:, None], -1).mean()
    np.testing.assert_allclose(result.nll, expected, rtol=1e-6)


class Model(nnx.Module):
    def __init__(self):
        self.embed = nnx.Embed(VOCABULARY, 16, rngs=nnx.Rngs(0))
        self.up = nnx.Linear(16, 16, rngs=nnx.Rngs(1))

    def __call__(self, tokens):
        return self.embed.attend(jnp.tanh(self.up(self.embed(tokens))) * 4)


def test_modules_quantized_and_not():
    model = Model()
    quantized, _ = qjax.quantize_model(model, "w2a16-g8")
    result = qjax.evaluate(quantized, TOKENS, baseline=model, batch_size=4)
    logits = [
        np.asarray(jax.nn.log_softmax(m(TOKENS)), np.float64)[:, :-1] for m in (model, quantized)
    ]
    expected = (np.exp(logits[0]) * (logits[0] - logits[1])).sum(-1).mean()
    assert expected > 1e-4
    np.testing.assert_allclose(result.kl, expected, rtol=1e-3)
    np.testing.assert_allclose(
        result.nll, -np.take_along_axis(logits[1], TOKENS[:, 1:, None], -1).mean(), rtol=1e-5
    )


def test_one_compilation_and_progress():
    shapes, done = [], []

    def model(tokens):
        shapes.append(tokens.shape)
        return MODEL(tokens)

    qjax.evaluate(model, TOKENS, batch_size=3, on_batch=done.append)
    assert done == [3, 6, 7]
    assert shapes.count((3, 6)) == 1 and set(shapes) <= {(3, 6), (1, 6)}


def test_long_texts_keep_their_digits():
    """Sums are taken in float64: a million tokens of one nll give that nll."""
    tokens = np.zeros((500, 201), np.int32)
    result = qjax.evaluate(lambda t: jnp.zeros((*t.shape, 3)), tokens, batch_size=250)
    assert result.tokens == 100_000
    np.testing.assert_allclose(result.nll, float(np.float32(np.log(3))), rtol=2e-7)


@pytest.mark.parametrize(
    ("tokens", "choices", "message"),
    [
        (np.zeros((0, 5), np.int32), {}, "got 0 windows of 5"),
        (np.zeros((3, 1), np.int32), {}, "got 3 windows of 1"),
        (np.full((2, 3), VOCABULARY, np.int32), {}, r"\[11, 11\], the model knows 0 to 10"),
        (np.full((2, 3), -1, np.int32), {}, r"\[-1, -1\], the model knows 0 to 10"),
        (TOKENS, {"batch_size": 0}, "at least one window, got batch_size=0"),
        (TOKENS, {"batch_size": -2}, "at least one window, got batch_size=-2"),
        (
            TOKENS,
            {"baseline": lambda t: jnp.zeros((*t.shape, 5))},
            "knows 11 tokens, the baseline 5",
        ),
        (
            TOKENS,
            {"baseline": table_model(TABLES[0] * np.float32(np.nan))},
            "the baseline's logits are not finite",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(tokens, choices, message):
    with pytest.raises(ValueError, match=message) as caught:
        qjax.evaluate(MODEL, tokens, **choices)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match="^the model's logits are not finite"):
        qjax.evaluate(lambda t: jnp.full((*t.shape, VOCABULARY), bad), TOKENS)
