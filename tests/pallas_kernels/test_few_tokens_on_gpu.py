# SPDX-License-Identifier: Apache-2.0
"""The kernel for few tokens on the GPU: fresh random operands, against float64, again and again the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import device
from pallas_kernels.few_tokens import few_tokens, plain_codes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not device.is_hopper(), reason="needs a Hopper GPU"),
]
E4M3 = "float8_e4m3fn"
SHAPES = [(4096, 6144), (4096, 28672), (14336, 4096), (8192, 8192), (128, 16), (5120, 1040)]
TOKENS = [1, 3, 17, 64, 100]


@pytest.fixture
def fresh() -> np.random.Generator:
    return np.random.default_rng()


@pytest.mark.parametrize(("k", "n"), SHAPES)
@pytest.mark.parametrize("weights", ["int4", "int8", E4M3])
@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_half_tokens(fresh, half_tokens, k, n, weights, half):
    o = half_tokens(fresh, max(TOKENS), k, n, weights=weights, half=half, group=128)
    for m in TOKENS:
        run(fresh, o.of_tokens(m))


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
def test_byte_tokens(fresh, byte_tokens, k, n, weights, tokens, by_block):
    o = byte_tokens(fresh, max(TOKENS), k, n, weights=weights, tokens=tokens, by_block=by_block)
    for m in TOKENS:
        run(fresh, o.of_tokens(m))


@pytest.mark.parametrize("group", [32, 64, 128, None])
@pytest.mark.parametrize("half", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("weights", "asymmetric"),
    [("int4", False), ("int4", True), ("int8", False), ("int8", True), (E4M3, False)],
)
@pytest.mark.parametrize("m", [1, 17])
def test_variants(fresh, half_tokens, group, half, weights, asymmetric, m):
    run(
        fresh,
        half_tokens(
            fresh, m, 2048, 1024, weights=weights, half=half, group=group, asymmetric=asymmetric
        ),
    )


@pytest.mark.parametrize("m", [1, 17])
@pytest.mark.parametrize("weights", ["int8", E4M3])
def test_one_scale_bias_and_residual(fresh, byte_tokens, weights, m):
    o = byte_tokens(fresh, m, 2048, 1040, weights=weights, one_scale=True)
    extra = {
        "bias": jnp.asarray(fresh.standard_normal(1040), jnp.bfloat16),
        "residual": jnp.asarray(fresh.standard_normal((m, 1040)), jnp.bfloat16),
    }
    run(fresh, dataclasses.replace(o, options=o.options | extra))


@pytest.mark.parametrize("m", [1, 64])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_integers_are_multiplied_exactly(fresh, byte_tokens, m, weights):
    x, codes, _ = byte_tokens(fresh, m, 8192, 1024, weights=weights, tokens="int8").args
    whole = np.asarray(x, np.float64) @ np.asarray(plain_codes(codes, weights), np.float64)
    y = few_tokens(x, codes, jnp.ones(1), weights=weights, token_scale=jnp.ones(1))
    np.testing.assert_array_equal(y, whole.astype(np.float32))


def run(rng, o) -> None:
    arrays = {name: value for name, value in o.options.items() if name != "weights"}
    weights = o.options["weights"]
    m, n = o.near_x.shape[0], o.args[1].shape[0] * 16

    @jax.jit
    def product(args, arrays):
        return few_tokens(*args, **arrays, weights=weights, out_dtype=jnp.float32)

    poison(m * n)
    first = np.asarray(product(o.args, arrays))
    poison(m * n)
    assert np.array_equal(first, np.asarray(product(o.args, arrays)))
    assert np.isfinite(first).all()
    columns = np.unique(np.r_[0:16, n - 16 : n, rng.integers(0, n, 64)])  # checked in float64
    assert o.relative_error(first, columns) < 2e-6  # float32 sums of exact products


def poison(size: int) -> None:
    """Fills the memory that the next result will get with NaN."""
    jax.block_until_ready([jnp.full((size,), jnp.nan, jnp.float32) for _ in range(4)])
