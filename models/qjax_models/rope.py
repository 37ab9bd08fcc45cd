# SPDX-License-Identifier: Apache-2.0
"""Rotary position embeddings, and the ways to stretch them over longer sequences.

Pair number i of P = R / 2 (features i and i + P of the R that rotate) is turned by the angle
position * f_i with f_i = theta^(-2i / R). A scaling changes the frequencies f_i.

References:
    Su et al., RoFormer, 2021, https://arxiv.org/abs/2104.09864.
    Chen et al., Position Interpolation, 2023, https://arxiv.org/abs/2306.15595 (linear scaling).
    Ding et al., LongRoPE, 2024, https://arxiv.org/abs/2402.13753.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """All frequencies divided by `factor`: positions are squeezed."""

    factor: float


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1: slow frequencies divided by `factor`, fast ones kept, a linear blend in between.

    A frequency is slow when its wavelength exceeds original_positions / low_freq_factor, fast when it
    is below original_positions / high_freq_factor.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int  # tokens in pre-training

    def __post_init__(self) -> None:
        """Checks that the band between slow and fast is not empty."""
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"rope scaling llama3: high_freq_factor={self.high_freq_factor} must exceed "
                f"low_freq_factor={self.low_freq_factor}"
            )


@dataclass(frozen=True, kw_only=True)
class LongRopeScaling:
    """Phi-3: each frequency divided by a searched factor; another set beyond the original length."""

    short_factor: tuple[float, ...]  # P divisors for sequences up to original_positions
    long_factor: tuple[float, ...]  # P divisors for longer ones
    original_positions: int  # tokens in pre-training
    attention_factor: float  # on cos and sin, so that its square is on the scores


@dataclass(frozen=True, kw_only=True)
class Rope:
    """How positions turn query and key heads."""

    theta: float = 10000.0
    fraction: float = 1.0  # of a head's features that are rotated, the first ones
    scaling: LinearScaling | Llama3Scaling | LongRopeScaling | None = None

    def __post_init__(self) -> None:
        """Checks the ranges."""
        if self.theta <= 0:
            raise ValueError(f"rope theta={self.theta} must be positive")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"rope fraction={self.fraction} must be in (0, 1]")


class Rotation(NamedTuple):
    """Cosine and sine of every angle; one leading row serves the whole batch."""

    cos: Float[Array, "B T P"]
    sin: Float[Array, "B T P"]


def frequencies(rope: Rope, head_size: int, length: int) -> Float[np.ndarray, " P"]:
    """Radians per token of every rotated pair, for sequences of up to `length` tokens."""
    rotated = int(head_size * rope.fraction)
    plain = rope.theta ** -(np.arange(0, rotated, 2) / rotated)
    match rope.scaling:
        case None:
            return plain
        case LinearScaling(factor=factor):
            return plain / factor
        case Llama3Scaling() as scaling:
            return _llama3_frequencies(plain, scaling)
        case LongRopeScaling() as scaling:
            is_long = length > scaling.original_positions
            return plain / np.array(scaling.long_factor if is_long else scaling.short_factor)


def _llama3_frequencies(
    plain: Float[np.ndarray, " P"], scaling: Llama3Scaling
) -> Float[np.ndarray, " P"]:
    turns = scaling.original_positions * plain / (2 * math.pi)  # over the original length
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    share_kept = np.clip((turns - low) / (high - low), 0, 1)
    return share_kept * plain + (1 - share_kept) * plain / scaling.factor


def rotation(rope: Rope, head_size: int, positions: Int[Array, "B T"], length: int) -> Rotation:
    """Angles of the given positions, in float32.

    Args:
        rope: how positions turn heads.
        head_size: features per head, H.
        positions: of every token in its row, from 0.
        length: the most tokens a row can come to have. LongRoPE chooses its frequencies by it, so that
            queries and the keys cached before them always agree.
    """
    # Angles in float32: bfloat16 cannot tell position 257 from 256.
    radians = jnp.asarray(frequencies(rope, head_size, length), jnp.float32)
    angles = positions[..., None].astype(jnp.float32) * radians
    factor = 1.0
    if isinstance(rope.scaling, LongRopeScaling):
        factor = rope.scaling.attention_factor
    return Rotation(jnp.cos(angles) * factor, jnp.sin(angles) * factor)


def rotate(heads: Float[Array, "B T N H"], angles: Rotation) -> Float[Array, "B T N H"]:
    """Turns feature pairs (i, i + P) of every head by the angles of its position."""
    cos, sin = angles.cos[:, :, None], angles.sin[:, :, None]
    half = cos.shape[-1]
    first, second = heads[..., :half], heads[..., half : 2 * half]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([turned.astype(heads.dtype), heads[..., 2 * half :]], axis=-1)
