# SPDX-License-Identifier: Apache-2.0
"""The int4 kernel: interpreted against its definition, compiled for an H200 where the compiler is there."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import int4_matmul as kernel
from pallas_kernels import row_blocks
from pallas_kernels.int4_matmul import Config, Product

# Tokens, inputs, outputs and how they are cut: odd numbers of tokens, outputs that do not fill a block,
# idle warps, several slices, chunks on their way, two blocks of tokens.
CASES = {
    "one token": (1, 256, 48, Config(rows=2, slices=2)),
    "five, two row blocks a warp": (5, 512, 64, Config(rows=1, slices=2, blocks=2, depth=2)),
    "seventeen, idle warps": (17, 384, 80, Config(rows=3, slices=1)),
    "thirty-five, two blocks of tokens": (35, 256, 32, Config(rows=1, slices=1, blocks=2, depth=2)),
    "one chunk": (3, 128, 16, Config(rows=1, slices=1)),
}


@dataclasses.dataclass(frozen=True)
class Operands:
    x: jax.Array
    words: jax.Array
    scale: jax.Array
    zero: jax.Array | None
    dense: np.ndarray  # float64 [k, n]


def operands(rng, m, k, n, group, half, asymmetric) -> Operands:
    groups = 1 if group is None else k // group
    codes = rng.integers(-8, 8, (k, n)).astype(np.int8)
    scale = jnp.asarray(rng.uniform(0.01, 0.02, (groups, n)), half)
    zero = rng.integers(-8, 8, (groups, n)) if asymmetric else np.zeros((groups, n), int)
    spread = [np.repeat(np.asarray(v, np.float64), k // groups, axis=0) for v in (zero, scale)]
    return Operands(
        x=jnp.asarray(rng.standard_normal((m, k)), half),
        words=row_blocks.tile_codes(jnp.asarray(codes)),
        scale=row_blocks.tile_pairs(scale),
        zero=kernel.pack_zeros(jnp.asarray(zero), half) if asymmetric else None,
        dense=(codes - spread[0]) * spread[1],
    )


def relative_error(y, expected) -> float:
    return float(np.linalg.norm(np.asarray(y, np.float64) - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("group", [32, 64, 128, None])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_interpreted_against_float64(rng, case, group, asymmetric, half):
    m, k, n, config = CASES[case]
    o = operands(rng, m, k, n, group, half, asymmetric)
    expected = np.asarray(o.x, np.float64) @ o.dense
    wide = kernel.int4_matmul(
        o.x, o.words, o.scale, o.zero, config=config, interpret=True, out_dtype=jnp.float32
    )
    assert relative_error(wide, expected) < 2e-6  # float32 sums
    y = kernel.int4_matmul(o.x, o.words, o.scale, o.zero, config=config, interpret=True)
    assert y.dtype == half
    # One rounding more than the float32 result.
    np.testing.assert_array_equal(y, wide.astype(half))
    reference = kernel.int4_matmul_reference(o.x, o.words, o.scale, o.zero)
    assert relative_error(reference, expected) < jnp.finfo(half).eps


def test_zeros_round_trip(rng):
    zero = rng.integers(-8, 8, (4, 32)).astype(np.int8)
    for half in ("bfloat16", "float16"):
        words = kernel.pack_zeros(jnp.asarray(zero), half)
        np.testing.assert_array_equal(kernel.unpack_zeros(words, half), zero)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 192, 32), "k=192 must be divisible by 128"),
        ((2, 256, 24), "n=24 must be divisible by 16"),
        ((0, 256, 32), "no tokens"),
    ],
)
def test_products_that_it_cannot_take(shape, message):
    assert message in kernel.why_not(*shape, 128, "bfloat16")


def test_other_refusals(rng):
    assert "group_size=16 must be one of" in kernel.why_not(1, 256, 32, 16, "bfloat16")
    assert "tokens are float32" in kernel.why_not(1, 256, 32, 64, "float32")
    assert kernel.why_not(1, 256, 32, None, "float16") is None
    o = operands(rng, 2, 256, 32, 128, "bfloat16", False)
    with pytest.raises(ValueError, match="does not fit weights of 256 inputs"):
        kernel.int4_matmul(o.x[:, :128], o.words, o.scale, interpret=True)
    with pytest.raises(ValueError, match="tokens are float32"):
        kernel.int4_matmul(o.x.astype(jnp.float32), o.words, o.scale, interpret=True)
    with pytest.raises(ValueError, match="2 chunks of 128 inputs are not divisible by"):
        kernel.int4_matmul(o.x, o.words, o.scale, config=Config(rows=1, slices=4), interpret=True)
    with pytest.raises(ValueError, match="1024 threads"):
        kernel.int4_matmul(o.x, o.words, o.scale, config=Config(rows=40, slices=1), interpret=True)


@pytest.mark.parametrize("m", [1, 3, 8, 16, 17, 33, 64, 100])
@pytest.mark.parametrize("k", [128, 4096, 5120, 11008, 14336])
@pytest.mark.parametrize("n", [16, 1024, 4096, 6144, 28672, 151936])
def test_every_product_finds_a_configuration_that_fits(m, k, n):
    product = Product(m=m, k=k, n=n, group_size=128, half="bfloat16", has_zeros=False)
    for config in (kernel.default_config(product), kernel.config_for(product, "NVIDIA H200")):
        kernel.check(product, config)


def test_the_table_names_configurations_that_fit():
    table = json.loads((kernel_folder() / "int4_matmul.json").read_text())["devices"]
    for entries in table.values():
        for entry in entries:
            m, k, n = entry["m"], entry["k"], entry["n"]
            product = Product(m=m, k=k, n=n, group_size=128, half="bfloat16", has_zeros=False)
            kernel.check(product, Config(**entry["config"]))
            assert kernel.config_for(product, next(iter(table))) == Config(**entry["config"])


def kernel_folder():
    return __import__("pathlib").Path(kernel.__file__).parent
