# SPDX-License-Identifier: Apache-2.0
"""Adam whose two moments take two bytes and a little a parameter, where float32 takes eight.

    m_t = b1 m + (1 - b1) g,    v_t = b2 v + (1 - b2) g^2
    u = m_t / (1 - b1^t) / (sqrt(v_t / (1 - b2^t)) + eps)       made before rounding
    m <- Q_m(m_t),              v <- Q_v(v_t)                   what is stored

``"blocks"``: m in e4m3 and v in a logarithmic byte, each with a float32 scale a block of ``block_size``
neighbours; 0.254 of float32's bytes at 256. ``"float16"``: m in e4m3 and v in float16, each with one
scale a tensor, as FP8-LM has it; 0.375.

    v ~ scale * 2 ** ((code - 255) / 6),    code in 1..255;    0 is code 0

The byte reaches from the block's largest v down over 42 octaves in steps of 12 %, which are 6 % of the
root that divides the update. A v that is not zero never becomes zero: beside an m that is not, the update
would be m / eps. It becomes the least value instead, and the update too small.

**Rounding.** A step moves v by ``(1 - b2) * (g^2 / v - 1)`` of itself, 0.1 % with the usual decay. To the
nearest of values 12 % apart it would stay where it is for ever, unless g^2 is 60 times v. m moves by
``(1 - b1) * (g / m - 1)`` of itself, and e4m3's values are 6 to 12 % apart: it stops up to 60 % away from
a gradient that stays the same. So both are rounded by chance: in the mean they are the moving averages
that they should be.

=====================================  =================================================================
papers                                 here
=====================================  =================================================================
FP8-LM: m in FP8, v in FP16            ``second="float16"``, both with a scale a tensor
FP8-LM: master weights in FP16         not here: parameters are the caller's; 16-bit ones are updated
                                       by ``apply_updates_stochastically``
Dettmers: blocks of 2048               ``block_size``, along the last axes: codes have the parameter's
                                       shape, and its sharding
Dettmers: dynamic tree quantization    e4m3 and the logarithmic byte: the same relative error
                                       everywhere, so that a bound can be given
=====================================  =================================================================

References:
  Peng, Wu, Wei, Zhao, Yang, Liu, Xiong, Yang, Ni, Hu, Li, Zhang, Li, Ning, Wang, Zhang, Liu, Chau, Hu,
  Cheng, FP8-LM: Training FP8 Large Language Models, 2023, https://arxiv.org/abs/2310.18313.
  Dettmers, Lewis, Shleifer, Zettlemoyer, 8-bit Optimizers via Block-wise Quantization, ICLR 2022,
  https://arxiv.org/abs/2110.02861.
"""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PyTree, Shaped, UInt8

from qjax import formats, ranges, tiles
from qjax.low_precision import stochastic_rounding

STEPS_PER_OCTAVE = 6
_FLOAT16_TOP = 2.0**15  # where the largest second moment of a tensor lies


class ScaleByAdam8BitState(NamedTuple):
    """State of :func:`scale_by_adam_8bit`.

    Attributes:
      count: steps taken.
      mu: codes of the first moment, in the parameters' shapes.
      nu: codes of the second.
      mu_scale: float32, one a block or tensor.
      nu_scale: likewise.
    """

    count: Int[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]  optax's name
    mu: PyTree
    nu: PyTree
    mu_scale: PyTree
    nu_scale: PyTree


class _Stored(NamedTuple):
    codes: Shaped[Array, "..."]
    scale: Float[Array, "..."]


def scale_by_adam_8bit(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    second: Literal["blocks", "float16"] = "blocks",
    block_size: int = 256,
    rounding: Literal["stochastic", "nearest"] = "stochastic",
    seed: int = 0,
) -> optax.GradientTransformation:
    """``optax.scale_by_adam`` with moments in 8 bits; the formulas and formats stand above.

    Args:
      b1: decay of the first moment.
      b2: decay of the second.
      eps: added to the root.
      second: how the second moment is held, and what shares a scale.
      block_size: elements that share a scale; ``second="blocks"`` only.
      rounding: of both moments. The nearest is for comparison: moments stick.
      seed: of stochastic rounding; steps and parameters have random numbers of their own.

    Raises:
      ValueError: a number or a name is not one of these.

    Example:
      >>> optimizer = optax.chain(scale_by_adam_8bit(), optax.scale_by_learning_rate(1e-3))
      >>> state = optimizer.init({"w": jnp.ones((4, 256))})
      >>> formats.device_bytes((state[0].mu, state[0].nu, state[0].mu_scale, state[0].nu_scale))
      2080
    """
    _check(b1, b2, eps, second, block_size, rounding)

    def tile_of(shape: tuple[int, ...]) -> tuple[int, ...]:
        return _tile(shape, block_size if second == "blocks" else math.prod(shape))

    def first_encoded(moment: Float[Array, "..."], key: Any) -> _Stored:
        return _encode_first(moment, tile_of(moment.shape), key)

    def second_encoded(moment: Float[Array, "..."], key: Any) -> _Stored:
        if second == "float16":
            return _encode_float16(moment, key)
        return _encode_logarithmic(moment, tile_of(moment.shape), key)

    def second_decoded(stored: _Stored) -> Float[Array, "..."]:
        if second == "float16":
            return stored.codes.astype(jnp.float32) * stored.scale
        return _decode_logarithmic(stored, tile_of(stored.codes.shape))

    def state_of(count: Any, mu: Any, nu: Any, structure: Any) -> ScaleByAdam8BitState:
        def tree(leaves: Any) -> PyTree:
            return jax.tree.unflatten(structure, list(leaves))

        return ScaleByAdam8BitState(
            count=count, mu=tree(s.codes for s in mu), nu=tree(s.codes for s in nu),
            mu_scale=tree(s.scale for s in mu), nu_scale=tree(s.scale for s in nu),
        )  # fmt: skip

    def init(params: PyTree) -> ScaleByAdam8BitState:
        leaves, structure = jax.tree.flatten(params)
        # In the shape of each leaf and where it lies.
        zeros = [jnp.zeros_like(leaf, jnp.float32) for leaf in leaves]
        mu, nu = ([encoded(z, None) for z in zeros] for encoded in (first_encoded, second_encoded))
        return state_of(jnp.zeros((), jnp.int32), mu, nu, structure)

    def update(
        updates: PyTree, state: ScaleByAdam8BitState, params: PyTree | None = None
    ) -> tuple[PyTree, ScaleByAdam8BitState]:
        del params
        gradients, structure = jax.tree.flatten(updates)
        count = optax.safe_increment(state.count)
        key = jax.random.fold_in(jax.random.key(seed), count)
        steps, mu, nu = [], [], []
        stored = zip(*map(jax.tree.leaves, state[1:]), strict=True)
        for index, (gradient, (m, v, m_scale, v_scale)) in enumerate(
            zip(gradients, stored, strict=True)
        ):
            g = gradient.astype(jnp.float32)
            first = b1 * _decode_first(_Stored(m, m_scale), tile_of(g.shape)) + (1 - b1) * g
            root = b2 * second_decoded(_Stored(v, v_scale)) + (1 - b2) * jnp.square(g)
            corrected = first / (1 - b1**count), root / (1 - b2**count)
            steps.append((corrected[0] / (jnp.sqrt(corrected[1]) + eps)).astype(gradient.dtype))
            of_first, of_second = jax.random.split(jax.random.fold_in(key, index))
            by_chance = rounding == "stochastic"
            mu.append(first_encoded(first, of_first if by_chance else None))
            nu.append(second_encoded(root, of_second if by_chance else None))
        return jax.tree.unflatten(structure, steps), state_of(count, mu, nu, structure)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def adamw_8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
    mask: Any = None,
    *,
    second: Literal["blocks", "float16"] = "blocks",
    block_size: int = 256,
    rounding: Literal["stochastic", "nearest"] = "stochastic",
    seed: int = 0,
) -> optax.GradientTransformation:
    """``optax.adamw`` with moments in 8 bits.

    Args:
      learning_rate: a number or a schedule.
      b1: decay of the first moment.
      b2: decay of the second.
      eps: added to the root.
      weight_decay: times the rate; 0 is ``optax.adam``.
      mask: which parameters decay, as in ``optax.adamw``.
      second: as in :func:`scale_by_adam_8bit`.
      block_size: likewise.
      rounding: likewise.
      seed: likewise.

    Example:
      >>> optimizer = adamw_8bit(1e-3, block_size=128)
    """
    return optax.chain(
        scale_by_adam_8bit(
            b1, b2, eps, second=second, block_size=block_size, rounding=rounding, seed=seed
        ),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def _tile(shape: tuple[int, ...], block_size: int) -> tuple[int, ...]:
    """A block of about so many elements, along the last axes first.

    >>> _tile((3, 64, 128), 256), _tile((3, 1000), 256)
    ((1, 2, 128), (1, 256))
    """
    tile, left = [], block_size
    for length in reversed(shape):
        tile.append(max(1, min(length, left)))
        left //= tile[-1]
    return tuple(reversed(tile))


def _encode_first(
    moment: Float[Array, "..."], tile: tuple[int, ...], key: Key[Array, ""] | None
) -> _Stored:
    absmax = _largest(jnp.abs(moment), tile)
    scale = ranges.symmetric_scale(absmax, formats.E4M3, "float", divisor=formats.E4M3.high)
    position = moment / tiles.spread(scale, tile, moment.shape)
    if key is None:
        return _Stored(formats.encode(position, formats.E4M3), scale)
    return _Stored(stochastic_rounding.encode(position, formats.E4M3, key), scale)


def _decode_first(stored: _Stored, tile: tuple[int, ...]) -> Float[Array, "..."]:
    scale = tiles.spread(stored.scale, tile, stored.codes.shape)
    return formats.decode(stored.codes, formats.E4M3) * scale


def _encode_logarithmic(
    moment: Float[Array, "..."], tile: tuple[int, ...], key: Key[Array, ""] | None
) -> _Stored:
    scale = _largest(moment, tile)
    share = moment / tiles.spread(jnp.where(scale > 0, scale, 1.0), tile, moment.shape)
    position = jnp.clip(255 + STEPS_PER_OCTAVE * jnp.log2(share), 1.0, 255.0)
    below = jnp.floor(position)
    # Where it lies between the two values themselves, not between their logarithms.
    between = jnp.exp2((position - below) / STEPS_PER_OCTAVE) - 1
    chance = between / (2 ** (1 / STEPS_PER_OCTAVE) - 1)
    draw = 0.5 if key is None else jax.random.uniform(key, moment.shape)
    code = jnp.where(moment > 0, below + (chance > draw), 0.0)
    return _Stored(code.astype(jnp.uint8), scale)  # of a NaN among them the scale is NaN


def _decode_logarithmic(stored: _Stored, tile: tuple[int, ...]) -> Float[Array, "..."]:
    codes: UInt8[Array, "..."] = stored.codes
    share = jnp.exp2((codes.astype(jnp.float32) - 255) / STEPS_PER_OCTAVE)
    scale = tiles.spread(stored.scale, tile, codes.shape)
    return jnp.where(codes > 0, share, 0.0) * scale


def _encode_float16(moment: Float[Array, "..."], key: Key[Array, ""] | None) -> _Stored:
    scale = jnp.max(moment, initial=0.0) / _FLOAT16_TOP
    scale = jnp.where(scale == 0, 1.0, scale)
    position = moment / scale
    least = float(jnp.finfo(jnp.float16).smallest_subnormal)
    position = jnp.where(moment > 0, jnp.maximum(position, least), position)
    if key is None:
        return _Stored(position.astype(jnp.float16), scale)
    return _Stored(stochastic_rounding.cast(position, jnp.float16, key), scale)


def _largest(moment: Float[Array, "..."], tile: tuple[int, ...]) -> Float[Array, "..."]:
    """The largest entry of each tile; of a scalar, itself."""
    return jnp.max(tiles.split(moment, tile), axis=tiles.inner_axes(tile), initial=0.0)


def _check(b1: float, b2: float, eps: float, second: str, block_size: int, rounding: str) -> None:
    for name, decay in {"b1": b1, "b2": b2}.items():
        if not 0 <= decay < 1:
            raise ValueError(f"a decay lies in [0, 1), got {name}={decay}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps is not negative, got {eps=}")
    if second not in ("blocks", "float16"):
        raise ValueError(f"the second moment is held in 'blocks' or 'float16', got {second!r}")
    if block_size < 1:
        raise ValueError(f"a block has at least one element, got {block_size=}")
    if rounding not in ("stochastic", "nearest"):
        raise ValueError(f"moments are rounded 'stochastic' or 'nearest', got {rounding!r}")
