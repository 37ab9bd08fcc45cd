# SPDX-License-Identifier: Apache-2.0
"""The kernel for few tokens, interpreted, against its definition and float64; its table; its refusals."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import few_tokens as kernel
from pallas_kernels import few_tokens_product as products
from pallas_kernels import row_blocks
from pallas_kernels.few_tokens_product import Config, Product

E4M3 = "float8_e4m3fn"

# Tokens, inputs, outputs and how they are cut: odd numbers of tokens, outputs that do not fill a block,
# idle warps, several slices, chunks on their way, two blocks of tokens.
CASES = {
    "one token": (1, 256, 48, Config(rows=2, slices=2)),
    "five, two row blocks a warp": (5, 512, 64, Config(rows=1, slices=2, blocks=2, depth=2)),
    "seventeen, idle warps": (17, 384, 80, Config(rows=3, slices=1)),
    "thirty-five, two blocks of tokens": (35, 256, 32, Config(rows=1, slices=1, blocks=2, depth=2)),
    "one chunk": (3, 128, 16, Config(rows=1, slices=1)),
    "nine, outputs of two 128-blocks": (9, 256, 144, Config(rows=3, slices=1, blocks=2)),
}
KINDS = [("int4", False), ("int4", True), ("int8", False), ("int8", True), (E4M3, False)]


@pytest.mark.parametrize("case", [case for case in CASES if "128" not in case])
@pytest.mark.parametrize("group", [32, 64, 128, None])
@pytest.mark.parametrize(("weights", "asymmetric"), KINDS)
@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_half_tokens_against_float64(rng, half_tokens, case, group, weights, asymmetric, half):
    m, k, n, config = CASES[case]
    o = half_tokens(rng, m, k, n, weights=weights, half=half, group=group, asymmetric=asymmetric)
    check(o, config, half if case == "one chunk" else None)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("by_block", [False, True])
@pytest.mark.parametrize("one_scale", [False, True])
def test_e4m3_tokens_against_float64(rng, byte_tokens, case, by_block, one_scale):
    m, k, n, config = CASES[case]
    o = byte_tokens(rng, m, k, n, weights=E4M3, by_block=by_block, one_scale=one_scale)
    check(o, config, "bfloat16")


@pytest.mark.parametrize("case", CASES)
def test_e4m3_tokens_and_int4_weights(rng, byte_tokens, case):
    m, k, n, config = CASES[case]
    check(byte_tokens(rng, m, k, n, weights="int4", tokens=E4M3), config, "bfloat16")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("one_scale", [False, True])
def test_int8_tokens_are_multiplied_exactly(rng, byte_tokens, case, weights, one_scale):
    m, k, n, config = CASES[case]
    o = byte_tokens(rng, m, k, n, weights=weights, tokens="int8", one_scale=one_scale)
    check(o, config, "float16")
    x, codes, _ = o.args
    ones = {"token_scale": jnp.ones(1), "weights": weights, "config": config, "interpret": True}
    whole = np.asarray(x, np.int64) @ np.asarray(kernel.plain_codes(codes, weights), np.int64)
    y = kernel.few_tokens(x, codes, jnp.ones(1), **ones)
    np.testing.assert_array_equal(y, whole.astype(np.float32))


def check(o, config, narrow) -> None:
    """float32 result and definition against float64, the result in a narrow dtype against float32's."""
    options = o.options | {"config": config, "interpret": True}
    wide = kernel.few_tokens(*o.args, **options, out_dtype=jnp.float32)
    assert o.relative_error(wide) < 2e-6  # float32 sums
    reference = kernel.few_tokens_reference(*o.args, **o.options, out_dtype=jnp.float32)
    assert o.relative_error(reference) < 2e-6
    if narrow:
        y = kernel.few_tokens(*o.args, **options, out_dtype=narrow)
        assert y.dtype == narrow
        # One rounding more than the float32 result.
        np.testing.assert_array_equal(y, wide.astype(narrow))


@pytest.mark.parametrize("bias_dtype", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("residual_dtype", [None, "float32", "float16"])
@pytest.mark.parametrize("kind", ["half", "int8", "blocks"])
def test_bias_and_residual_are_added_before_the_rounding(
    rng, half_tokens, byte_tokens, bias_dtype, residual_dtype, kind
):
    m, k, n, config = CASES["seventeen, idle warps"]
    if kind == "half":
        o = half_tokens(rng, m, k, n, weights="int4", half="bfloat16", group=64)
    else:
        by_block = kind == "blocks"
        o = byte_tokens(rng, m, k, n, weights=E4M3 if by_block else "int8", by_block=by_block)
    extra = {
        name: jnp.asarray(10 * rng.standard_normal(shape), dtype)
        for name, shape, dtype in (("bias", (n,), bias_dtype), ("residual", (m, n), residual_dtype))
        if dtype
    }
    check(dataclasses.replace(o, options=o.options | extra), config, "bfloat16")


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
@pytest.mark.parametrize("weights", ["int8", E4M3])
def test_every_code_is_converted_exactly(weights, half):
    """One token with a single one: the result is a row of the weight."""
    bits = np.arange(256, dtype=np.uint8).reshape(16, 16)
    if weights == E4M3:
        bits = np.where(bits & 127 == 127, 0, bits).astype(np.uint8)
    codes = np.zeros((128, 16), np.uint8)
    codes[40:56] = bits
    dense = jnp.asarray(codes.view(jnp.dtype(weights)))
    x = jnp.zeros((16, 128), half).at[jnp.arange(16), 40 + jnp.arange(16)].set(1)
    y = kernel.few_tokens(
        x, kernel.tiled_codes(dense, weights), row_blocks.tile_pairs(jnp.ones((1, 16), half)),
        weights=weights, config=Config(rows=1, slices=1), interpret=True, out_dtype=jnp.float32,
    )  # fmt: skip
    np.testing.assert_array_equal(y, np.asarray(dense[40:56], np.float32))


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
@pytest.mark.parametrize(("weights", "limit"), [("int4", 8), ("int8", 128)])
def test_zeros_round_trip(half, weights, limit):
    zero = np.resize(np.arange(-limit, limit), (8, 32)).astype(np.int8)
    words = kernel.pack_zeros(jnp.asarray(zero), half, weights)
    np.testing.assert_array_equal(kernel.unpack_zeros(words, half, weights), zero)


@pytest.mark.parametrize("weights", ["int4", "int8", E4M3])
def test_codes_round_trip(rng, weights):
    limits = (-8, 8) if weights == "int4" else (-128, 128)
    codes = rng.integers(*limits, (128, 48)).astype(np.int8)
    codes = codes.view(jnp.float8_e4m3fn) if weights == E4M3 else codes
    back = kernel.plain_codes(kernel.tiled_codes(jnp.asarray(codes), weights), weights)
    np.testing.assert_array_equal(np.asarray(back).view(np.uint8), codes.view(np.uint8))


@pytest.mark.parametrize(
    ("shape", "choices", "message"),
    [
        ((2, 192, 32), {}, "k=192 must be divisible by 128"),
        ((2, 256, 24), {}, "n=24 must be divisible by 16"),
        ((0, 256, 32), {}, "there are no tokens, inputs or outputs: m=0, k=256, n=32"),
        ((1, 256, 0), {}, "n=0"),
        ((1, 256, 32), {"group_size": 16}, "group_size=16 must be one of (32, 64, 128)"),
        ((1, 256, 32), {"tokens": "float32"}, "tokens are float32, must be bfloat16 or float16"),
        ((1, 256, 32), {"tokens": "int4"}, "or int8 or float8_e4m3fn for int4 weights"),
        ((1, 256, 32), {"weights": "int8", "tokens": E4M3}, "or int8 for int8 weights"),
        ((1, 256, 32), {"tokens": "int8"}, "group_size=128 must be None"),
        ((1, 256, 32), {"tokens": E4M3}, "with float8_e4m3fn tokens and int4 weights"),
        (
            (1, 2**17, 32),
            {"tokens": "int8", "group_size": None},
            "k=131072 must be below 131072, or the sum of products may not fit an int32",
        ),
        ((1, 256, 32), {"weights": "float8_e5m2"}, "weights are float8_e5m2, must be one of"),
        ((1, 256, 32), {"weights": "int8", "tokens": "int8"}, "group_size=128 must be None"),
        (
            (1, 256, 32),
            {"weights": E4M3, "tokens": E4M3, "group_size": 64},
            "group_size=64 must be one of (128,)",
        ),
        ((1, 256, 32), {"weights": E4M3, "has_zeros": True}, "zeros go with integer weights"),
        (
            (1, 256, 32),
            {"weights": "int8", "tokens": "int8", "group_size": None, "has_zeros": True},
            "zeros go with integer weights and 16-bit tokens",
        ),
    ],
)
def test_products_that_it_cannot_take(shape, choices, message):
    usual = {"weights": "int4", "tokens": "bfloat16", "group_size": 128, "has_zeros": False}
    assert kernel.why_not(1, 256, 32, **usual) is None
    assert message in kernel.why_not(*shape, **usual | choices)


def test_arguments_that_do_not_go_together(rng, half_tokens, byte_tokens):
    o = half_tokens(rng, 2, 256, 32, weights="int4", half="bfloat16", group=128)
    x, codes, scale = o.args

    def refused(message, *args, **options):
        with pytest.raises(ValueError, match=message):
            kernel.few_tokens(*args, **{"weights": "int4", "interpret": True} | options)

    refused("does not fit weights of 256 inputs", x[:, :128], codes, scale)
    refused("tokens are float32", x.astype(jnp.float32), codes, scale)
    refused("are no row blocks of int8", x, codes, scale, weights="int8")
    refused("2 chunks of 128", *o.args, config=Config(rows=1, slices=4))
    refused("1024 threads", *o.args, config=Config(rows=40, slices=1))
    refused(r"bias is bfloat16\(16,\), must be floats of \(32,\)", *o.args, bias=x[0, :16])
    refused("out_dtype is int8", *o.args, out_dtype=jnp.int8)
    refused("bfloat16 tokens need no token_scale", x, codes, scale[0, 0], token_scale=jnp.ones(2))
    e = byte_tokens(rng, 2, 256, 32, weights="int8")
    x, codes, scale = e.args
    refused(r"scale is float32\(31,\), must be", x, codes, scale[:31], **e.options)
    wrong = e.options | {"token_scale": jnp.ones(2, jnp.bfloat16)}
    refused("token_scale is bfloat16", *e.args, **wrong)
    pairs = row_blocks.tile_pairs(jnp.ones((1, 32), jnp.bfloat16))
    refused("int8 tokens need a token_scale", x, codes, pairs, weights="int8")


@pytest.mark.parametrize("m", [1, 3, 8, 16, 17, 33, 64, 100])
@pytest.mark.parametrize("k", [128, 4096, 5120, 11008, 14336])
@pytest.mark.parametrize("n", [16, 1024, 4096, 6144, 28672, 151936])
def test_every_product_finds_a_configuration_that_fits(m, k, n):
    for weights, tokens in (("int4", "bfloat16"), ("int8", "int8"), (E4M3, "float16")):
        product = Product(m=m, k=k, n=n, group_size=None, weights=weights, tokens=tokens)
        for config in (
            products.default_config(product),
            products.config_for(product, "NVIDIA H200"),
        ):
            products.check(product, config)


def test_the_table_names_configurations_that_fit():
    for device, entries in products.tuned().items():
        for entry in entries:
            product, config = products.product_of(entry), Config(**entry["config"])
            products.check(product, config)
            assert products.config_for(product, device) == config
