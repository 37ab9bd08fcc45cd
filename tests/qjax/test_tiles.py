# SPDX-License-Identifier: Apache-2.0
"""Tiles, against slices."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import tiles

SHAPE = (6, 7)
TILES = [(1, 1), (3, 1), (6, 1), (1, 7), (6, 7), (4, 3), (4, 4), (8, 9), (5, 7)]


def slices(tile: tuple[int, ...]):
    """Which tile, and what it covers."""
    counts = [int(np.ceil(n / t)) for n, t in zip(SHAPE, tile, strict=True)]
    for index in itertools.product(*map(range, counts)):
        yield index, tuple(slice(i * t, (i + 1) * t) for i, t in zip(index, tile, strict=True))


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_counts(tile):
    last = max(index for index, _ in slices(tile))
    assert tiles.counts(SHAPE, tile) == tuple(i + 1 for i in last)


@pytest.mark.parametrize("leading", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_split_puts_each_tile_on_the_odd_axes(tile, leading):
    x = np.random.default_rng(0).standard_normal((*leading, *SHAPE)).astype(np.float32)

    @jax.jit
    def sum_and_min(x):
        inner = tiles.inner_axes(tile)
        return tiles.split(x, tile).sum(inner), tiles.split(x, tile, fill=-99.0).min(inner)

    summed, filled = map(np.asarray, sum_and_min(x))
    assert summed.shape == (*leading, *tiles.counts(SHAPE, tile))
    for index, where in slices(tile):
        inside = x[(..., *where)]
        np.testing.assert_allclose(summed[(..., *index)], inside.sum((-2, -1)), atol=1e-5)
        ragged = inside.shape[-2:] != tile
        expected = np.full(leading, -99) if ragged else inside.min((-2, -1))
        np.testing.assert_array_equal(filled[(..., *index)], expected)


@pytest.mark.parametrize("leading", [(), (2,)], ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_spread_gives_each_element_its_tiles_entry(tile, leading):
    counts = tiles.counts(SHAPE, tile)
    per_tile = np.arange(np.prod((*leading, *counts))).reshape(*leading, *counts)
    spread = jax.jit(lambda per_tile: tiles.spread(per_tile, tile, SHAPE))(per_tile)
    spread = np.broadcast_to(spread, (*leading, *SHAPE))
    for index, where in slices(tile):
        entry = per_tile[(..., *index)][..., None, None]
        np.testing.assert_array_equal(
            spread[(..., *where)], np.broadcast_to(entry, spread[(..., *where)].shape)
        )


def test_spread_writes_nothing_out_along_an_axis_with_one_tile():
    assert tiles.spread(jnp.ones((1, 7)), (6, 1), SHAPE).shape == (1, 7)
    assert tiles.spread(jnp.ones((1, 1)), SHAPE, SHAPE).shape == (1, 1)
