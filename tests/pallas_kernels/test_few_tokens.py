# SPDX-License-Identifier: Apache-2.0
"""The kernel for few tokens, interpreted, against its definition and float64."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import row_blocks
from pallas_kernels.few_tokens import Config
from pallas_kernels.few_tokens import check as check_config
from pallas_kernels.product import Product
from pallas_kernels.quantized_matmul import (
    plain_codes,
    quantized_matmul,
    quantized_matmul_reference,
    tiled_codes,
)

# The interpreter is numpy; that kernels agree with their definition in jnp, which depends on jax,
# test_quantized_matmul and test_kernel_layout ask of every version.
pytestmark = pytest.mark.one_version

E4M3 = "float8_e4m3fn"

# Tokens, inputs, outputs and how they are cut: odd numbers of tokens, outputs that do not fill a block,
# idle warps, several slices, chunks on their way, by rounds and moving up, two blocks of tokens.
CASES = {
    "one token": (1, 256, 48, Config(rows=2, slices=2)),
    "five, two row blocks a warp": (5, 512, 64, Config(rows=1, slices=2, blocks=2, depth=2)),
    "seventeen, idle warps": (17, 384, 80, Config(rows=3, slices=1)),
    "thirty-five, two blocks of tokens": (35, 256, 32, Config(rows=1, slices=1, blocks=2, depth=2)),
    "one chunk": (3, 128, 16, Config(rows=1, slices=1)),
    "nine, outputs of two 128-blocks": (9, 256, 144, Config(rows=3, slices=1, blocks=2)),
    "seven, chunks that move up": (7, 640, 48, Config(rows=2, slices=1, depth=3, queue=True)),
}
KINDS = [("int4", False), ("int4", True), ("int8", False), ("int8", True), (E4M3, False)]


@pytest.mark.parametrize("case", ["five, two row blocks a warp"])
@pytest.mark.parametrize("group", [32, 64, 128, None])
@pytest.mark.parametrize(("weights", "asymmetric"), KINDS)
@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_half_tokens_against_float64(rng, half_tokens, case, group, weights, asymmetric, half):
    m, k, n, config = CASES[case]
    o = half_tokens(rng, m, k, n, weights=weights, half=half, group=group, asymmetric=asymmetric)
    check(o, config, None)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("weights", "group", "asymmetric", "half"),
    [
        ("int4", 32, True, "bfloat16"),
        ("int4", 128, False, "float16"),
        ("int8", 64, False, "float16"),
        ("int8", None, True, "bfloat16"),
        (E4M3, 128, False, "bfloat16"),
    ],
)
def test_cuts_of_half_tokens(rng, half_tokens, case, group, weights, asymmetric, half):
    m, k, n, config = CASES[case]
    o = half_tokens(rng, m, k, n, weights=weights, half=half, group=group, asymmetric=asymmetric)
    check(o, config, half if case == "one chunk" else None)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("by_block", "one_scale"), [(False, False), (False, True), (True, False)])
def test_e4m3_tokens_against_float64(rng, byte_tokens, case, by_block, one_scale):
    m, k, n, config = CASES[case]
    o = byte_tokens(rng, m, k, n, weights=E4M3, by_block=by_block, one_scale=one_scale)
    check(o, config, "bfloat16" if case == "one chunk" else None)


@pytest.mark.parametrize("case", CASES)
def test_e4m3_tokens_and_int4_weights(rng, byte_tokens, case):
    m, k, n, config = CASES[case]
    check(byte_tokens(rng, m, k, n, weights="int4", tokens=E4M3), config, None)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("one_scale", [False, True])
def test_int8_tokens_are_multiplied_exactly(rng, byte_tokens, case, weights, one_scale):
    m, k, n, config = CASES[case]
    o = byte_tokens(rng, m, k, n, weights=weights, tokens="int8", one_scale=one_scale)
    check(o, config, "float16")
    x, codes, _ = o.args
    ones = {"token_scale": jnp.ones(1), "weights": weights, "config": config, "interpret": True}
    whole = np.asarray(x, np.int64) @ np.asarray(plain_codes(codes, weights), np.int64)
    y = quantized_matmul(x, codes, jnp.ones(1), **ones)
    np.testing.assert_array_equal(y, whole.astype(np.float32))


def check(o, config, narrow) -> None:
    """float32 result and definition against float64, the result in a narrow dtype against float32's."""
    options = o.options | {"config": config, "interpret": True}
    wide = quantized_matmul(*o.args, **options, out_dtype=jnp.float32)
    assert o.relative_error(wide) < 2e-6  # float32 sums
    reference = quantized_matmul_reference(*o.args, **o.options, out_dtype=jnp.float32)
    assert o.relative_error(reference) < 2e-6
    if narrow:
        y = quantized_matmul(*o.args, **options, out_dtype=narrow)
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
    y = quantized_matmul(
        x, tiled_codes(dense, weights), row_blocks.tile_pairs(jnp.ones((1, 16), half)),
        weights=weights, config=Config(rows=1, slices=1), interpret=True, out_dtype=jnp.float32,
    )  # fmt: skip
    np.testing.assert_array_equal(y, np.asarray(dense[40:56], np.float32))


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (
            {"slices": 3},
            "2 chunks of 128 inputs are not divisible by config.slices=3 x config.depth=1",
        ),
        (
            {"slices": 1, "depth": 4},
            "2 chunks of 128 inputs are not divisible by .* config.depth=4",
        ),
        (
            {"slices": 2, "depth": 2, "queue": True},
            "2 chunks of 128 inputs are fewer than config.slices=2 x config.depth=2",
        ),
        (
            {"rows": 64, "slices": 1},
            "config.rows=64 x config.slices=1 warps are more than 1024 threads",
        ),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(choices, message):
    with pytest.raises(ValueError, match=message):
        check_config(Product(m=1, k=256, n=64, group_size=128), Config(**{"rows": 1} | choices))
