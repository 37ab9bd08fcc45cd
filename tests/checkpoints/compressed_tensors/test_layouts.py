# SPDX-License-Identifier: Apache-2.0
"""Every layout against a decoder in plain numpy, and back into the same QTensor, bit for bit."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qjax import QTensor, dequantize, formats, qtensor, tiles
from qjax.scheme import ActivationScheme
from qjax_checkpoints.compressed_tensors import layouts
from qjax_checkpoints.compressed_tensors.layouts import LayerSpec

INTEGERS = {2: formats.INT2, 3: formats.INT3, 4: formats.INT4, 8: formats.INT8}
E2M1_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def random_integers(bits, shape, tile, *, symmetric, dtype, activations=None) -> QTensor:
    rng = np.random.default_rng(bits)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    counts = tiles.counts(shape, tile)
    zero = None if symmetric else jnp.asarray(rng.integers(low, high, counts), jnp.int8)
    return QTensor.from_codes(
        jnp.asarray(rng.integers(low, high, shape), jnp.int8),
        jnp.asarray(rng.uniform(0.01, 1, counts), dtype),
        zero,
        format=INTEGERS[bits],
        axis=(-2,),
        tile=tile,
        dtype=dtype,
        activations=activations,
    )


def random_floats(format, shape, tile, *, scale_dtype, activations=None) -> QTensor:
    rng = np.random.default_rng(1)
    counts = tiles.counts(shape, tile)
    if format == formats.E2M1:
        codes = jnp.asarray(rng.integers(0, 16, shape), jnp.int8)
    else:
        codes = jnp.asarray(rng.standard_normal(shape), jnp.float32).astype(format.dtype)
    scale = jnp.asarray(2.0 ** rng.integers(-6, 3, counts), jnp.float32).astype(scale_dtype)
    return QTensor.from_codes(
        codes,
        scale,
        None,
        jnp.float32(0.25) if scale_dtype == jnp.float8_e4m3fn else None,
        format=format,
        axis=(-2,),
        tile=tile,
        dtype=jnp.bfloat16,
        activations=activations,
    )


def encoded(q: QTensor) -> dict[str, np.ndarray]:
    tensors = {}
    for suffix, pending in layouts.encode(q).items():
        array = pending.compute()
        assert (array.shape, array.dtype) == (pending.shape, pending.dtype)
        tensors[suffix] = array
    return tensors


def spec_of(q: QTensor) -> LayerSpec:
    return LayerSpec(
        format=q.format,
        shape=(q.shape[0], q.shape[1]),
        tile=(q.tile[0], q.tile[1]),
        symmetric=q.zero is None,
        dtype=np.dtype(q.dtype),
        activations=q.activations,
    )


def decoded(tensors: dict[str, np.ndarray], q: QTensor) -> QTensor:
    spec = spec_of(q)
    arrays = {
        suffix: jnp.asarray(array.reshape(spec.stored_shape(suffix, array.dtype)))
        for suffix, array in tensors.items()
        if suffix != "weight_shape"
    }
    return layouts.decode(arrays, spec)


def assert_same(a: QTensor, b: QTensor) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


# The definition: numpy, one step at a time.


def fields_of(words: np.ndarray, bits: int, n: int) -> np.ndarray:
    """The first n fields of each row of int32 words, least bit first, less 2^(bits-1)."""
    octets = np.ascontiguousarray(words.astype("<i4")).view(np.uint8)
    stream = np.unpackbits(octets.reshape(words.shape[0], -1), axis=1, bitorder="little")
    fields = stream[:, : n * bits].reshape(words.shape[0], n, bits).astype(np.int64)
    codes = (fields << np.arange(bits)).sum(axis=2) - 2 ** (bits - 1)
    return codes.astype(np.float32)


def spread(scale: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Repeats each entry over its tile."""
    repeats = [-(-n // count) for n, count in zip(shape, scale.shape, strict=True)]
    whole = scale.astype(np.float32).repeat(repeats[0], axis=0).repeat(repeats[1], axis=1)
    return whole[: shape[0], : shape[1]]


def nibbles(packed: np.ndarray) -> np.ndarray:
    codes = np.stack([packed & 15, packed >> 4], axis=2).reshape(packed.shape[0], -1)
    return E2M1_VALUES[codes & 7] * np.where(codes & 8, -1, 1).astype(np.float32)


def powers(scale: np.ndarray) -> np.ndarray:
    return 2.0 ** (scale.astype(np.float32) - 127)


def reference(tensors: dict[str, np.ndarray], bits: int = 0) -> np.ndarray:
    """The weight [out, in] in float32."""
    scale = tensors["weight_scale"]
    if "weight" in tensors:
        weight = tensors["weight"].astype(np.float32)
        scale = powers(scale) if scale.dtype == np.uint8 else scale
        zero = tensors.get("weight_zero_point")
        weight = weight if zero is None else weight - spread(zero, weight.shape)
        return weight * spread(
            scale.reshape(scale.shape if scale.ndim == 2 else (1, 1)), weight.shape
        )
    if tensors["weight_packed"].dtype == np.uint8:
        values = nibbles(tensors["weight_packed"])
        if "weight_global_scale" in tensors:
            return values * spread(scale, values.shape) / tensors["weight_global_scale"]
        return values * spread(powers(scale), values.shape)
    out, columns = tensors["weight_shape"]
    codes = fields_of(tensors["weight_packed"], bits, columns)
    if "weight_zero_point" in tensors:
        zero = fields_of(tensors["weight_zero_point"].T, bits, out).T
        codes = codes - spread(zero, codes.shape)
    return codes * spread(scale, codes.shape)


SHAPES = {"group": ((48, 33), (16, 1)), "channel": ((50, 33), (50, 1))}


@pytest.mark.parametrize(
    ("bits", "activation"),
    [
        (2, None),
        (3, None),
        (4, None),
        (8, None),
        (4, formats.INT8),
        (4, formats.E4M3),
        (8, formats.INT8),
    ],
)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", SHAPES)
def test_integers(bits, activation, symmetric, kind):
    shape, tile = SHAPES[kind]
    activations = activation and ActivationScheme(format=activation)
    dtype = jnp.bfloat16
    q = random_integers(
        bits, shape, tile, symmetric=symmetric, dtype=dtype, activations=activations
    )
    tensors = encoded(q)
    unpacked = bits == 8 and activation is not None
    assert layouts.format_of(q) == ("int-quantized" if unpacked else "pack-quantized")
    assert tensors["weight_scale"].shape == (shape[1], shape[0] // tile[0])
    if not unpacked:
        assert tensors["weight_packed"].dtype == np.int32
        assert tensors["weight_packed"].shape == (shape[1], -(-shape[0] * bits // 32))
        assert tensors["weight_shape"].tolist() == [shape[1], shape[0]]
        assert tensors["weight_shape"].dtype == np.int64
    if not symmetric and not unpacked:
        assert tensors["weight_zero_point"].shape == (
            -(-shape[1] * bits // 32),
            shape[0] // tile[0],
        )
    np.testing.assert_array_equal(reference(tensors, bits).T, dequantize(q, jnp.float32))
    assert_same(decoded(tensors, q), q)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_keep_their_dtype(dtype, symmetric):
    q = random_integers(4, (48, 33), (16, 1), symmetric=symmetric, dtype=dtype)
    assert encoded(q)["weight_scale"].dtype == dtype
    assert_same(decoded(encoded(q), q), q)


@pytest.mark.parametrize("bits", INTEGERS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_one_scale_becomes_one_a_channel(bits, symmetric):
    q = random_integers(bits, (50, 33), (50, 33), symmetric=symmetric, dtype=jnp.float32)
    tensors = encoded(q)
    assert tensors["weight_scale"].shape == (33, 1)
    np.testing.assert_array_equal(reference(tensors, bits).T, dequantize(q))


E4M3_TILES = {
    "tensor": ((50, 33), (50, 33), [1]),
    "channel": ((50, 33), (50, 1), [33, 1]),
    "block": ((200, 130), (128, 128), [2, 2]),
    "block, one side short": ((48, 130), (48, 128), [2, 1]),
    "block, other side short": ((130, 48), (128, 48), [1, 2]),
    "block, larger than the layer": ((50, 33), (128, 128), [1, 1]),
    "block, wider than the layer": ((48, 130), (128, 128), [2, 1]),
}


@pytest.mark.parametrize("tile", E4M3_TILES)
@pytest.mark.parametrize("activation", [None, formats.E4M3])
def test_e4m3(tile, activation):
    shape, tile, stored = E4M3_TILES[tile]
    activations = activation and ActivationScheme(format=activation)
    q = random_floats(formats.E4M3, shape, tile, scale_dtype=jnp.bfloat16, activations=activations)
    assert layouts.format_of(q) == ("float-quantized" if activation else "naive-quantized")
    tensors = encoded(q)
    assert tensors["weight"].dtype == ml_dtypes.float8_e4m3fn
    assert tensors["weight"].shape == shape[::-1]
    assert list(tensors["weight_scale"].shape) == stored
    scale = tensors["weight_scale"].astype(np.float32).reshape(tiles.counts(shape, tile)[::-1])
    rows = np.arange(shape[1]) // tile[1]
    columns = np.arange(shape[0]) // tile[0]
    expected = tensors["weight"].astype(np.float32) * scale[rows][:, columns]
    np.testing.assert_array_equal(expected.T, dequantize(q, jnp.float32))
    assert_same(decoded(tensors, q), q)


@pytest.mark.parametrize("activation", [None, formats.E4M3])
def test_mxfp8(activation):
    activations = activation and ActivationScheme(
        format=activation, group_size=32, scale_format="e8m0"
    )
    q = random_floats(
        formats.E4M3, (64, 33), (32, 1), scale_dtype=jnp.float8_e8m0fnu, activations=activations
    )
    tensors = encoded(q)
    assert layouts.format_of(q) == "mxfp8-quantized"
    assert (tensors["weight_scale"].dtype, tensors["weight_scale"].shape) == (np.uint8, (33, 2))
    np.testing.assert_array_equal(reference(tensors).T, dequantize(q, jnp.float32))
    assert_same(decoded(tensors, q), q)


def test_mxfp4():
    q = random_floats(formats.E2M1, (64, 33), (32, 1), scale_dtype=jnp.float8_e8m0fnu)
    tensors = encoded(q)
    assert layouts.format_of(q) == "mxfp4-pack-quantized"
    assert (tensors["weight_packed"].dtype, tensors["weight_packed"].shape) == (np.uint8, (33, 32))
    np.testing.assert_array_equal(reference(tensors).T, dequantize(q, jnp.float32))
    assert_same(decoded(tensors, q), q)


def test_nvfp4():
    q = random_floats(formats.E2M1, (48, 33), (16, 1), scale_dtype=jnp.float8_e4m3fn)
    tensors = encoded(q)
    assert layouts.format_of(q) == "nvfp4-pack-quantized"
    assert tensors["weight_scale"].dtype == ml_dtypes.float8_e4m3fn
    assert tensors["weight_global_scale"].tolist() == [4.0]  # a divisor
    np.testing.assert_array_equal(reference(tensors).T, dequantize(q, jnp.float32))
    assert_same(decoded(tensors, q), q)


def test_words_of_known_bits():
    codes = jnp.array([[-8, -7, -6, -5, -4, -3, -2, -1, 7]], jnp.int8)
    assert np.asarray(layouts.pack_rows(codes, 4)).view(np.uint32).tolist() == [[0x76543210, 0xF]]
    three = jnp.full((1, 11), 3, jnp.int8)  # eleven sevens: 33 bits
    assert np.asarray(layouts.pack_rows(three, 3)).view(np.uint32).tolist() == [[0xFFFFFFFF, 1]]


@pytest.mark.parametrize("bits", INTEGERS)
@pytest.mark.parametrize("n", [1, 7, 8, 31, 32, 33])
def test_rows_of_any_length(bits, n):
    codes = np.random.default_rng(n).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, n))
    words = layouts.pack_rows(jnp.asarray(codes, jnp.int8), bits)
    np.testing.assert_array_equal(fields_of(np.asarray(words), bits, n), codes)
    np.testing.assert_array_equal(layouts.unpack_rows(words, bits, n), codes)


def refusal(q: QTensor) -> str:
    with pytest.raises(ValueError) as caught:
        layouts.encode(q)
    return str(caught.value)


def test_refusals():
    bfloat16 = {"scale_dtype": jnp.bfloat16}
    e8m0 = {"scale_dtype": jnp.float8_e8m0fnu}
    assert "holds nf4" in refusal(random_floats(formats.NF4, (32, 8), (16, 1), **bfloat16))
    assert "holds e5m2" in refusal(random_floats(formats.E5M2, (32, 8), (32, 1), **bfloat16))
    assert "e4m3 in tiles of 16 x 1" in refusal(
        random_floats(formats.E4M3, (32, 8), (16, 1), **bfloat16)
    )
    assert "groups of 32" in refusal(random_floats(formats.E2M1, (40, 8), (32, 1), **e8m0))
    assert "groups of 32" in refusal(random_floats(formats.E4M3, (64, 8), (16, 1), **e8m0))
    assert "needs e4m3 scales" in refusal(random_floats(formats.E2M1, (32, 8), (16, 1), **bfloat16))
    integers = {"symmetric": True, "dtype": jnp.float32}
    assert "groups of 16 must divide its 50 inputs" in refusal(
        random_integers(4, (50, 8), (16, 1), **integers)
    )
    assert "tiles of 16 x 4" in refusal(random_integers(4, (32, 8), (16, 4), **integers))
    grouped = ActivationScheme(format=formats.E4M3, group_size=128)
    assert "activation groups of 128 must divide its 200 inputs" in refusal(
        random_floats(formats.E4M3, (200, 128), (128, 128), **bfloat16, activations=grouped)
    )


def test_only_linear_layers():
    q = random_integers(4, (32, 8), (16, 1), symmetric=True, dtype=jnp.float32)
    table = QTensor.from_codes(
        qtensor.unpacked(q), q.scale, format=q.format, axis=(-1,), tile=q.tile, dtype=q.dtype
    )
    assert "only linear layers" in refusal(table)
