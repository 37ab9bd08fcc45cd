# SPDX-License-Identifier: Apache-2.0
"""The kernel for many tokens, interpreted, against float64; what it refuses."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import many_tokens, row_blocks
from pallas_kernels.many_tokens import Config
from pallas_kernels.product import Product
from pallas_kernels.quantized_matmul import plain_codes, quantized_matmul, tiled_codes

E4M3 = "float8_e4m3fn"

# Tokens, inputs, outputs and how they are cut: odd numbers of tokens, outputs that do not fill a block,
# one step and fewer steps than stages, two blocks of tokens, slices, steps that span two groups and more.
CASES = {
    "plain": (40, 256, 64, Config(rows=1, tokens=64)),
    "one token, two fragments": (1, 256, 144, Config(rows=1, fragments=2, tokens=8, stages=3)),
    "two rows, two blocks of tokens": (70, 256, 272, Config(rows=2, tokens=40)),
    "slices and a span": (9, 512, 80, Config(rows=1, slices=2, tokens=32, span=2, stages=3)),
    "all at once": (33, 512, 272, Config(rows=2, slices=2, fragments=2, tokens=32, stages=3)),
}
SMALL = ["one token, two fragments", "slices and a span"]
KINDS = [("int4", False), ("int4", True), ("int8", False), ("int8", True), (E4M3, False)]
# Relative error of a 16-bit float.
EPS = {"bfloat16": 2**-8, "float16": 2**-11}


@pytest.mark.parametrize("case", SMALL)
@pytest.mark.parametrize("group", [32, 64, 128, None])
@pytest.mark.parametrize(("weights", "asymmetric"), KINDS)
@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_half_tokens_against_float64(rng, half_tokens, case, group, weights, asymmetric, half):
    check_half(rng, half_tokens, case, group, weights, asymmetric, half)


@pytest.mark.parametrize("case", [case for case in CASES if case not in SMALL])
@pytest.mark.parametrize(
    ("weights", "group", "asymmetric", "half"),
    [
        ("int4", 32, True, "bfloat16"),
        ("int8", 64, False, "float16"),
        (E4M3, 128, False, "bfloat16"),
        ("int4", None, True, "float16"),
    ],
)
def test_cuts_of_half_tokens(rng, half_tokens, case, group, weights, asymmetric, half):
    check_half(rng, half_tokens, case, group, weights, asymmetric, half)


def check_half(rng, half_tokens, case, group, weights, asymmetric, half) -> None:
    m, k, n, config = CASES[case]
    o = half_tokens(rng, m, k, n, weights=weights, half=half, group=group, asymmetric=asymmetric)
    y = multiplied(o, config, out_dtype=jnp.float32)
    if group is None:
        assert o.relative_error(y) < 2e-6  # float32 sums
        return
    # As if the weights had been dequantized to 16 bits: float32 sums of those.
    assert o.relative_error(y, rounded_to=half) < 2e-6
    assert o.relative_error(y) < EPS[half]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_int8_tokens_are_multiplied_exactly(rng, byte_tokens, case, weights):
    m, k, n, config = CASES[case]
    o = byte_tokens(rng, m, k, n, weights=weights, tokens="int8", one_scale=n == 272)
    assert o.relative_error(multiplied(o, config)) < 2e-6
    x, codes, _ = o.args
    whole = np.asarray(x, np.int64) @ np.asarray(plain_codes(codes, weights), np.int64)
    y = quantized_matmul(
        x, codes, jnp.ones(1), token_scale=jnp.ones(1), weights=weights, config=config, interpret=True
    )  # fmt: skip
    np.testing.assert_array_equal(y, whole.astype(np.float32))


@pytest.mark.parametrize("case", CASES)
def test_e4m3_tokens_against_float64(rng, byte_tokens, case):
    m, k, n, config = CASES[case]
    o = byte_tokens(rng, m, k, n, weights=E4M3, one_scale=n == 272)
    assert o.relative_error(multiplied(o, config)) < 2e-6


@pytest.mark.parametrize("out", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("bias", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("residual", [None, "float32", "float16"])
def test_bias_and_residual_are_added_before_the_rounding(
    rng, half_tokens, byte_tokens, out, bias, residual
):
    m, k, n, config = 3, 256, 144, Config(rows=1, tokens=16)
    extra = {
        name: jnp.asarray(10 * rng.standard_normal(shape), dtype)
        for name, shape, dtype in (("bias", (n,), bias), ("residual", (m, n), residual))
        if dtype
    }
    for o in (
        half_tokens(rng, m, k, n, weights="int4", half="bfloat16", group=None),
        byte_tokens(rng, m, k, n, weights="int8"),
    ):
        o = dataclasses.replace(o, options=o.options | extra)
        wide = multiplied(o, config, out_dtype=jnp.float32)
        assert o.relative_error(wide) < 2e-6
        y = multiplied(o, config, out_dtype=out)
        assert y.dtype == out
        np.testing.assert_array_equal(y, wide.astype(out))


@pytest.mark.parametrize("tokens", ["bfloat16", "float16", "own"])
@pytest.mark.parametrize("weights", ["int8", E4M3])
def test_every_code_is_multiplied_exactly(weights, tokens):
    """Each token is a single one: the result is a row of the weight."""
    bits = np.arange(256, dtype=np.uint8).reshape(16, 16)
    bits = np.where(bits & 127 == 127, 0, bits).astype(np.uint8) if weights == E4M3 else bits
    codes = np.zeros((128, 16), np.uint8)
    codes[40:56] = bits
    dense = jnp.asarray(codes.view(jnp.dtype(weights)))
    own = tokens == "own"
    x = jnp.zeros((16, 128), weights if own else tokens)
    x = x.at[jnp.arange(16), 40 + jnp.arange(16)].set(1)
    scale = jnp.ones(16) if own else row_blocks.tile_pairs(jnp.ones((1, 16), tokens))
    y = quantized_matmul(
        x, tiled_codes(dense, weights), scale, token_scale=jnp.ones(16) if own else None,
        weights=weights, config=Config(rows=1, tokens=16), interpret=True, out_dtype=jnp.float32,
    )  # fmt: skip
    np.testing.assert_array_equal(y, np.asarray(dense[40:56], np.float32))


def multiplied(o, config, **options):
    return quantized_matmul(*o.args, **o.options, config=config, interpret=True, **options)


@pytest.mark.parametrize(
    ("product", "config", "message"),
    [
        ({}, {"slices": 3}, "4 times 64 inputs are not divisible by config.slices=3 x config.span=1"),
        ({"tokens": "int8"}, {"span": 4}, "2 times 128 inputs are not divisible by .* config.span=4"),
        ({}, {"stages": 2}, "config.stages=2 must be at least 3"),
        ({}, {"tokens": 20}, "config.tokens=20 must be a multiple of 8, and at most 256"),
        ({}, {"tokens": 264}, "config.tokens=264 must be a multiple of 8, and at most 256"),
        ({}, {"rows": 5, "fragments": 2}, "640 outputs of a block are more than 512"),
        ({}, {"rows": 3, "slices": 4}, "config.rows=3 x config.slices=4 warpgroups are more than 1024"),
        ({}, {"rows": 2, "slices": 2, "tokens": 256}, "needs more than 232448 bytes of shared memory"),
    ],
)  # fmt: skip
def test_configurations_that_do_not_fit(product, config, message):
    product = Product(**{"m": 64, "k": 256, "n": 512, "group_size": None} | product)
    many_tokens.check(product, Config(rows=2))
    with pytest.raises(ValueError, match=message):
        many_tokens.check(product, Config(**{"rows": 1} | config))


def test_products_that_are_for_few_tokens_only():
    shape = {"m": 64, "k": 256, "n": 512}
    by_block = Product(**shape, group_size=128, weights=E4M3, tokens=E4M3)
    assert "128 x 128 blocks" in str(many_tokens.why_not(by_block))
    mixed = Product(**shape, group_size=None, weights="int4", tokens=E4M3)
    assert "int4 weights with float8_e4m3fn tokens" in str(many_tokens.why_not(mixed))
    for product in (by_block, mixed):
        with pytest.raises(ValueError, match="for few tokens only"):
            many_tokens.check(product, Config(rows=1, tokens=64))
    for weights, tokens in itertools.product(("int4", "int8"), ("bfloat16", "float16", "int8")):
        product = Product(**shape, group_size=None, weights=weights, tokens=tokens)
        assert many_tokens.why_not(product) is None
