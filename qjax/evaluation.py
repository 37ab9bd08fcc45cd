# SPDX-License-Identifier: Apache-2.0
"""What a language model knows of a text: perplexity, and its distance from another model.

nll = - mean over predicted tokens of ln p(token | tokens before it in the window)
perplexity = exp(nll)
kl = mean over predicted tokens of  sum_v p(v) (ln p(v) - ln q(v)),   p the baseline, q the model
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

Logits = Callable[[Int[Array, "B T"]], Float[Array, "B T V"]]

# Logits of one batch are kept near this size, so that a large vocabulary does not fill the memory.
_LOGITS_BYTES = 256 * 2**20


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Quality of a model on a text.

    Attributes:
      nll: mean negative log-likelihood of a predicted token, nats.
      tokens: predicted tokens: every token of a window but its first.
      kl: mean divergence of the model from the baseline, nats; None without a baseline.
      top1_agreement: share of positions at which both hold the same token likeliest; None likewise.
    """

    nll: float
    tokens: int
    kl: float | None = None
    top1_agreement: float | None = None

    @property
    def perplexity(self) -> float:
        """``exp(nll)``."""
        return math.exp(self.nll)


def evaluate(
    model: Logits,
    tokens: Int[np.ndarray, "n length"],
    *,
    baseline: Logits | None = None,
    batch_size: int | None = None,
    on_batch: Callable[[int], None] = lambda windows: None,
) -> Evaluation:
    """Measures a model on windows of tokens.

    Args:
      model: from tokens to logits; an ``nnx.Module`` is passed through jit with its weights as
        arguments, any other callable as it is.
      tokens: each row an independent window of at least two tokens.
      baseline: the model to compare with.
      batch_size: windows at once; by default what keeps the logits near 256 MiB.
      on_batch: called after each batch with the windows done so far; for progress bars.

    Raises:
      ValueError: no window, windows of one token, tokens outside a model's vocabulary, or logits
        that are not finite.
    """
    count, length = tokens.shape
    if count < 1 or length < 2:
        raise ValueError(
            f"need at least one window of two tokens, got {count} windows of {length}: "
            "the first token of a window is not predicted"
        )
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"a batch holds at least one window, got {batch_size=}")
    vocabulary = _vocabulary(model, length)
    if baseline is not None and (other := _vocabulary(baseline, length)) != vocabulary:
        raise ValueError(
            f"the model knows {vocabulary} tokens, the baseline {other}: not comparable"
        )
    if tokens.min() < 0 or tokens.max() >= vocabulary:
        raise ValueError(
            f"tokens lie in [{tokens.min()}, {tokens.max()}], the model knows 0 to {vocabulary - 1}"
        )
    score = _scorer(model, baseline)
    batch_size = batch_size or max(1, _LOGITS_BYTES // (4 * length * vocabulary))
    sums = np.zeros(3)
    done = 0
    for batch, rows in _batches(tokens, batch_size):
        # A sum over a batch in float32 would lose digits of a long text; float64 on the host does not.
        per_token = [np.asarray(a, np.float64)[:rows] for a in score(jnp.asarray(batch))]
        sums += [a.sum() for a in per_token]
        done += rows
        on_batch(done)
    predicted = count * (length - 1)
    nll, kl, agreement = (float(s) / predicted for s in sums)
    if not math.isfinite(nll):
        raise ValueError("the model's logits are not finite: its weights are damaged or overflow")
    if not math.isfinite(kl):
        raise ValueError(
            "the baseline's logits are not finite: its weights are damaged or overflow"
        )
    if baseline is None:
        return Evaluation(nll=nll, tokens=predicted)
    return Evaluation(nll=nll, tokens=predicted, kl=kl, top1_agreement=agreement)


def _scorer(model: Logits, baseline: Logits | None) -> Callable[[Int[Array, "B T"]], Any]:
    apply_model, weights = _split(model)
    apply_baseline, baseline_weights = _split(baseline) if baseline else (None, None)

    @jax.jit
    def score(weights, baseline_weights, batch):
        log_q = jax.nn.log_softmax(apply_model(weights, batch)[:, :-1].astype(jnp.float32))
        nll = -jnp.take_along_axis(log_q, batch[:, 1:, None], axis=-1)[..., 0]
        if apply_baseline is None:
            return nll, jnp.zeros_like(nll), jnp.zeros_like(nll)
        log_p = jax.nn.log_softmax(
            apply_baseline(baseline_weights, batch)[:, :-1].astype(jnp.float32)
        )
        p = jnp.exp(log_p)
        # A token that the baseline rules out (-inf) adds nothing, whatever the model thinks of it.
        kl = jnp.sum(jnp.where(p > 0, p * (log_p - log_q), 0), axis=-1)
        same = jnp.argmax(log_p, axis=-1) == jnp.argmax(log_q, axis=-1)
        return nll, kl, same.astype(jnp.float32)

    return lambda batch: score(weights, baseline_weights, batch)


def _split(model: Logits) -> tuple[Callable[[Any, Array], Array], Any]:
    """A model as a function of its weights, so that jit does not bake them in as constants."""
    if not isinstance(model, nnx.Module):
        return lambda _, batch: model(batch), None
    graphdef, state = nnx.split(model)
    return lambda state, batch: nnx.merge(graphdef, state)(batch), state


def _vocabulary(model: Logits, length: int) -> int:
    apply, weights = _split(model)
    return jax.eval_shape(apply, weights, jax.ShapeDtypeStruct((1, length), jnp.int32)).shape[-1]


def _batches(tokens: np.ndarray, batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Batches of one shape (one compilation), the last filled up with its first row."""
    batch_size = min(batch_size, len(tokens))
    for start in range(0, len(tokens), batch_size):
        batch = tokens[start : start + batch_size]
        rows = len(batch)
        filling = np.repeat(batch[:1], batch_size - rows, axis=0)
        yield np.concatenate([batch, filling]), rows
