# SPDX-License-Identifier: Apache-2.0
"""From logits to the next token: greedy, or a draw from the tempered, truncated distribution.

References:
    Fan et al., Hierarchical Neural Story Generation, 2018, https://arxiv.org/abs/1805.04833 (top-k).
    Holtzman et al., The Curious Case of Neural Text Degeneration, 2019,
        https://arxiv.org/abs/1904.09751 (top-p).
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen; the defaults are greedy.

    Raises:
        ValueError: a value is out of its range.
    """

    temperature: float = 0.0  # logits are divided by it; 0 takes the most likely token
    top_k: int | None = None  # only the k most likely tokens; None: all
    top_p: float = 1.0  # only the fewest tokens that together have this probability

    def __post_init__(self) -> None:
        """Checks the ranges."""
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be finite and not negative")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1]")


GREEDY = Sampling()


def choose(
    logits: Float[Array, "B V"], sampling: Sampling, keys: Key[Array, " B"]
) -> Int[Array, " B"]:
    """The next token of every row, from that row's logits and key alone.

    Example:
        >>> keys = jax.random.split(jax.random.key(0), 1)
        >>> choose(jnp.array([[0.0, 2.0, 1.0]]), Sampling(), keys).tolist()
        [1]
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = truncated(logits / sampling.temperature, sampling)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def truncated(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Tempered logits with -inf for the tokens that top-k, then top-p, rule out."""
    if sampling.top_k is not None:
        logits = jnp.where(in_top_k(logits, sampling.top_k), logits, -jnp.inf)
    if sampling.top_p < 1:
        logits = jnp.where(in_top_p(logits, sampling.top_p), logits, -jnp.inf)
    return logits


def in_top_k(logits: Float[Array, "B V"], k: int) -> Bool[Array, "B V"]:
    """Whether a token is among the k most likely; equals of the last one are."""
    best, _ = jax.lax.top_k(logits, min(k, logits.shape[-1]))
    return logits >= best[:, -1:]


def in_top_p(logits: Float[Array, "B V"], p: float) -> Bool[Array, "B V"]:
    """Whether the tokens more likely than this one have less than p together; so the best one is in."""
    falling = jnp.sort(logits, axis=-1, descending=True)
    mass = jnp.cumsum(jax.nn.softmax(falling, axis=-1), axis=-1)
    before = jnp.pad(mass[:, :-1], ((0, 0), (1, 0)))
    least = jnp.min(jnp.where(before < p, falling, jnp.inf), axis=-1, keepdims=True)
    return logits >= least
