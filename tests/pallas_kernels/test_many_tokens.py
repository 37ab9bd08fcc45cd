# SPDX-License-Identifier: Apache-2.0
"""The kernel for many tokens, interpreted, against float64; what it refuses."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import many_tokens, row_blocks
from pallas_kernels.many_tokens import Config
from pallas_kernels.many_tokens.stream import Stream
from pallas_kernels.product import Product
from pallas_kernels.quantized_matmul import plain_codes, quantized_matmul, tiled_codes

# The interpreter is numpy; that kernels agree with their definition in jnp, which depends on jax,
# test_quantized_matmul and test_kernel_layout ask of every version.
pytestmark = pytest.mark.one_version

E4M3 = "float8_e4m3fn"

# Tokens, inputs, outputs and how they are cut: odd numbers of tokens, outputs that do not fill a block,
# one step and fewer steps than stages, two blocks of tokens, slices, steps that span two groups and more.
CASES = {
    "plain": (40, 256, 64, Config(rows=1, tokens=64)),
    "one token, two fragments": (1, 256, 144, Config(rows=1, fragments=2, tokens=8, stages=3)),
    "two rows, two blocks of tokens": (70, 256, 272, Config(rows=2, tokens=48)),
    "slices and a span": (9, 512, 80, Config(rows=1, slices=2, tokens=32, span=2, stages=3)),
    "all at once": (33, 512, 272, Config(rows=2, slices=2, fragments=2, tokens=32, stages=3)),
    "a loader": (33, 640, 272, Config(rows=2, fragments=2, tokens=32, stages=3, loader=True)),
    "parts and slices": (33, 1024, 80, Config(rows=1, slices=2, tokens=32, parts=4)),
    "parts, a loader": (33, 512, 272, Config(rows=2, tokens=32, stages=3, loader=True, parts=2)),
    "parts by turns": (20, 768, 272, Config(rows=2, tokens=16, stages=3, resident=5, parts=3)),
    "a loader for three": (9, 256, 272, Config(rows=3, tokens=16, span=2, stages=3, loader=True)),
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


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case[3].parts == 1])
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


# One step, two, an even and an odd number of them; tiles by turns; two fragments; slices.
GROUP_CASES = {
    "one step": (5, 128, 64, Config(rows=1, tokens=16, stages=3)),
    "two steps, two blocks": (40, 256, 272, Config(rows=2, tokens=32)),
    "three steps, two fragments": (9, 384, 144, Config(rows=1, fragments=2, tokens=16, stages=3)),
    "parts by turns": (20, 768, 272, Config(rows=2, tokens=16, stages=3, resident=5, parts=3)),
    "slices": (33, 1024, 80, Config(rows=1, slices=2, tokens=32)),
    "by turns": (70, 640, 336, Config(rows=2, tokens=16, resident=3)),
    "by turns, even": (20, 512, 144, Config(rows=1, tokens=8, stages=3, resident=2)),
    "a loader": (33, 640, 272, Config(rows=2, tokens=16, resident=2, loader=True)),
}


@pytest.mark.parametrize("case", GROUP_CASES)
@pytest.mark.parametrize("scales", ["blocks", "bfloat16", "float16"])
def test_sums_of_groups_against_float64(rng, byte_tokens, case, scales):
    m, k, n, config = GROUP_CASES[case]
    if scales == "blocks":
        o = byte_tokens(rng, m, k, n, weights=E4M3, by_block=True)
    else:
        o = byte_tokens(rng, m, k, n, weights="int4", tokens=E4M3, group=128, scale_dtype=scales)
    wide = multiplied(o, config)
    assert o.relative_error(wide) < 2e-6
    y = multiplied(o, config, out_dtype="bfloat16")
    np.testing.assert_array_equal(y, wide.astype("bfloat16"))


def test_a_stage_that_is_freed_before_it_was_read_is_noticed(rng, byte_tokens, monkeypatch):
    leave = Stream.leave

    def too_early(self, step, where=None):
        leave(self, step, where)
        self.machine.shared_load(self.place(step) + self.codes_place(0))

    monkeypatch.setattr(Stream, "leave", too_early)
    m, k, n, config = GROUP_CASES["by turns"]
    o = byte_tokens(rng, m, k, n, weights=E4M3, by_block=True)
    with pytest.raises(ValueError, match="a copy begins to where threads may still be loading"):
        multiplied(o, config)


@pytest.mark.parametrize("case", CASES)
def test_int4_with_e4m3_tokens_against_float64(rng, byte_tokens, case):
    m, k, n, config = CASES[case]
    o = byte_tokens(rng, m, k, n, weights="int4", tokens=E4M3, one_scale=n == 272)
    assert o.relative_error(multiplied(o, config)) < 2e-6


@pytest.mark.parametrize("loader", [False, True])
@pytest.mark.parametrize("resident", [1, 3, 100])
@pytest.mark.parametrize("out", ["bfloat16", "float32"])
def test_blocks_that_take_tiles_by_turns(rng, half_tokens, byte_tokens, resident, out, loader):
    config = Config(rows=2, tokens=24, stages=3, resident=resident, loader=loader)
    for o in (
        half_tokens(rng, 70, 256, 336, weights="int4", half="bfloat16", group=64, asymmetric=True),
        half_tokens(rng, 70, 256, 336, weights="int8", half="float16", group=None, asymmetric=True),
        byte_tokens(rng, 70, 256, 336, weights="int8"),
    ):
        once = multiplied(o, dataclasses.replace(config, resident=None), out_dtype=out)
        np.testing.assert_array_equal(multiplied(o, config, out_dtype=out), once)


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


SUMS = {"weights": E4M3, "tokens": E4M3, "group_size": 128}


@pytest.mark.parametrize(
    ("product", "config", "message"),
    [
        ({}, {"slices": 3}, "4 times 64 inputs are not divisible by .* config.slices=3 x config.span=1"),
        ({"tokens": "int8"}, {"span": 4}, "2 times 128 inputs are not divisible by .* config.span=4"),
        ({}, {"stages": 2}, "config.stages=2 must be at least 3"),
        ({}, {"tokens": 20}, "config.tokens=20 must be a multiple of 8 x config.slices=1, and at most 256"),
        ({}, {"tokens": 40, "slices": 2}, "config.tokens=40 must be a multiple of 8 x config.slices=2"),
        ({}, {"tokens": 264}, "config.tokens=264 must be a multiple of 8 x config.slices=1, and at most 256"),
        ({}, {"rows": 5, "fragments": 2}, "640 outputs of a tile are more than 512"),
        ({}, {"slices": 2, "resident": 9}, "config.slices=2 must be 1 where config.resident=9 blocks"),
        ({"tokens": "int8"}, {"tokens": 40}, "config.tokens=40 of int8 must be a multiple of 16 beyond 32"),
        ({"k": 384, "group_size": 128}, {"span": 3}, "steps of 192 inputs straddle groups of 128"),
        (SUMS, {"tokens": 136}, "config.tokens=136 must be 1 and at most 128 where the sums of groups"),
        (SUMS, {"span": 2}, "config.span=2 and config.tokens=128 must be 1 and at most 128"),
        ({}, {"rows": 3, "slices": 4}, "config.rows=3 x config.slices=4 warpgroups are more than 1024"),
        ({}, {"parts": 3}, "4 times 64 inputs are not divisible by config.parts=3 x"),
        ({"tokens": "int8"}, {"parts": 2}, "config.parts=2 must be 1 where sums are int32"),
        ({"m": 2**22}, {"parts": 2}, "2 parts of 4194304 x 512 results are more than 4294967295"),
        ({}, {"loader": True}, "config.rows=1 must be 2 or 3 and config.slices=1 1 where a loader"),
        ({}, {"rows": 2, "slices": 2, "loader": True}, "config.rows=2 must be 2 or 3 and config.slices=2 1"),
        ({}, {"rows": 2, "slices": 2, "tokens": 256}, "needs more than 232448 bytes of shared memory"),
    ],
)  # fmt: skip
def test_configurations_that_do_not_fit(product, config, message):
    product = Product(**{"m": 64, "k": 256, "n": 512, "group_size": None} | product)
    many_tokens.check(product, Config(rows=2))
    with pytest.raises(ValueError, match=message):
        many_tokens.check(product, Config(**{"rows": 1} | config))
