# SPDX-License-Identifier: Apache-2.0
"""Keys and values of the tokens seen so far.

Slot s of a row holds the token at position s of that row, whatever the other rows are up to. Slots at
or beyond a row's length hold leftovers; no query ever sees them, because they lie in its future.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from qjax import kv_cache
from qjax.kv_cache import CacheScheme, Codes
from qjax_models.attention import Heads


class LayerKV(NamedTuple):
    """Rotated keys and values of one layer, or their codes; entry b * K + k is head k of row b.

    Rows and heads share one axis because that is how attention multiplies them: with two, XLA's CPU
    backend reshapes the updated cache twice and so copies all of it, layer by layer, for every token.
    """

    keys: Float[Array, "BK S H"] | Codes
    values: Float[Array, "BK S H"] | Codes

    @property
    def capacity(self) -> int:
        """How many tokens there is room for, S."""
        return jax.tree.leaves(self)[0].shape[1]

    def write(self, new: "LayerKV", positions: Int[Array, "B T"]) -> "LayerKV":
        """Puts new tokens into their slots; positions beyond the capacity are dropped."""
        count = jax.tree.leaves(self)[0].shape[0]
        heads = jnp.arange(count)[:, None]
        slots = jnp.repeat(positions, count // positions.shape[0], axis=0)
        return jax.tree.map(lambda held, x: held.at[heads, slots].set(x, mode="drop"), self, new)

    def padded(self, capacity: int) -> "LayerKV":
        """The same tokens with room for `capacity`."""
        room = ((0, 0), (0, capacity - self.capacity), (0, 0))
        return jax.tree.map(lambda held: jnp.pad(held, room), self)


class Keeping(NamedTuple):
    """How one layer keeps keys and values.

    Attributes:
        scheme: of both; None: as they are.
        key_scale: the static scale of keys; None where scales are of the values themselves.
        value_scale: that of values.
    """

    scheme: CacheScheme | None = None
    key_scale: Float[Array, "1"] | None = None
    value_scale: Float[Array, "1"] | None = None

    @property
    def is_turned(self) -> bool:
        """Whether it is in another basis that they are kept."""
        return self.scheme is not None and self.scheme.turned

    def turned(self, *heads: Array) -> tuple[Array, ...]:
        """Queries, keys and values in the basis in which the last two are kept."""
        return tuple(map(kv_cache.turned, heads)) if self.is_turned else heads

    def turned_back(self, mixed: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
        """Averages of values that are kept so, in the basis of the layer behind them."""
        return kv_cache.turned_back(mixed) if self.is_turned else mixed

    def rounded(self, keys: Array, values: Array) -> tuple[Array, Array]:
        """What is left of keys and values that were kept so; their gradient passes through."""
        if self.scheme is None:
            return keys, values
        return (
            kv_cache.rounded(keys, self.scheme, self.key_scale),
            kv_cache.rounded(values, self.scheme, self.value_scale),
        )

    def kept(self, keys: Float[Array, "BK S H"], values: Float[Array, "BK S H"]) -> LayerKV:
        """Keys and values as they are held."""
        if self.scheme is None:
            return LayerKV(keys, values)
        return LayerKV(
            kv_cache.encoded(keys, self.scheme, self.key_scale),
            kv_cache.encoded(values, self.scheme, self.value_scale),
        )

    def read(self, held: LayerKV, size: int, dtype: DTypeLike) -> tuple[Heads, Heads]:
        """The keys and values that are held, heads of some size, for products in a dtype."""

        def heads(codes: Array | Codes, static: Array | None) -> Heads:
            if not isinstance(codes, Codes):
                return Heads(codes)
            assert self.scheme is not None  # else nothing would have been encoded
            if decodes_first():
                return Heads(kv_cache.decoded(codes, self.scheme, size, dtype, static))
            factors = kv_cache.factors(codes, self.scheme, size, static)
            return Heads(*factors, self.scheme.group_size)

        return heads(held.keys, self.key_scale), heads(held.values, self.value_scale)


def decodes_first() -> bool:
    """Whether codes are decoded before the products of attention, not in them.

    Products of bfloat16 that convert codes themselves take XLA two to three times as long on a CPU, and
    less than half as long on a GPU (docs/kv_cache.md).
    """
    return jax.default_backend() == "cpu"


class KVCache(NamedTuple):
    """The memory of a batch of rows, each with a length of its own."""

    layers: tuple[LayerKV, ...]
    lengths: Int[Array, " B"]  # tokens held, per row

    @property
    def capacity(self) -> int:
        """The most tokens a row can hold, S."""
        return self.layers[0].capacity
