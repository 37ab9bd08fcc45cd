# SPDX-License-Identifier: Apache-2.0
"""A model as a chain of blocks, for methods that work through it one block at a time.

    x_0 = enter(tokens),    x_{i+1} = apply(block_i, x_i, context_i)

A model package says so of its models (:func:`qjax_models.blockwise`); nothing here knows one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flax import nnx
from jaxtyping import Array, Float, Int

from qjax.kv_cache import CacheScheme


@dataclass(frozen=True, kw_only=True)
class Channels:
    """Some outputs of a layer, or the channels of a norm.

    Attributes:
      path: of the layer or the norm in its block.
      first: the first of them.
      count: how many; None: all from the first on.
    """

    path: str
    first: int = 0
    count: int | None = None

    @property
    def slice(self) -> slice:
        """Where they stand along the last axis."""
        return slice(self.first, None if self.count is None else self.first + self.count)


@dataclass(frozen=True, kw_only=True)
class Fold:
    """Where a factor for each channel can hide: what feeds some layers is divided, they are multiplied.

        producer / s  ->  x / s  ->  s W x  =  W x

    Attributes:
      producer: the norm or the outputs of a layer that ``x`` is proportional to, channel by channel.
      consumers: paths of the layers that multiply ``x``, and all that do.
      offset: a norm multiplies by ``offset + weight``.
      head_size: channels of a head, where ``x`` is heads of values that attention mixed; else None.
      queries_per_head: how many times each head of the producer stands in ``x``, one after the other.
    """

    producer: Channels
    consumers: tuple[str, ...]
    offset: float = 0.0
    head_size: int | None = None
    queries_per_head: int = 1


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Where a model meets its residual stream, for those who rotate it.

    All that reads the stream reads it through a norm of its root mean square, which a rotation leaves as
    it is once the norm's factors have moved into the layers behind it; all that is added to it is the
    output of a layer.

    Attributes:
      table: path of the table whose rows begin the stream.
      head: the norm that ends it and the layers behind that, by their paths in the model.
      readers: the norms inside a block and the layers behind them.
      writers: paths in a block of the layers whose outputs are added to the stream.
      values: the fold of the values in a block, whose heads can be rotated too; None: there is none.
    """

    table: str
    head: Fold
    readers: tuple[Fold, ...]
    writers: tuple[str, ...]
    values: Fold | None = None


@dataclass(frozen=True, kw_only=True)
class Cache:
    """What every block keeps for the tokens to come by static scales: :mod:`qjax.kv_cache`.

    Attributes:
      scheme: what the codes are.
      scales: paths in a block of its :class:`qjax.kv_cache.CacheScale` variables.
      kept: what they are the scales of, in their order, not quantized: ``kept(module, x, context)``. A
        function of a module file, as ``apply`` of :class:`Blockwise`.
    """

    scheme: CacheScheme
    scales: tuple[str, ...]
    kept: Callable[[Any, Float[Array, "B T D"], Any], tuple[Float[Array, "..."], ...]]


@dataclass(frozen=True, kw_only=True)
class Block:
    """One link of the chain.

    Attributes:
      path: of the module in the model.
      module: the block.
      context: what it needs beside ``x``; a pytree of arrays.
      folds: where factors can hide in it.
    """

    path: str
    module: nnx.Module
    context: Any
    folds: tuple[Fold, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Blockwise:
    """A model as a chain of blocks.

    Attributes:
      blocks: in the order in which they run.
      enter: from tokens to what the first block takes.
      entrance: paths of the modules whose weights ``enter`` reads.
      stream: where all this meets the residual stream; None: no rotation passes through the model.
      cache: what blocks keep in few bits, by scales that are not found yet; None: nothing.
      apply: runs a block: ``apply(module, x, context)``. A function of a module file, not a closure, so
        that blocks of one structure are compiled once.
    """

    blocks: tuple[Block, ...]
    enter: Callable[[Int[Array, "B T"]], Float[Array, "B T D"]]
    apply: Callable[[Any, Float[Array, "B T D"], Any], Float[Array, "B T D"]]
    entrance: tuple[str, ...] = ()
    stream: Stream | None = None
    cache: Cache | None = None
