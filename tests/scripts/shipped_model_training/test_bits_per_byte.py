# SPDX-License-Identifier: Apache-2.0
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shipped_model_training.bits_per_byte import score, sum_of_nll


def test_sum_of_nll_is_the_sum_of_log_probabilities() -> None:
    logits = jax.random.normal(jax.random.key(0), (2, 3, 5))
    targets = jnp.array([[0, 1, 2], [4, 3, 3]])
    expected = -sum(
        float(jax.nn.log_softmax(logits[row, t])[targets[row, t]])
        for row in range(2)
        for t in range(3)
    )
    assert float(sum_of_nll(logits, targets)) == pytest.approx(expected, rel=1e-6)


def test_score_counts_predicted_tokens_and_their_bytes() -> None:
    # Every token is predicted with probability 1/4; entry v stands for v + 1 bytes.
    tokens = np.array([0, 1, 2, 3, 3, 2, 1, 0, 3, 3])
    result = score(
        lambda batch: jnp.zeros((*batch.shape, 4)), tokens, np.arange(1, 5), window=4, batch_size=1
    )
    # Windows 0123 and 3210: predicted are 1, 2, 3 and 2, 1, 0; the last two tokens are left out.
    assert result.predicted_tokens == 6
    assert result.predicted_bytes == (2 + 3 + 4) + (3 + 2 + 1)
    assert result.bits_per_byte == pytest.approx(6 * 2 / 15)
    assert result.nll == pytest.approx(math.log(4))
    assert result.perplexity == pytest.approx(4)


def test_score_does_not_depend_on_the_batch_size() -> None:
    rng = np.random.default_rng(0)
    tokens, table = rng.integers(0, 7, 70), jnp.asarray(rng.standard_normal((7, 7)))
    results = [
        score(lambda batch: table[batch], tokens, np.ones(7, np.int32), 10, size).bits_per_byte
        for size in (1, 3, 7)
    ]
    assert results == pytest.approx([results[0]] * 3, rel=1e-6)


def test_short_text_is_an_error() -> None:
    with pytest.raises(ValueError, match="a text of 3 tokens holds no window of 4"):
        score(lambda batch: jnp.zeros((1, 3, 4)), np.arange(3), np.ones(4, np.int32), 4, 1)
