# SPDX-License-Identifier: Apache-2.0
"""Causal attention over grouped heads, as functions of arrays.

    out_t = sum_s softmax_s(cap(scale * q_t . k_s)) v_s,   s <= t and, with a window, s > t - window

Query head n reads key/value head n // G, G = N / K, without repeating keys or values in memory.
Scores and their softmax are float32 whatever the inputs are.

Keys and values of a cache may be codes with a scale for some neighbours of a head. A scale is a factor of
the score, or of the weight, and multiplies those: codes go into the product as they are.

    q . k_s  =  sum_g (q_g . codes_sg) scale_sg,      sum_s w_s v_sg  =  sum_s (w_s scale_sg) codes_sg
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Num

AttentionImplementation = Literal["auto", "by_row", "batched", "cudnn"]

MIN_QUERY_BLOCK = 128
MAX_CUDNN_HEAD_SIZE = 128
# cuDNN has no program for a few tokens, or for some odd numbers of them.
MIN_CUDNN_LENGTH, CUDNN_LENGTH_STEP = 128, 8
MAX_QUERY_BLOCKS = 8  # unrolled in the program, so more of them only lengthen compilation

_TINY = float(jnp.finfo(jnp.float32).tiny)


@dataclass(frozen=True, kw_only=True)
class ScoreRule:
    """How one layer turns dot products into scores, and which keys it may see."""

    scale: float
    softcap: float | None = None
    window: int | None = None  # tokens seen, the query's own included


class Heads(NamedTuple):
    """Keys or values of key/value heads, which may be those of several rows.

    Attributes:
        entries: numbers, or codes that a scale multiplies.
        scale: of each group of neighbours in a head, all as long as the first but perhaps the last; None:
            there are no codes.
        group_size: entries that share a scale; None: all of a head.
    """

    entries: Num[Array, "K S H"]
    scale: Float[Array, "#K #S groups"] | None = None
    group_size: int | None = None

    def groups(self) -> list[tuple[slice, Float[Array, "#K 1 #S"]]]:
        """Where the groups of a head lie, and their scales."""
        if self.scale is None:
            return []
        size = self.group_size or self.entries.shape[-1]
        return [
            (slice(g * size, (g + 1) * size), self.scale[..., g][:, None])
            for g in range(self.scale.shape[-1])
        ]


def causal_attention(
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "B T K H"],
    values: Float[Array, "B T K H"],
    rule: ScoreRule,
    implementation: AttentionImplementation = "auto",
) -> Float[Array, "B T N H"]:
    """Attention of a whole sequence to itself.

    Args:
        queries: rotated queries.
        keys: rotated keys.
        values: what is averaged.
        rule: scale, soft cap and window.
        implementation: `by_row` works through the rows one after the other, `batched` on all at once,
            `cudnn` calls the fused kernel (NVIDIA GPU, 16-bit inputs, no soft cap), `auto` takes that
            where it can, else `by_row` on a CPU (the scores of one row stay in its caches) and
            `batched` elsewhere.

    Raises:
        ValueError: `cudnn` was asked for with a soft cap, which it does not have.
    """
    if implementation == "auto":
        implementation = _fastest(queries, rule)
    if implementation == "cudnn":
        return _cudnn_attention(queries, keys, values, rule)
    attend = partial(_attend_in_blocks, rule=rule)
    if implementation == "by_row":
        return lax.map(lambda row: attend(*row), (queries, keys, values))
    return jax.vmap(attend)(queries, keys, values)


def cached_attention(
    queries: Float[Array, "B T N H"],
    keys: Heads,
    values: Heads,
    positions: Int[Array, "B T"],
    rule: ScoreRule,
) -> Float[Array, "B T N H"]:
    """Attention of new tokens to a cache that already holds them; slot s holds position s.

    Keys and values are those of all rows, entry b * K + k those of head k of row b.
    """
    batch = queries.shape[0]
    num_kv_heads = keys.entries.shape[0] // batch
    grouped = jax.vmap(_grouped, in_axes=(0, None))(queries, num_kv_heads)
    visible = jax.vmap(_visible, in_axes=(0, None, None))(
        positions, jnp.arange(keys.entries.shape[1]), rule.window
    )
    visible = jnp.repeat(visible, num_kv_heads, axis=0)[:, None]
    heads = _attend(grouped.reshape(-1, *grouped.shape[2:]), keys, values, visible, rule)
    return jax.vmap(_ungrouped)(heads.reshape(grouped.shape))


def _fastest(queries: Float[Array, "B T N H"], rule: ScoreRule) -> AttentionImplementation:
    backend = jax.default_backend()
    if backend == "cpu":
        return "by_row"
    length, size = queries.shape[1], queries.shape[-1]
    fused = (
        queries.dtype in (jnp.bfloat16, jnp.float16)
        and rule.softcap is None
        and length >= MIN_CUDNN_LENGTH
        and length % CUDNN_LENGTH_STEP == 0
        and size <= MAX_CUDNN_HEAD_SIZE
        and size % 8 == 0
    )
    return "cudnn" if backend == "gpu" and fused else "batched"


def _cudnn_attention(queries, keys, values, rule: ScoreRule) -> Float[Array, "B T N H"]:
    if rule.softcap is not None:
        raise ValueError(
            f"attention 'cudnn' has no soft cap (this layer caps at {rule.softcap}): use 'batched'"
        )
    return jax.nn.dot_product_attention(
        queries,
        keys,
        values,
        scale=rule.scale,
        is_causal=True,
        local_window_size=None if rule.window is None else (rule.window - 1, 0),
        implementation="cudnn",
    )


def _attend_in_blocks(
    queries: Float[Array, "T N H"],
    keys: Float[Array, "T K H"],
    values: Float[Array, "T K H"],
    rule: ScoreRule,
) -> Float[Array, "T N H"]:
    """One row, a block of queries at a time against the keys that the block can see at all."""
    length, num_kv_heads = keys.shape[:2]
    grouped = _grouped(queries, num_kv_heads)
    # With a row more, which nobody sees, the last block's keys are a slice, as the others': if they were
    # just transposed, XLA would find their axes in an order that its 16-bit products on a CPU do not
    # take, and multiply in float32.
    keys, values = (jnp.pad(x.swapaxes(0, 1), ((0, 0), (0, 1), (0, 0))) for x in (keys, values))
    block = max(MIN_QUERY_BLOCK, -(-length // MAX_QUERY_BLOCKS))
    outputs = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        first = 0 if rule.window is None else max(0, start - rule.window + 1)
        visible = _visible(jnp.arange(start, stop), jnp.arange(first, stop), rule.window)
        seen = slice(first, stop)
        block_queries = grouped[:, :, start:stop]
        heads = Heads(keys[:, seen]), Heads(values[:, seen])
        outputs.append(_attend(block_queries, *heads, visible, rule))
    return _ungrouped(jnp.concatenate(outputs, axis=2))


def _attend(
    queries: Float[Array, "K G T H"],
    keys: Heads,
    values: Heads,
    visible: Bool[Array, "*#heads T S"],
    rule: ScoreRule,
) -> Float[Array, "K G T H"]:
    """Softmax attention of T queries to S keys; every query must see at least one key.

    The K heads may be those of several rows.
    """
    num_kv_heads, group, length, head_size = queries.shape
    # One matrix product per key/value head: the G queries of a position are rows like any other.
    rows = queries.reshape(num_kv_heads, group * length, head_size)
    scores = _dots(rows, keys).reshape(num_kv_heads, group, length, -1) * rule.scale
    if rule.softcap is not None:
        scores = rule.softcap * jnp.tanh(scores / rule.softcap)
    scores = jnp.where(visible, scores, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    if values.scale is None:
        weights = weights.astype(queries.dtype)  # as the product takes them: so they sum to one
    total = weights.sum(axis=-1, keepdims=True, dtype=jnp.float32)
    weights = weights.reshape(num_kv_heads, group * length, -1)
    # Dividing the H features after the sum is cheaper than the S weights before it.
    sums = _weighted_sums(weights, values, queries.dtype).reshape(queries.shape)
    return (sums / total).astype(queries.dtype)


def _dots(rows: Float[Array, "K R H"], keys: Heads) -> Float[Array, "K R S"]:
    """Every row times every key, in float32."""
    product = partial(jnp.einsum, "krh,ksh->krs", preferred_element_type=jnp.float32)
    entries = keys.entries.astype(rows.dtype)
    if keys.scale is None:
        return product(rows, entries)
    parts = [product(rows[..., i], entries[..., i]) * scale for i, scale in keys.groups()]
    return sum(parts[1:], parts[0])


def _weighted_sums(
    weights: Float[Array, "K R S"], values: Heads, dtype: DTypeLike
) -> Float[Array, "K R H"]:
    """Sums of values by weights in [0, 1], which are rounded to a dtype; in float32."""
    product = partial(jnp.einsum, "krs,ksh->krh", preferred_element_type=jnp.float32)
    entries = values.entries.astype(dtype)
    if values.scale is None:
        return product(weights.astype(dtype), entries)
    sums = []
    for i, scale in values.groups():
        # Relative to the largest, so that the product is no smaller than float16 can hold.
        largest = jnp.max(jnp.abs(scale), axis=-1, keepdims=True, initial=_TINY)
        scaled = (weights * (scale / largest)).astype(dtype)
        sums.append(product(scaled, entries[..., i]) * largest)
    return jnp.concatenate(sums, axis=-1)


def _visible(
    queries: Int[Array, " T"], keys: Int[Array, " S"], window: int | None
) -> Bool[Array, "T S"]:
    """Which key positions each query position may see."""
    distance = queries[:, None] - keys[None, :]
    causal = distance >= 0
    return causal if window is None else causal & (distance < window)


def _grouped(heads: Float[Array, "T N H"], num_kv_heads: int) -> Float[Array, "K G T H"]:
    length, _, head_size = heads.shape
    return heads.reshape(length, num_kv_heads, -1, head_size).transpose(1, 2, 0, 3)


def _ungrouped(heads: Float[Array, "K G T H"]) -> Float[Array, "T N H"]:
    num_kv_heads, group, length, head_size = heads.shape
    return heads.transpose(2, 0, 1, 3).reshape(length, num_kv_heads * group, head_size)
