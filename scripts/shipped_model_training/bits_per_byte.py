# SPDX-License-Identifier: Apache-2.0
"""How well a model predicts a text, in a unit that does not depend on its tokenizer.

    bits per byte = (sum of -log2 p(token)) / (UTF-8 bytes of those tokens)

The text is cut into windows that do not overlap; in a window every token but the first is
predicted, and both sums run over the predicted tokens only. What remains behind the last full
window is left out.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer


@dataclass(frozen=True, kw_only=True)
class Score:
    """What `score` measured."""

    bits_per_byte: float
    nll: float  # nats per predicted token
    perplexity: float  # per token
    predicted_tokens: int
    predicted_bytes: int
    window: int  # tokens


def sum_of_nll(logits: Float[Array, "B T V"], targets: Int[Array, "B T"]) -> Float[Array, ""]:
    """Return the sum of -ln p(target), in float32."""
    logits = logits.astype(jnp.float32)
    # A masked sum, not a gather: its gradient is elementwise too, where that of a gather is a
    # scatter.
    is_target = targets[..., None] == jnp.arange(logits.shape[-1])
    chosen = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
    return jnp.sum(jax.nn.logsumexp(logits, axis=-1) - chosen)


def score(
    logits_of: Callable[[Int[Array, "B T"]], Float[Array, "B T V"]],
    tokens: Integer[np.ndarray, " n"],
    bytes_of_tokens: Int[np.ndarray, " V"],
    window: int,
    batch_size: int,
) -> Score:
    """Score a model on a text.

    Args:
        logits_of: the model: token ids to the logits of the tokens behind them. Compiled here.
        tokens: the text.
        bytes_of_tokens: UTF-8 bytes of each vocabulary entry.
        window: tokens of a window.
        batch_size: windows per call.

    Raises:
        ValueError: the text is shorter than one window.
    """
    num_windows = len(tokens) // window
    if not num_windows:
        raise ValueError(f"a text of {len(tokens)} tokens holds no window of {window}")
    windows = np.asarray(tokens[: num_windows * window]).reshape(num_windows, window)
    batch_nll = jax.jit(lambda batch: sum_of_nll(logits_of(batch[:, :-1]), batch[:, 1:]))
    nll = sum(
        float(batch_nll(jnp.asarray(windows[low : low + batch_size], jnp.int32)))
        for low in range(0, num_windows, batch_size)
    )
    num_tokens = num_windows * (window - 1)
    num_bytes = int(bytes_of_tokens[windows[:, 1:]].sum())
    return Score(
        bits_per_byte=nll / math.log(2) / num_bytes,
        nll=nll / num_tokens,
        perplexity=math.exp(nll / num_tokens),
        predicted_tokens=num_tokens,
        predicted_bytes=num_bytes,
        window=window,
    )
