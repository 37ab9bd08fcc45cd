# SPDX-License-Identifier: Apache-2.0
"""Keys and values of the tokens seen so far.

Slot s of a row holds the token at position s of that row, whatever the other rows are up to. Slots at
or beyond a row's length hold leftovers; no query ever sees them, because they lie in its future.
"""

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from qjax import activations, kv_cache
from qjax.scheme import ActivationScheme


class CacheScales(NamedTuple):
    """How one layer keeps keys and values in few bits."""

    keys: Float[Array, "1"]
    values: Float[Array, "1"]
    scheme: ActivationScheme

    def rounded(
        self, keys: Float[Array, "*shape"], values: Float[Array, "*shape"]
    ) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
        """What is left of keys and values that were kept so; their gradient passes through."""
        fake_quantize = partial(activations.fake_quantize, scheme=self.scheme, axis=(-1,))
        return fake_quantize(keys, static=self.keys), fake_quantize(values, static=self.values)


class LayerKV(NamedTuple):
    """Rotated keys and values of one layer, or their codes; entry b * K + k is head k of row b.

    Rows and heads share one axis because that is how attention multiplies them: with two, XLA's CPU
    backend reshapes the updated cache twice and so copies all of it, layer by layer, for every token.
    """

    keys: Float[Array, "BK S H"]
    values: Float[Array, "BK S H"]

    def write(self, new: "LayerKV", positions: Int[Array, "B T"]) -> "LayerKV":
        """Puts new tokens into their slots; positions beyond the capacity are dropped."""
        heads = jnp.arange(self.keys.shape[0])[:, None]
        slots = jnp.repeat(positions, self.keys.shape[0] // positions.shape[0], axis=0)
        return LayerKV(
            self.keys.at[heads, slots].set(new.keys, mode="drop"),
            self.values.at[heads, slots].set(new.values, mode="drop"),
        )

    def encoded(self, scales: CacheScales) -> "LayerKV":
        """The codes of keys and values."""
        return LayerKV(
            kv_cache.encoded(self.keys, scales.keys, scales.scheme),
            kv_cache.encoded(self.values, scales.values, scales.scheme),
        )

    def decoded(self, scales: CacheScales, dtype: DTypeLike) -> "LayerKV":
        """The keys and values that codes stand for."""
        return LayerKV(
            kv_cache.decoded(self.keys, scales.keys, dtype),
            kv_cache.decoded(self.values, scales.values, dtype),
        )

    def padded(self, capacity: int) -> "LayerKV":
        """The same tokens with room for `capacity`."""
        room = ((0, 0), (0, capacity - self.keys.shape[1]), (0, 0))
        return LayerKV(jnp.pad(self.keys, room), jnp.pad(self.values, room))


class KVCache(NamedTuple):
    """The memory of a batch of rows, each with a length of its own."""

    layers: tuple[LayerKV, ...]
    lengths: Int[Array, " B"]  # tokens held, per row

    @property
    def capacity(self) -> int:
        """The most tokens a row can hold, S."""
        return self.layers[0].keys.shape[1]
