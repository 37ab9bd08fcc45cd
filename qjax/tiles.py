# SPDX-License-Identifier: Apache-2.0
"""Tiles: the runs of neighbours that share one scale.

A tile has a length for each of the last ``len(tile)`` axes of an array; leading axes (stacked layers,
a batch under vmap) are left alone. The last tile of an axis may be ragged.
"""

import jax.numpy as jnp
from jaxtyping import Array, Shaped


def counts(shape: tuple[int, ...], tile: tuple[int, ...]) -> tuple[int, ...]:
    """How many tiles lie along each axis: ``ceil(shape / tile)``.

    >>> counts((300, 64), (128, 1))
    (3, 64)
    """
    return tuple(-(-n // t) for n, t in zip(shape, tile, strict=True))


def split(
    x: Shaped[Array, "..."], tile: tuple[int, ...], fill: float = 0.0
) -> Shaped[Array, "..."]:
    """Splits each axis in two, ``[..., n0/t0, t0, n1/t1, t1, ...]``, so that odd axes lie inside tiles.

    Args:
      x: array of at least ``len(tile)`` axes.
      tile: tile length for each of the last axes.
      fill: what ragged tiles are filled up with.
    """
    lead, shape = x.shape[: x.ndim - len(tile)], x.shape[x.ndim - len(tile) :]
    tiles = counts(shape, tile)
    missing = [(0, c * t - n) for n, t, c in zip(shape, tile, tiles, strict=True)]
    if any(m for _, m in missing):
        x = jnp.pad(x, [(0, 0)] * len(lead) + missing, constant_values=fill)
    return x.reshape(*lead, *(n for pair in zip(tiles, tile, strict=True) for n in pair))


def inner_axes(tile: tuple[int, ...]) -> tuple[int, ...]:
    """The axes inside a tile in the result of :func:`split`, counted from the end."""
    return tuple(range(-2 * len(tile) + 1, 0, 2))


def spread(
    per_tile: Shaped[Array, "..."], tile: tuple[int, ...], shape: tuple[int, ...]
) -> Shaped[Array, "..."]:
    """Repeats each tile's entry over the tile; axes with one tile keep length 1 and broadcast.

    Args:
      per_tile: one entry a tile, ``[..., *counts(shape, tile)]``.
      tile: tile length for each of the last axes.
      shape: lengths of the last axes of the array that the tiles cut.

    Returns:
      An array that broadcasts against ``[..., *shape]``.

    Example:
      >>> spread(jnp.array([[1, 2]]), (1, 2), (1, 3)).tolist()
      [[1, 1, 2]]
    """
    first = per_tile.ndim - len(tile)
    for i, (t, n) in enumerate(zip(tile, shape, strict=True), start=first):
        if t == 1 or per_tile.shape[i] == 1:
            continue
        before, after = per_tile.shape[:i], per_tile.shape[i + 1 :]
        runs = jnp.broadcast_to(
            jnp.expand_dims(per_tile, i + 1), (*before, per_tile.shape[i], t, *after)
        )
        runs = runs.reshape(*before, per_tile.shape[i] * t, *after)
        per_tile = runs[(slice(None),) * i + (slice(0, n),)]
    return per_tile
