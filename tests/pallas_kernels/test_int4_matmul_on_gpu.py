# SPDX-License-Identifier: Apache-2.0
"""The int4 kernel on the GPU: fresh random operands, against float64, again and again the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import device, row_blocks
from pallas_kernels.int4_matmul import int4_matmul, pack_zeros

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not device.is_hopper(), reason="needs a Hopper GPU"),
]
SHAPES = [(4096, 6144), (4096, 28672), (14336, 4096), (8192, 8192), (128, 16), (5120, 1040)]


@pytest.fixture
def fresh() -> np.random.Generator:
    return np.random.default_rng()


@pytest.mark.parametrize("m", [1, 3, 8, 16, 17, 33, 64, 100])
@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_table_shapes(fresh, m, k, n):
    run(fresh, m, k, n, 128, "bfloat16", asymmetric=False)


@pytest.mark.parametrize("group", [32, 64, 128, None])
@pytest.mark.parametrize("half", ["bfloat16", "float16"])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("m", [1, 17])
def test_variants(fresh, group, half, asymmetric, m):
    run(fresh, m, 2048, 1024, group, half, asymmetric=asymmetric)


def run(rng, m, k, n, group, half, *, asymmetric) -> None:
    groups = 1 if group is None else k // group
    columns = np.unique(np.r_[0:16, n - 16 : n, rng.integers(0, n, 64)])  # checked in float64
    codes = rng.integers(-8, 8, (k, n), dtype=np.int8)
    scale = jnp.asarray(rng.uniform(0.01, 0.02, (groups, n)), half)
    zero = rng.integers(-8, 8, (groups, n)) * asymmetric
    x = jnp.asarray(rng.standard_normal((m, k)), half)
    operands = [x, row_blocks.tile_codes(jnp.asarray(codes)), row_blocks.tile_pairs(scale)]
    if asymmetric:
        operands.append(pack_zeros(jnp.asarray(zero), half))
    product = jax.jit(lambda *operands: int4_matmul(*operands, out_dtype=jnp.float32))
    poison(m * n)
    first = np.asarray(product(*operands))
    poison(m * n)
    assert np.array_equal(first, np.asarray(product(*operands)))
    assert np.isfinite(first).all()
    spread = [
        np.repeat(np.asarray(v, np.float64)[:, columns], k // groups, axis=0) for v in (zero, scale)
    ]
    expected = np.asarray(x, np.float64) @ ((codes[:, columns] - spread[0]) * spread[1])
    error = np.linalg.norm(first[:, columns] - expected) / np.linalg.norm(expected)
    assert error < 2e-6  # float32 sums of exact products


def poison(size: int) -> None:
    """Fills the memory that the next result will get with NaN."""
    jax.block_until_ready([jnp.full((size,), jnp.nan, jnp.float32) for _ in range(4)])
