# SPDX-License-Identifier: Apache-2.0
"""Both kernels on the GPU: fresh random operands, against float64, again and again the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import device, few_tokens, many_tokens
from pallas_kernels.product import Product
from pallas_kernels.quantized_matmul import plain_codes, quantized_matmul

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not device.is_hopper(), reason="needs a Hopper GPU"),
]
E4M3 = "float8_e4m3fn"
SHAPES = [(4096, 6144), (4096, 28672), (14336, 4096), (8192, 8192), (128, 16), (5120, 1040)]
TOKENS = [1, 3, 17, 64, 100, 300]
KERNELS = [few_tokens, many_tokens]


@pytest.fixture
def fresh() -> np.random.Generator:
    return np.random.default_rng()


@pytest.mark.parametrize("kernel", KERNELS, ids=["few", "many"])
@pytest.mark.parametrize(("k", "n"), SHAPES)
@pytest.mark.parametrize("weights", ["int4", "int8", E4M3])
@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_half_tokens(fresh, kernel, half_tokens, k, n, weights, half):
    o = half_tokens(fresh, max(TOKENS), k, n, weights=weights, half=half, group=128)
    for m in TOKENS:
        run(fresh, kernel, o.of_tokens(m))


@pytest.mark.parametrize("kernel", KERNELS, ids=["few", "many"])
@pytest.mark.parametrize(("k", "n"), SHAPES)
@pytest.mark.parametrize(
    ("weights", "tokens", "by_block"),
    [
        ("int4", "int8", False),
        ("int8", "int8", False),
        ("int4", E4M3, False),
        (E4M3, E4M3, False),
        (E4M3, E4M3, True),
    ],
)
def test_byte_tokens(fresh, kernel, byte_tokens, k, n, weights, tokens, by_block):
    o = byte_tokens(fresh, max(TOKENS), k, n, weights=weights, tokens=tokens, by_block=by_block)
    for m in TOKENS:
        run(fresh, kernel, o.of_tokens(m))


@pytest.mark.parametrize("kernel", KERNELS, ids=["few", "many"])
@pytest.mark.parametrize("group", [32, 64, 128, None])
@pytest.mark.parametrize("half", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("weights", "asymmetric"),
    [("int4", False), ("int4", True), ("int8", False), ("int8", True), (E4M3, False)],
)
@pytest.mark.parametrize("m", [1, 17, 70])
def test_variants(fresh, kernel, half_tokens, group, half, weights, asymmetric, m):
    o = half_tokens(
        fresh, m, 2048, 1024, weights=weights, half=half, group=group, asymmetric=asymmetric
    )
    run(fresh, kernel, o)


@pytest.mark.parametrize("kernel", KERNELS, ids=["few", "many"])
@pytest.mark.parametrize("m", [1, 17, 70])
@pytest.mark.parametrize("weights", ["int8", E4M3])
def test_one_scale_bias_and_residual(fresh, kernel, byte_tokens, weights, m):
    o = byte_tokens(fresh, m, 2048, 1040, weights=weights, one_scale=True)
    extra = {
        "bias": jnp.asarray(fresh.standard_normal(1040), jnp.bfloat16),
        "residual": jnp.asarray(fresh.standard_normal((m, 1040)), jnp.bfloat16),
    }
    run(fresh, kernel, dataclasses.replace(o, options=o.options | extra))


@pytest.mark.parametrize("kernel", KERNELS, ids=["few", "many"])
@pytest.mark.parametrize("m", [1, 64, 257])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_integers_are_multiplied_exactly(fresh, kernel, byte_tokens, m, weights):
    x, codes, _ = byte_tokens(fresh, m, 8192, 1024, weights=weights, tokens="int8").args
    whole = np.asarray(x, np.float64) @ np.asarray(plain_codes(codes, weights), np.float64)
    product = Product(m=m, k=8192, n=1024, group_size=None, weights=weights, tokens="int8")
    y = quantized_matmul(
        x, codes, jnp.ones(1), weights=weights, token_scale=jnp.ones(1),
        config=kernel.default_config(product),
    )  # fmt: skip
    np.testing.assert_array_equal(y, whole.astype(np.float32))


@pytest.mark.parametrize(
    ("m", "config"),
    [
        (70, many_tokens.Config(rows=2, tokens=32, stages=3)),
        (64, many_tokens.Config(rows=2, slices=2, fragments=2, tokens=64)),
        (33, many_tokens.Config(rows=1, slices=4, tokens=64)),
        (100, many_tokens.Config(rows=2, tokens=64, span=2)),
        (300, many_tokens.Config(rows=4, tokens=128, span=2, stages=3)),
        (1000, many_tokens.Config(rows=2, tokens=256)),
    ],
)
@pytest.mark.parametrize("weights", ["int4", "int8", E4M3])
def test_cuts_of_many_tokens(fresh, half_tokens, m, config, weights):
    o = half_tokens(fresh, m, 4096, 1040, weights=weights, half="bfloat16", group=64)
    run(fresh, many_tokens, o, config)


def run(rng, kernel, o, config=None) -> None:
    arrays = {name: value for name, value in o.options.items() if name != "weights"}
    weights, (x, codes, scale, *_) = o.options["weights"], o.args
    (m, k), n = x.shape, codes.shape[0] * 16
    half = str(x.dtype) if x.dtype.itemsize == 2 else None
    by_block = half is None and scale.ndim == 2
    grouped = half is not None and scale.shape[1] > 1
    group = 128 if by_block else k // scale.shape[1] if grouped else None
    product = Product(
        m=m, k=k, n=n, group_size=group, weights=weights, tokens=str(x.dtype),
        has_zeros=len(o.args) == 4,
    )  # fmt: skip
    if kernel is many_tokens and many_tokens.why_not(product):
        pytest.skip(str(many_tokens.why_not(product)))
    config = config or kernel.default_config(product)

    @jax.jit
    def multiply(args, arrays):
        return quantized_matmul(
            *args, **arrays, weights=weights, config=config, out_dtype=jnp.float32
        )

    poison(m * n)
    first = np.asarray(multiply(o.args, arrays))
    poison(m * n)
    assert np.array_equal(first, np.asarray(multiply(o.args, arrays)))
    assert np.isfinite(first).all()
    columns = np.unique(np.r_[0:16, n - 16 : n, rng.integers(0, n, 64)])  # checked in float64
    if kernel is many_tokens and product.tokens == E4M3:
        # Hopper adds up products of 8-bit floats with about 14 bits: DeepSeek-V3 Technical Report, 3.3.2.
        assert o.relative_error(first, columns) < 2**-8
        return
    # float32 sums of exact products; many tokens have the scales of groups rounded into each weight.
    rounded = half if kernel is many_tokens and grouped else None
    assert o.relative_error(first, columns, rounded) < 2e-6


def poison(size: int) -> None:
    """Fills the memory that the next result will get with NaN."""
    jax.block_until_ready([jnp.full((size,), jnp.nan, jnp.float32) for _ in range(4)])
