# SPDX-License-Identifier: Apache-2.0
"""Keys and values of the tokens seen so far.

Slot s of a row holds the token at position s of that row, whatever the other rows are up to. Slots at
or beyond a row's length hold leftovers; no query ever sees them, because they lie in its future.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class LayerKV(NamedTuple):
    """Rotated keys and values of one layer; entry b * K + k is head k of row b.

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
