# SPDX-License-Identifier: Apache-2.0
"""Packing against numpy's own bit stream: ``np.packbits(..., bitorder="little")``."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.packing import pack, packed_length, unpack

BITS = [2, 3, 4]
SHAPES = [
    (1,),
    (2,),
    (3,),
    (7,),
    (8,),
    (9,),
    (64,),
    (3, 5),
    (2, 3, 11),
    (0,),
    (4, 0),
    (0, 4),
    (0, 0),
]


def stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """Code i of a row is bits [i * bits, (i + 1) * bits) of it, low bit first."""
    bit_of_code = (codes.astype(np.int64)[..., None] >> np.arange(bits)) & 1
    rows = bit_of_code.reshape(*codes.shape[:-1], codes.shape[-1] * bits).astype(np.uint8)
    return np.packbits(rows, axis=-1, bitorder="little")


def every_code(shape: tuple[int, ...], bits: int, signed: bool) -> np.ndarray:
    low = -(2 ** (bits - 1)) if signed else 0
    rng = np.random.default_rng(bits)
    return rng.integers(low, low + 2**bits, shape).astype(np.int8)


@jax.jit
def there_and_back(codes):
    """Packs and unpacks arrays keyed by (bits, signed), in one compilation."""
    return {
        (bits, signed): (packed := pack(x, bits), unpack(packed, bits, x.shape[-1], signed=signed))
        for (bits, signed), x in codes.items()
    }


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_bit_stream_and_comes_back(shape):
    cases = {
        (bits, signed): every_code(shape, bits, signed) for bits in BITS for signed in (True, False)
    }
    for (bits, signed), (packed, back) in there_and_back(cases).items():
        codes = cases[bits, signed]
        assert packed.dtype == jnp.uint8
        assert packed.shape == (*shape[:-1], int(np.ceil(shape[-1] * bits / 8)))
        np.testing.assert_array_equal(packed, stream(codes, bits))
        assert back.dtype == jnp.int8
        np.testing.assert_array_equal(back, codes)


@pytest.mark.parametrize("bits", BITS)
def test_every_pair_of_neighbours(bits):
    """Every code next to every other, at every place of a word."""
    values = np.arange(2**bits)
    pairs = np.stack([a.ravel() for a in np.meshgrid(values, values)], axis=1).ravel()
    rows = np.stack([np.pad(pairs, (shift, 8 - shift)) for shift in range(8)]).astype(np.uint8)
    packed, back = there_and_back({(bits, False): rows})[bits, False]
    np.testing.assert_array_equal(packed, stream(rows, bits))
    np.testing.assert_array_equal(back, rows)


def test_low_nibble_first():
    assert pack(jnp.array([0x1, 0x2, 0xF], jnp.uint8), 4).tolist() == [0x21, 0x0F]
    assert unpack(jnp.array([0x21, 0x0F], jnp.uint8), 4, 3, signed=True).tolist() == [1, 2, -1]


def test_is_the_order_of_ml_dtypes_and_of_a_device_int4():
    codes = np.arange(-8, 8, dtype=np.int8)
    as_int4 = jnp.asarray(codes).astype(jnp.int4)
    bytes_of_int4 = jax.lax.bitcast_convert_type(as_int4.reshape(8, 2), jnp.uint8)
    np.testing.assert_array_equal(pack(jnp.asarray(codes), 4), bytes_of_int4)
    assert as_int4.dtype == ml_dtypes.int4


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int32, jnp.uint32])
def test_only_the_low_bits_count(dtype):
    codes = jnp.asarray(np.arange(11) * 5 % 256, dtype)
    packed = jax.jit(pack, static_argnums=1)(codes, 3)
    np.testing.assert_array_equal(packed, stream(np.asarray(codes) & 7, 3))


@pytest.mark.parametrize("bits", BITS)
def test_padding_is_zero(bits):
    row = jnp.full((5,), 2**bits - 1, jnp.int8)
    used = 5 * bits
    assert (
        int(jax.jit(pack, static_argnums=1)(row, bits)[-1])
        == 2 ** (used - 8 * (packed_length(5, bits) - 1)) - 1
    )


@pytest.mark.parametrize("bits", BITS)
def test_under_jit_and_vmap(bits):
    codes = jnp.asarray(every_code((3, 13), bits, True))
    packed = jax.jit(jax.vmap(lambda row: pack(row, bits)))(codes)
    np.testing.assert_array_equal(packed, stream(np.asarray(codes), bits))
    back = jax.jit(jax.vmap(lambda row: unpack(row, bits, 13, signed=True)))(packed)
    np.testing.assert_array_equal(back, codes)


@pytest.mark.parametrize("bits", BITS)
def test_as_a_constant_of_a_jitted_function(bits):
    """XLA folds constants on the host, and must come to the codes that the device does."""
    codes = every_code((3, 13), bits, True)
    packed = jnp.asarray(stream(codes, bits))
    back = jax.jit(lambda: unpack(packed, bits, 13, signed=True))()
    np.testing.assert_array_equal(back, codes)


@pytest.mark.parametrize("bits", [1, 5, 8])
def test_other_widths_are_refused(bits):
    with pytest.raises(ValueError, match=rf"2, 3 or 4 bits .*{bits=}$"):
        pack(jnp.zeros(4, jnp.int8), bits)
    with pytest.raises(ValueError, match=rf"{bits=}$"):
        unpack(jnp.zeros(4, jnp.uint8), bits, 4, signed=True)


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"^5 codes of 3 bits take 2 bytes, got 3$"):
        unpack(jnp.zeros(3, jnp.uint8), 3, 5, signed=True)
