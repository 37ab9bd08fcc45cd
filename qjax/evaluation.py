# SPDX-License-Identifier: Apache-2.0
"""What a language model knows of a text: perplexity, and its distance from another model.

nll = - mean over predicted tokens of ln p(token | tokens before it in the window)
perplexity = exp(nll)
kl = mean over predicted tokens of  sum_v p(v) (ln p(v) - ln q(v)),   p the baseline, q the model
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

Logits = Callable[[Int[Array, "B T"]], Float[Array, "B T V"]]

# Logits of one batch are kept near this size, so that a large vocabulary does not fill the memory.
_LOGITS_BYTES = 256 * 2**20


# Beyond it exp(nll), the perplexity, is no float64 any more. No working model comes near.
_WORST_NLL = 700.0
_DAMAGED = "the {}'s logits are not finite or far out of range: its weights are damaged or overflow"


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
    baseline: Logits | Float[np.ndarray, "..."] | None = None,
    batch_size: int | None = None,
    on_batch: Callable[[int], None] = lambda windows: None,
) -> Evaluation:
    """Measures a model on windows of tokens.

    Args:
      model: from tokens to logits; an ``nnx.Module`` is passed through jit with its weights as
        arguments, any other callable as it is.
      tokens: each row an independent window of at least two tokens.
      baseline: the model to compare with; or its logits on these tokens (:func:`logits_of`), where
        several models are compared with it.
      batch_size: windows at once; by default what keeps the logits near 256 MiB.
      on_batch: called after each batch with the windows done so far; for progress bars.

    Raises:
      ValueError: no window, windows of one token, tokens outside a model's vocabulary, a baseline of
        another shape, or logits that are not finite.
    """
    count, length = tokens.shape
    if count < 1 or length < 2:
        raise ValueError(
            f"need at least one window of two tokens, got {count} windows of {length}: "
            "the first token of a window is not predicted"
        )
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"a batch holds at least one window, got {batch_size=}")
    apply = _compiled(model)
    known = baseline if isinstance(baseline, np.ndarray) else None
    apply_baseline = _compiled(baseline) if callable(baseline) else None
    vocabulary = _vocabulary(apply, length)
    if apply_baseline and (other := _vocabulary(apply_baseline, length)) != vocabulary:
        raise ValueError(
            f"the model knows {vocabulary} tokens, the baseline {other}: not comparable"
        )
    expected = (count, length, vocabulary)
    if known is not None and known.shape != expected:
        raise ValueError(f"the baseline's logits have shape {known.shape}, need {expected}")
    if tokens.min() < 0 or tokens.max() >= vocabulary:
        raise ValueError(
            f"tokens lie in [{tokens.min()}, {tokens.max()}], the model knows 0 to {vocabulary - 1}"
        )
    batch_size = batch_size or max(1, _LOGITS_BYTES // (4 * length * vocabulary))
    sums = np.zeros(3)
    done = 0
    for batch, rows in _batches(tokens, batch_size):
        logits = apply(jnp.asarray(batch))
        scores = [_nll(logits, jnp.asarray(batch))]
        if apply_baseline:
            scores += _distance(logits, apply_baseline(jnp.asarray(batch)))
        elif known is not None:
            scores += _distance(logits, jnp.asarray(_filled(known[done : done + rows], len(batch))))
        # A sum over a batch in float32 would lose digits of a long text; float64 on the host does not.
        sums[: len(scores)] += [np.asarray(score, np.float64)[:rows].sum() for score in scores]
        done += rows
        on_batch(done)
    predicted = count * (length - 1)
    nll, kl, agreement = (float(s) / predicted for s in sums)
    if not nll < _WORST_NLL:
        raise ValueError(f"{_DAMAGED.format('model')} (nll {nll:.4g})")
    if not math.isfinite(kl):
        raise ValueError(f"{_DAMAGED.format('baseline')} (kl {kl:.4g})")
    if baseline is None:
        return Evaluation(nll=nll, tokens=predicted)
    return Evaluation(nll=nll, tokens=predicted, kl=kl, top1_agreement=agreement)


def logits_of(
    model: Logits, tokens: Int[np.ndarray, "n length"]
) -> Float[np.ndarray, "n length V"]:
    """A model's logits on windows of tokens, on the host: a baseline for :func:`evaluate`.

    They take 4 bytes for each token and entry of the vocabulary.
    """
    apply = _compiled(model)
    return np.concatenate([np.asarray(apply(jnp.asarray(window[None]))) for window in tokens])


# Models are compiled apart from the scores, and by their structure: a baseline that several models are
# compared with is compiled once.
@functools.partial(jax.jit, static_argnames="graphdef")
def _module_logits(graphdef: Any, state: Any, batch: Int[Array, "B T"]) -> Float[Array, "B T V"]:
    return nnx.merge(graphdef, state)(batch)


@jax.jit
def _nll(logits: Float[Array, "B T V"], batch: Int[Array, "B T"]) -> Float[Array, "B T-1"]:
    log_q = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
    return -jnp.take_along_axis(log_q, batch[:, 1:, None], axis=-1)[..., 0]


@jax.jit
def _distance(
    logits: Float[Array, "B T V"], baseline: Float[Array, "B T V"]
) -> tuple[Float[Array, "B T-1"], Bool[Array, "B T-1"]]:
    """The divergence from the baseline at each position, and whether both have the same favourite."""
    log_q = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
    log_p = jax.nn.log_softmax(baseline[:, :-1].astype(jnp.float32))
    p = jnp.exp(log_p)
    # A token that the baseline rules out (-inf) adds nothing, whatever the model thinks of it.
    kl = jnp.sum(jnp.where(p == 0, 0, p * (log_p - log_q)), axis=-1)
    return kl, jnp.argmax(log_p, axis=-1) == jnp.argmax(log_q, axis=-1)


def _compiled(model: Logits) -> Logits:
    """A model as one compiled function; a module's weights are arguments, not constants of it."""
    if not isinstance(model, nnx.Module):
        return jax.jit(model)
    graphdef, state = nnx.split(model)
    return lambda batch: _module_logits(graphdef, state, batch)


def _vocabulary(model: Logits, length: int) -> int:
    return jax.eval_shape(model, jax.ShapeDtypeStruct((1, length), jnp.int32)).shape[-1]


def _batches(tokens: np.ndarray, batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Batches of one shape (one compilation), the last filled up with its first row."""
    batch_size = min(batch_size, len(tokens))
    for start in range(0, len(tokens), batch_size):
        batch = tokens[start : start + batch_size]
        yield np.asarray(_filled(batch, batch_size)), len(batch)


def _filled(rows: Any, batch_size: int) -> Any:
    """Rows filled up with the first of them."""
    missing = batch_size - len(rows)
    if not missing:
        return rows
    return np.concatenate([rows, np.repeat(rows[:1], missing, axis=0)])
