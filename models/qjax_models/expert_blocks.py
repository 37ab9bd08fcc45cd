# SPDX-License-Identifier: Apache-2.0
"""Experts as one stack of weights: tokens are sorted by expert and computed block by block.

Each token has k experts, which makes N k rows. Sorted by expert and filled up to whole blocks of one
expert each, they go through a scan: one small program whatever the number of experts, in which a block
reads the weights of its expert and no other. The rows computed are N k and what fills up the blocks,
where experts that are modules of their own compute N E. The other form, `jax.lax.ragged_dot`, takes
arrays only: QTensors would be dequantized for it, those of all experts at each step.

References:
    Gale et al., MegaBlocks: Efficient Sparse Training with Mixture-of-Experts, 2022,
    https://arxiv.org/abs/2211.15841, whose blocks of one expert these are.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from qjax.stacked_layers import layer_of

_LARGEST_BLOCK = 128  # rows


class Blocks(NamedTuple):
    """Rows in blocks of one expert each.

    Attributes:
        expert: of each block; of blocks that are not needed, any.
        tokens: whose features each row of a block is; N where it only fills the block up.
        places: where the row of each token and each of its experts is, among those of all blocks.
    """

    expert: Int[Array, " blocks"]
    tokens: Int[Array, "blocks rows"]
    places: Int[Array, "N k"]


def blocks_of(chosen: Int[Array, "N k"], count: int, rows: int) -> Blocks:
    """Sorts tokens by expert.

    Args:
        chosen: the experts of each token, all different.
        count: of experts.
        rows: of a block.

    Example:
        >>> blocks = blocks_of(jnp.array([[2], [0], [2]]), 3, 2)
        >>> blocks.expert.tolist(), blocks.tokens.tolist()
        ([0, 2, 2], [[1, 3], [0, 2], [3, 3]])
    """
    tokens, per_token = chosen.shape
    pairs = chosen.reshape(-1)
    # An expert begins a block of its own: at most one more each than full blocks, nor more than rows.
    most = min(pairs.size, pairs.size // rows + min(count, pairs.size))
    sizes = jnp.bincount(pairs, length=count)
    ends = jnp.cumsum(-(-sizes // rows))  # in blocks
    order = jnp.argsort(pairs, stable=True)
    in_order = pairs[order]
    first_pair, first_block = jnp.cumsum(sizes) - sizes, ends - (-(-sizes // rows))
    place = first_block[in_order] * rows + jnp.arange(pairs.size) - first_pair[in_order]
    filled = jnp.full(most * rows, tokens).at[place].set(order // per_token)
    expert = jnp.searchsorted(ends, jnp.arange(most), side="right")
    return Blocks(
        expert=jnp.minimum(expert, count - 1),
        tokens=filled.reshape(most, rows),
        places=jnp.zeros(pairs.size, place.dtype).at[order].set(place).reshape(chosen.shape),
    )


def mixed(
    stack: nnx.Module,
    count: int,
    x: Float[Array, "N D"],
    chosen: Int[Array, "N k"],
    weights: Float[Array, "N k"],
) -> Float[Array, "N D"]:
    """The weighted sum of what its experts make of each token.

    Args:
        stack: an expert whose weights are those of all, stacked along their first axis.
        count: how many that are.
        x: features of the tokens.
        chosen: the experts of each.
        weights: of their outputs.
    """
    graphdef, state = nnx.split(stack)
    blocks = blocks_of(chosen, count, _rows_of_block(chosen.size, count))
    filled = jnp.concatenate([x, jnp.zeros_like(x[:1])])

    def one(_: None, block: tuple[Any, Any]) -> tuple[None, Float[Array, "rows D"]]:
        expert, tokens = block
        return None, nnx.merge(graphdef, layer_of(state, expert))(filled[tokens])

    _, computed = jax.lax.scan(one, None, (blocks.expert, blocks.tokens))
    of_pairs = computed.reshape(-1, x.shape[-1])[blocks.places]
    return jnp.sum(of_pairs * weights[..., None].astype(x.dtype), axis=1)


def _rows_of_block(pairs: int, count: int) -> int:
    """As many as an expert has on average, as a power of two."""
    return min(_LARGEST_BLOCK, 1 << (max(1, pairs // count) - 1).bit_length())
