# SPDX-License-Identifier: Apache-2.0
"""Random numbers, and operands of quantized products with what they stand for in float64."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import quantized_matmul as qm
from pallas_kernels import row_blocks

E4M3 = "float8_e4m3fn"


@dataclasses.dataclass(frozen=True)
class Operands:
    """What the kernel is called with, and what that stands for: scales and zeros applied, in float64."""

    args: tuple[jax.Array, ...]
    options: dict[str, Any]
    near_x: np.ndarray  # [m, k]
    near_w: Callable[[Any], np.ndarray]  # some of the columns of [k, n]

    def expected(self, columns: Any = slice(None), rounded_to: Any = None) -> np.ndarray:
        """In float64, of weights as they are or each rounded once to a dtype."""
        w = self.near_w(columns)
        y = self.near_x @ (w if rounded_to is None else w.astype(rounded_to).astype(np.float64))
        for name in ("bias", "residual"):
            if name in self.options:
                y = y + np.asarray(self.options[name], np.float64)[..., columns]
        return y

    def relative_error(self, y: Any, columns: Any = slice(None), rounded_to: Any = None) -> float:
        expected = self.expected(columns, rounded_to)
        wrong = np.linalg.norm(np.asarray(y, np.float64)[:, columns] - expected)
        return float(wrong / np.linalg.norm(expected))

    def of_tokens(self, m: int) -> "Operands":
        """The product of the first tokens alone."""
        own = {"residual", "token_scale"}
        options = {
            name: value[:m] if name in own and len(value) > 1 else value
            for name, value in self.options.items()
        }
        x, *others = self.args
        return Operands((x[:m], *others), options, self.near_x[:m], self.near_w)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def half_tokens():
    """Makes operands with 16-bit tokens."""
    return _with_half_tokens


@pytest.fixture
def byte_tokens():
    """Makes operands with 8-bit tokens."""
    return _with_byte_tokens


def _codes(rng: np.random.Generator, weights: str, shape: tuple[int, ...]) -> np.ndarray:
    """Every code but NaN."""
    if weights == E4M3:
        bits = rng.integers(0, 256, shape, dtype=np.uint8)
        return np.where(bits & 127 == 127, 0, bits).astype(np.uint8).view(jnp.float8_e4m3fn)
    limit = 8 if weights == "int4" else 128
    return rng.integers(-limit, limit, shape, dtype=np.int8)


def _with_half_tokens(
    rng: np.random.Generator, m, k, n, *, weights, half, group, asymmetric=False
) -> Operands:
    groups = 1 if group is None else k // group
    codes = _codes(rng, weights, (k, n))
    scale = jnp.asarray(rng.uniform(0.01, 0.02, (groups, n)), half)
    limit = 8 if weights == "int4" else 128
    zero = rng.integers(-limit, limit, (groups, n)) * asymmetric
    x = jnp.asarray(rng.standard_normal((m, k)), half)
    zeros = (qm.pack_zeros(jnp.asarray(zero), half, weights),) if asymmetric else ()

    def near_w(columns):
        of_groups = [np.asarray(v, np.float64)[:, columns] for v in (zero, scale)]
        spread = [np.repeat(v, k // groups, axis=0) for v in of_groups]
        return (codes[:, columns].astype(np.float64) - spread[0]) * spread[1]

    tiled = qm.tiled_codes(jnp.asarray(codes), weights)
    args = (x, tiled, row_blocks.tile_pairs(scale), *zeros)
    return Operands(args, {"weights": weights}, np.asarray(x, np.float64), near_w)


def _with_byte_tokens(
    rng: np.random.Generator, m, k, n, *, weights, tokens=None, by_block=False, group=None,
    one_scale=False, scale_dtype="bfloat16",
) -> Operands:  # fmt: skip
    x, codes = _codes(rng, tokens or weights, (m, k)), _codes(rng, weights, (k, n))
    blocks, groups = (k // 128, -(-n // 128)), 1 if group is None else k // group
    shapes = ((m, blocks[0]), blocks) if by_block else ((1,), (1,)) if one_scale else ((m,), (n,))
    token_scale, scale = (jnp.asarray(rng.uniform(0.01, 0.02, s), jnp.float32) for s in shapes)
    options = {"weights": weights, "token_scale": token_scale}
    if group:
        pairs = jnp.asarray(rng.uniform(0.01, 0.02, (groups, n)), scale_dtype)
        scale, options["scale_dtype"] = row_blocks.tile_pairs(pairs), scale_dtype
    wide_x = np.asarray(token_scale, np.float64)
    wide_w = np.asarray(pairs if group else scale, np.float64)
    if by_block:
        wide_x = np.repeat(wide_x, 128, axis=1)
        wide_w = np.repeat(np.repeat(wide_w, 128, axis=0), 128, axis=1)[:, :n]
    else:
        wide_x = wide_x[:, None]
        wide_w = np.broadcast_to(
            np.repeat(wide_w, k // groups, axis=0) if group else wide_w, (k, n)
        )

    def near_w(columns):
        return codes[:, columns].astype(np.float64) * wide_w[:, columns]

    tiled = qm.tiled_codes(jnp.asarray(codes), weights)
    return Operands(
        (jnp.asarray(x), tiled, scale), options, x.astype(np.float64) * wide_x, near_w
    )  # fmt: skip
