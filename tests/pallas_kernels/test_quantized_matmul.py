# SPDX-License-Identifier: Apache-2.0
"""What surrounds the kernels: layouts there and back, and arguments that are refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import few_tokens, many_tokens, row_blocks
from pallas_kernels.product import why_not
from pallas_kernels.quantized_matmul import (
    pack_zeros,
    plain_codes,
    quantized_matmul,
    quantized_matmul_reference,
    tiled_codes,
    unpack_zeros,
)

E4M3 = "float8_e4m3fn"


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
@pytest.mark.parametrize(("weights", "limit"), [("int4", 8), ("int8", 128)])
def test_zeros_round_trip(half, weights, limit):
    zero = np.resize(np.arange(-limit, limit), (8, 32)).astype(np.int8)
    words = pack_zeros(jnp.asarray(zero), half, weights)
    np.testing.assert_array_equal(unpack_zeros(words, half, weights), zero)


@pytest.mark.parametrize("weights", ["int4", "int8", E4M3])
def test_codes_round_trip(rng, weights):
    limits = (-8, 8) if weights == "int4" else (-128, 128)
    codes = rng.integers(*limits, (128, 48)).astype(np.int8)
    codes = codes.view(jnp.float8_e4m3fn) if weights == E4M3 else codes
    back = plain_codes(tiled_codes(jnp.asarray(codes), weights), weights)
    np.testing.assert_array_equal(np.asarray(back).view(np.uint8), codes.view(np.uint8))


@pytest.mark.parametrize(
    ("shape", "choices", "message"),
    [
        ((2, 192, 32), {}, "k=192 must be divisible by 128"),
        ((2, 256, 24), {}, "n=24 must be divisible by 16"),
        ((0, 256, 32), {}, "there are no tokens, inputs or outputs: m=0, k=256, n=32"),
        ((1, 256, 0), {}, "n=0"),
        ((2**20, 256, 4096), {}, "1048576 x 4096 results are more than 4294967295"),
        ((1, 256, 32), {"group_size": 16}, "group_size=16 must be one of (32, 64, 128)"),
        ((1, 256, 32), {"tokens": "float32"}, "tokens are float32, must be bfloat16 or float16"),
        ((1, 256, 32), {"tokens": "int4"}, "or int8 or float8_e4m3fn for int4 weights"),
        ((1, 256, 32), {"weights": "int8", "tokens": E4M3}, "or int8 for int8 weights"),
        ((1, 256, 32), {"tokens": "int8"}, "group_size=128 must be None"),
        (
            (1, 256, 32),
            {"tokens": E4M3, "group_size": 64},
            "group_size=64 must be one of (128,), or a scale a channel, with float8_e4m3fn tokens and int4",
        ),
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
    assert why_not(1, 256, 32, **usual) is None
    assert message in why_not(*shape, **usual | choices)


def test_arguments_that_do_not_go_together(rng, half_tokens, byte_tokens):
    o = half_tokens(rng, 2, 256, 32, weights="int4", half="bfloat16", group=128)
    x, codes, scale = o.args

    def refused(message, *args, **options):
        with pytest.raises(ValueError, match=message):
            quantized_matmul(*args, **{"weights": "int4", "interpret": True} | options)

    refused("does not fit weights of 256 inputs", x[:, :128], codes, scale)
    refused("tokens are float32", x.astype(jnp.float32), codes, scale)
    refused("are no row blocks of int8", x, codes, scale, weights="int8")
    refused("2 chunks of 128", *o.args, config=few_tokens.Config(rows=1, slices=4))
    refused("1024 threads", *o.args, config=few_tokens.Config(rows=40, slices=1))
    refused(r"bias is bfloat16\(16,\), must be floats of \(32,\)", *o.args, bias=x[0, :16])
    refused("out_dtype is int8", *o.args, out_dtype=jnp.int8)
    refused("bfloat16 tokens need no token_scale", x, codes, scale[0, 0], token_scale=jnp.ones(2))
    plain = jnp.ones((2, 32), jnp.bfloat16)
    refused(r"scale is bfloat16\(2, 32\), must be pairs: uint32\(2, 2, 8\)", x, codes, plain)
    refused(r"scale is bfloat16\(32,\), must be pairs", x, codes, plain[0])
    refused(r"scale is uint32\(1, 2, 8\), must be pairs", x, codes, scale[:1])
    refused(r"zero is uint32\(1, 2, 8\), must be pairs", x, codes, scale, scale[:1])
    stacked = codes[None], scale[None]
    refused("layer=1 of 1 layers, counted from 0", x, *stacked, layer=jnp.int32(1))
    refused("layer=-1 of 1 layers", x, *stacked, layer=jnp.int32(-1))
    uneven = codes[None], jnp.stack([scale, scale])
    refused(r"are of \[1, 2\] layers, must be of as many", x, *uneven, layer=jnp.int32(0))
    e = byte_tokens(rng, 2, 256, 32, weights="int8")
    x, codes, scale = e.args
    refused(r"scale is float32\(31,\), must be", x, codes, scale[:31], **e.options)
    wrong = e.options | {"token_scale": jnp.ones(2, jnp.bfloat16)}
    refused("token_scale is bfloat16", *e.args, **wrong)
    pairs = row_blocks.tile_pairs(jnp.ones((1, 32), jnp.bfloat16))
    refused("int8 tokens need a token_scale", x, codes, pairs, weights="int8")
    pairs = row_blocks.tile_pairs(jnp.ones((2, 32), jnp.bfloat16))
    o = byte_tokens(rng, 2, 256, 32, weights="int4", tokens=E4M3, group=128)
    x, codes, _ = o.args
    refused("scale is bfloat16", x, codes, pairs.astype(jnp.bfloat16), **o.options)
    refused(r"scale is uint32\(1, 2, 8\), must be pairs", x, codes, pairs[:1], **o.options)


@pytest.mark.parametrize("kernel", [few_tokens, many_tokens], ids=["few", "many"])
@pytest.mark.parametrize("kind", ["half", "channel", "one scale", "blocks", "groups"])
def test_a_layer_of_stacked_weights(rng, half_tokens, byte_tokens, kernel, kind):
    def layer():
        if kind == "half":
            return half_tokens(
                rng, 5, 256, 144, weights="int4", half="bfloat16", group=64, asymmetric=True
            )
        if kind == "groups":
            return byte_tokens(rng, 5, 256, 144, weights="int4", tokens=E4M3, group=128)
        by_block, one_scale = kind == "blocks", kind == "one scale"
        return byte_tokens(rng, 5, 256, 144, weights=E4M3, by_block=by_block, one_scale=one_scale)

    layers = [layer() for _ in range(3)]
    stacked = [jnp.stack(parts) for parts in zip(*(o.args[1:] for o in layers), strict=True)]
    config = {
        few_tokens: few_tokens.Config(rows=2, slices=2),
        many_tokens: many_tokens.Config(rows=1, tokens=16, stages=3),
    }[kernel]
    x, options = layers[0].args[0], layers[0].options | {"out_dtype": jnp.float32}
    for i, o in enumerate(layers):
        view = {"layer": jnp.int32(i)} | options
        y = quantized_matmul(x, *stacked, **view, config=config, interpret=True)
        alone = quantized_matmul(x, *o.args[1:], **options, config=config, interpret=True)
        np.testing.assert_array_equal(y, alone)
        expected = quantized_matmul_reference(x, *stacked, **view)
        np.testing.assert_array_equal(
            expected, quantized_matmul_reference(x, *o.args[1:], **options)
        )
        # Many tokens round the scales of groups into each weight.
        np.testing.assert_allclose(y, expected, rtol=0.01, atol=0.01 * np.abs(expected).max())
