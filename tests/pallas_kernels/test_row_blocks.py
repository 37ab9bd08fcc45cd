# SPDX-License-Identifier: Apache-2.0
"""The layouts that weights stream in: reversible, and where their docstring says."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import row_blocks


@pytest.fixture
def codes(rng):
    return rng.integers(-8, 8, (192, 48)).astype(np.int8)


def test_every_code_lies_where_the_formula_says(codes):
    words = np.asarray(row_blocks.tile_codes(jnp.asarray(codes)))
    assert words.shape == (3, 3, 32, 4)
    for output in range(48):
        b, r, g = output // 16, output // 8 % 2, output % 8
        for k in range(192):
            t, c, u, w, e = k // 64, k // 16 % 4, k // 8 % 2, k // 2 % 4, k % 2
            nibble = 2 * u + r + 4 * e
            word = int(words[b, t, 4 * g + (c ^ g // 2), w])
            assert (word >> 4 * nibble) % 16 == codes[k, output] + 8


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int4])
@pytest.mark.parametrize("layers", [(), (2,), (2, 3)])
def test_round_trip(rng, dtype, layers):
    codes = jnp.asarray(rng.integers(-8, 8, (*layers, 128, 32)), jnp.int8).astype(dtype)
    words = row_blocks.tile_codes(codes)
    assert words.shape == (*layers, 2, 2, 32, 4) and words.dtype == jnp.uint32
    np.testing.assert_array_equal(row_blocks.untile_codes(words), codes.astype(jnp.int8))


def test_every_byte_lies_where_the_formula_says(rng):
    codes = rng.integers(-128, 128, (192, 48)).astype(np.int8)
    words = np.asarray(row_blocks.tile_bytes(jnp.asarray(codes)))
    assert words.shape == (3, 3, 2, 32, 4)
    for output in range(48):
        b, r, g = output // 16, output // 8 % 2, output % 8
        for k in range(192):
            t, c, u, w, e = k // 64, k // 16 % 4, k // 8 % 2, k // 2 % 4, k % 2
            word = int(words[b, t, r, 4 * g + (c ^ g // 2), w])
            assert (word >> 8 * (2 * u + e)) % 256 == int(codes[k, output]) % 256


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn])
@pytest.mark.parametrize("layers", [(), (2,), (2, 3)])
def test_bytes_round_trip(rng, dtype, layers):
    bits = rng.integers(0, 256, (*layers, 128, 32), dtype=np.uint8)  # NaN too
    words = row_blocks.tile_bytes(jnp.asarray(bits.view(dtype)))
    assert words.shape == (*layers, 2, 2, 2, 32, 4) and words.dtype == jnp.uint32
    back = row_blocks.untile_bytes(words, dtype)
    assert back.dtype == dtype
    np.testing.assert_array_equal(np.asarray(back).view(np.uint8), bits)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("layers", [(), (2,)])
def test_pairs_round_trip(rng, dtype, layers):
    values = jnp.asarray(rng.standard_normal((*layers, 3, 32)), dtype)
    words = row_blocks.tile_pairs(values)
    assert words.shape == (*layers, 2, 3, 8)
    np.testing.assert_array_equal(row_blocks.untile_pairs(words, dtype), values)


def test_pairs_are_outputs_eight_apart():
    values = jnp.arange(32, dtype=jnp.bfloat16)[None]
    words = np.asarray(row_blocks.tile_pairs(values))
    halves = words[1, 0, 3:4].view(jnp.bfloat16)
    assert halves.tolist() == [16 + 3, 16 + 8 + 3]


@pytest.mark.parametrize("shape", [(64, 24), (96, 32)])
def test_whole_blocks_only(shape):
    assert not row_blocks.fits(*shape)
    with pytest.raises(ValueError, match=f"{shape[0]} x {shape[1]} weights"):
        row_blocks.tile_codes(jnp.zeros(shape, jnp.int8))
    with pytest.raises(ValueError, match=f"{shape[0]} x {shape[1]} weights"):
        row_blocks.tile_bytes(jnp.zeros(shape, jnp.int8))
