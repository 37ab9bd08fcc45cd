# SPDX-License-Identifier: Apache-2.0
"""What a QTensor's leaves mean, in plain numpy and float64."""

from collections.abc import Callable

import jax
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import device
from qjax import formats, kernel_products
from qjax.qtensor import QTensor
from qjax.scheme import ActivationScheme


def numpy_codes(q: QTensor) -> np.ndarray:
    """Plain codes of the logical shape, read off the bit stream."""
    stored, bits = np.asarray(q.codes), q.format.bits
    if bits == 8:
        return stored
    if stored.dtype == ml_dtypes.int4:  # packed by XLA itself, so that numpy sees plain codes
        return stored.astype(np.int8)
    stream = np.unpackbits(stored, axis=-1, bitorder="little")[..., : q.shape[-1] * bits]
    codes = stream.reshape(*q.shape, bits).astype(np.int64) @ (1 << np.arange(bits))
    if q.format.kind == "integer":
        codes = np.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes)
    return codes.astype(np.int8)


def numpy_values(codes: np.ndarray, format_name: str) -> np.ndarray:
    """What codes stand for before zero and scale."""
    if format_name == "e2m1":
        return codes.astype(np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    if format_name == "nf4":
        return np.asarray(formats.NF4.table, np.float32).astype(np.float64)[codes]
    return codes.astype(np.float64)


def over_tiles(per_tile: np.ndarray, tile: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    """Each element's entry: the one of the tile that it lies in."""
    places = [np.arange(n) // t for n, t in zip(shape[-len(tile) :], tile, strict=True)]
    return np.asarray(per_tile).astype(np.float64)[(..., *np.ix_(*places))]


@pytest.fixture(scope="session")
def codes_of() -> Callable[[QTensor], np.ndarray]:
    return numpy_codes


@pytest.fixture(scope="session")
def decoded() -> Callable[[QTensor], np.ndarray]:
    """The float64 array that a QTensor stands for."""

    def decode(q: QTensor) -> np.ndarray:
        values = numpy_values(numpy_codes(q), q.format.name)
        if q.zero is not None:
            values = values - over_tiles(q.zero, q.tile, q.shape)
        values = values * over_tiles(q.scale, q.tile, q.shape)
        if q.tensor_scale is None:
            return values
        tensor_scale = np.asarray(q.tensor_scale, np.float64)
        return values * tensor_scale.reshape(tensor_scale.shape + (1,) * len(q.tile))

    return decode


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def quantized_tokens() -> Callable[..., np.ndarray]:
    """What dynamically quantized activations stand for; float64, and the last axis is summed over."""

    def quantize(x: np.ndarray, scheme: ActivationScheme, nudge: float = 0.0) -> np.ndarray:
        fmt, size = scheme.format, min(scheme.group_size or x.shape[-1], x.shape[-1])
        groups = x.astype(np.float32).reshape(*x.shape[:-1], x.shape[-1] // size, size)
        absmax = np.abs(groups).max(-1, keepdims=True).astype(np.float64)
        if scheme.scale_format == "e8m0":
            top = 2.0 ** np.floor(np.log2(fmt.high))
            scale = 2.0 ** np.ceil(np.log2(absmax / ((fmt.high + 2 * top) / 2)))
        else:
            scale = (absmax / fmt.high).astype(np.float32).astype(np.float64)
        steps = np.clip(groups / scale * (1 + nudge), fmt.low, fmt.high)
        match fmt.name:
            case "e4m3" | "e2m1":
                dtype = ml_dtypes.float8_e4m3fn if fmt.name == "e4m3" else ml_dtypes.float4_e2m1fn
                near = steps.astype(np.float32).astype(dtype).astype(np.float64)
            case _:
                near = np.rint(steps)
        return (near * scale).reshape(x.shape)

    return quantize


@pytest.fixture
def hopper(monkeypatch):
    """A machine that takes itself for a Hopper GPU and runs kernels in the interpreter."""
    monkeypatch.setattr(device, "is_hopper", lambda: True)
    launched = []

    def interpreted(x, *arrays, token_scale=None, layer=None, out_dtype, **choices):
        launched.append((x.shape, str(x.dtype)))
        outputs = 16 * arrays[0].shape[0 if layer is None else 1]
        shape = jax.ShapeDtypeStruct((x.shape[0], outputs), out_dtype)
        choices |= {"out_dtype": out_dtype, "interpret": True}

        def run(positional, token_scale, layer):
            y = original(*positional, token_scale=token_scale, layer=layer, **choices)
            return np.asarray(y)

        positional = (x, *(array for array in arrays if array is not None))
        return jax.pure_callback(
            run, shape, positional, token_scale, layer, vmap_method="sequential"
        )

    original = kernel_products.quantized_matmul
    monkeypatch.setattr(kernel_products, "quantized_matmul", interpreted)
    return launched
