# SPDX-License-Identifier: Apache-2.0
"""The two device programs of generation: read prompts, and write up to a number of tokens."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Int, Key

from qjax_models.cache import KVCache
from qjax_models.decoder import Decoder
from qjax_models.sampling import Sampling, choose

Params = Any  # the state of a decoder, as nnx.split gives it: arrays and QTensors

LARGEST_CHUNK = 64  # tokens a row can get between two returns to the host


class DecodeState(NamedTuple):
    """Rows in the middle of their answers."""

    cache: KVCache
    tokens: Int[Array, " B"]  # the latest of each row, not in the cache yet
    finished: Bool[Array, " B"]  # whether a stop token has come
    keys: Key[Array, " B"]  # one random stream per row


@dataclass(frozen=True, kw_only=True)
class DecodePrograms:
    """A decoder's graph and all that is fixed at compilation; the methods are to be jitted."""

    graph: nnx.GraphDef[Decoder]
    capacity: int  # tokens per row, prompt and answer together
    sampling: Sampling
    stop_tokens: tuple[int, ...]

    def prefill(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        lengths: Int[Array, " B"],
        keys: Key[Array, " B"],
    ) -> DecodeState:
        """Reads prompts, padded on the right, and chooses the first token of each answer."""
        model = nnx.merge(self.graph, params)
        hidden, cache = model.prefill(tokens, lengths, self.capacity)
        last = hidden[jnp.arange(tokens.shape[0]), lengths - 1]
        first = self._choose(model.logits(last), cache, keys)
        return DecodeState(cache=cache, tokens=first, finished=self._is_stop(first), keys=keys)

    def decode(
        self, params: Params, state: DecodeState, steps: Int[Array, ""]
    ) -> tuple[DecodeState, Int[Array, "B C"], Int[Array, ""]]:
        """Writes up to `steps` tokens per row, at most LARGEST_CHUNK.

        Returns:
            The state, the chunk of new tokens, and how many of its columns are filled: fewer than
            `steps` when every row has met a stop token.
        """
        model = nnx.merge(self.graph, params)
        chunk = jnp.zeros((state.tokens.shape[0], LARGEST_CHUNK), jnp.int32)

        def unfinished(carry):
            state, _, taken = carry
            return (taken < steps) & ~state.finished.all()

        def step(carry):
            state, chunk, taken = carry
            state = self._step(model, state)
            return state, chunk.at[:, taken].set(state.tokens), taken + 1

        return lax.while_loop(unfinished, step, (state, chunk, jnp.int32(0)))

    def _step(self, model: Decoder, state: DecodeState) -> DecodeState:
        hidden, cache = model.extend(state.tokens[:, None], state.cache)
        tokens = self._choose(model.logits(hidden[:, 0]), cache, state.keys)
        finished = state.finished | self._is_stop(tokens)
        return DecodeState(cache=cache, tokens=tokens, finished=finished, keys=state.keys)

    def _choose(self, logits, cache: KVCache, keys) -> Int[Array, " B"]:
        # A position has its own randomness, so an answer does not depend on how it was chunked.
        return choose(logits, self.sampling, jax.vmap(jax.random.fold_in)(keys, cache.lengths))

    def _is_stop(self, tokens: Int[Array, " B"]) -> Bool[Array, " B"]:
        return jnp.isin(tokens, jnp.array(self.stop_tokens, jnp.int32))
