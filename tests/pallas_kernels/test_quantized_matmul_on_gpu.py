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
    ("weights", "tokens", "scales"),
    [
        ("int4", "int8", {}),
        ("int8", "int8", {}),
        ("int4", E4M3, {}),
        ("int4", E4M3, {"group": 128}),
        (E4M3, E4M3, {}),
        (E4M3, E4M3, {"by_block": True}),
    ],
)
def test_byte_tokens(fresh, kernel, byte_tokens, k, n, weights, tokens, scales):
    o = byte_tokens(fresh, max(TOKENS), k, n, weights=weights, tokens=tokens, **scales)
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
        (1000, many_tokens.Config(rows=2, fragments=2, tokens=128, loader=True)),
        (100, many_tokens.Config(rows=3, tokens=64, span=2, stages=3, loader=True)),
    ],
)
@pytest.mark.parametrize("weights", ["int4", "int8", E4M3])
def test_cuts_of_many_tokens(fresh, half_tokens, m, config, weights):
    o = half_tokens(fresh, m, 4096, 1040, weights=weights, half="bfloat16", group=64)
    run(fresh, many_tokens, o, config)


@pytest.mark.parametrize(
    ("m", "config"),
    [
        (300, many_tokens.Config(rows=2, tokens=64, resident=132)),
        (1000, many_tokens.Config(rows=2, tokens=128, resident=5)),
        (5000, many_tokens.Config(rows=2, tokens=256, resident=132)),
        (5000, many_tokens.Config(rows=2, tokens=256, resident=132, loader=True)),
        (300, many_tokens.Config(rows=3, tokens=64, resident=5, loader=True)),
    ],
)
@pytest.mark.parametrize("out", ["bfloat16", "float32"])
@pytest.mark.parametrize("weights", ["int4", "int8", E4M3])
def test_blocks_that_take_tiles_by_turns(fresh, half_tokens, m, config, out, weights):
    o = half_tokens(fresh, m, 4096, 1040, weights=weights, half="bfloat16", group=64)
    run(fresh, many_tokens, o, config, out)


@pytest.mark.parametrize("out", ["bfloat16", "float32"])
@pytest.mark.parametrize("m", [300, 1000])
@pytest.mark.parametrize("loader", [False, True])
def test_sums_of_groups_by_turns(fresh, byte_tokens, out, m, loader):
    config = many_tokens.Config(rows=2, tokens=128, resident=7, loader=loader)
    blocks = byte_tokens(fresh, m, 4096, 1040, weights=E4M3, by_block=True)
    groups = byte_tokens(fresh, m, 4096, 1040, weights="int4", tokens=E4M3, group=128)
    run(fresh, many_tokens, blocks, config, out)
    run(fresh, many_tokens, groups, config, out)


@pytest.mark.parametrize("kernel", KERNELS, ids=["few", "many"])
@pytest.mark.parametrize("kind", ["half", "channel", "blocks", "groups"])
def test_a_layer_of_stacked_weights_is_read_in_its_place(
    fresh, kernel, half_tokens, byte_tokens, kind
):
    def layer():
        if kind == "half":
            return half_tokens(
                fresh, 33, 1024, 528, weights="int4", half="bfloat16", group=64, asymmetric=True
            )
        if kind == "groups":
            return byte_tokens(fresh, 33, 1024, 528, weights="int4", tokens=E4M3, group=128)
        return byte_tokens(fresh, 33, 1024, 528, weights=E4M3, by_block=kind == "blocks")

    layers = [layer() for _ in range(3)]
    (x, *_), options = layers[0].args, layers[0].options
    stacked = [jnp.stack(parts) for parts in zip(*(o.args[1:] for o in layers), strict=True)]
    config = kernel.default_config(product_of(layers[0], "float32"))

    @jax.jit
    def multiply(layer):
        return quantized_matmul(
            x, *stacked, **options, layer=layer, config=config, out_dtype=jnp.float32
        )

    for i, o in enumerate(layers):
        alone = quantized_matmul(x, *o.args[1:], **options, config=config, out_dtype=jnp.float32)
        np.testing.assert_array_equal(multiply(i), alone)


def product_of(o, out) -> Product:
    weights, (x, codes, scale, *_) = o.options["weights"], o.args
    (m, k), n = x.shape, codes.shape[0] * 16
    half = x.dtype.itemsize == 2
    in_pairs = scale.ndim == 3 and not (half and scale.shape[1] == 1)
    group = k // scale.shape[1] if in_pairs else 128 if scale.ndim == 2 else None
    return Product(
        m=m, k=k, n=n, group_size=group, weights=weights, tokens=str(x.dtype),
        has_zeros=len(o.args) == 4, out=out,
    )  # fmt: skip


def run(rng, kernel, o, config=None, out="float32") -> None:
    arrays = {name: value for name, value in o.options.items() if name != "weights"}
    product = product_of(o, out)
    m, n = product.m, product.n
    config = config or kernel.default_config(product)
    static = {name: arrays.pop(name) for name in ("scale_dtype",) if name in arrays}

    @jax.jit
    def multiply(args, arrays):
        return quantized_matmul(
            *args, **arrays, **static, weights=product.weights, config=config, out_dtype=out
        )

    poison(m * n)
    first = np.asarray(multiply(o.args, arrays), np.float32)
    poison(m * n)
    assert np.array_equal(first, np.asarray(multiply(o.args, arrays), np.float32))
    assert np.isfinite(first).all()
    columns = np.unique(np.r_[0:16, n - 16 : n, rng.integers(0, n, 64)])  # checked in float64
    rounding = {"float32": 0.0, "bfloat16": 2**-9}[out]
    if kernel is many_tokens and product.tokens == E4M3:
        # Hopper adds up products of 8-bit floats with about 14 bits: DeepSeek-V3 Technical Report, 3.3.2.
        limit = 2**-9 if product.has_group_sums else 2**-8
        assert o.relative_error(first, columns) < limit + rounding
        return
    # The sums of tensor cores are float32 that are cut off, not rounded; beside that many tokens have the
    # scales of groups rounded into each weight.
    grouped = product.has_half_tokens and product.group_size is not None
    rounded = product.half if kernel is many_tokens and grouped else None
    limit = 2**-15 if kernel is many_tokens else 2**-18
    assert o.relative_error(first, columns, rounded) < limit + rounding


def poison(size: int) -> None:
    """Fills the memory that the next result will get with NaN."""
    jax.block_until_ready([jnp.full((size,), jnp.nan, jnp.float32) for _ in range(4)])
