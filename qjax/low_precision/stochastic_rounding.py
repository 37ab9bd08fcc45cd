# SPDX-License-Identifier: Apache-2.0
"""Stochastic rounding: to one of the two neighbours, by chance, so that the mean is exact.

    below <= x <= above,    P(above) = (x - below) / (above - below),    E[rounded] = x
    Var[rounded] = (x - below) * (above - x) <= (above - below)^2 / 4

A value that the format holds stays. Rounding to the nearest loses an increment of less than half the gap
between neighbours, every time; here it arrives in the mean, which matters wherever a number in few
bits is added to in small steps: a moving average, a bfloat16 weight.

=====================  ===========================================================
paper                  here
=====================  ===========================================================
floor(x), epsilon      ``below`` and the gap above it, of any format of ours
Round(x, <IL, FL>)     :func:`encode` for codes, :func:`cast` for 16-bit floats
=====================  ===========================================================

The gap of a float depends on where x lies; the paper rounds to fixed point, where it is one number.

References:
  Gupta, Agrawal, Gopalakrishnan, Narayanan, Deep Learning with Limited Numerical Precision, ICML 2015,
  https://arxiv.org/abs/1502.02551, section 3.
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Key, Shaped

from qjax import formats
from qjax.formats import Format

PyTreeT = TypeVar("PyTreeT")


def encode(
    values: Float[Array, "*shape"], fmt: Format, key: Key[Array, ""]
) -> Shaped[Array, "*shape"]:
    """Rounds each value to a neighbour in the format by chance, and gives its code.

    Values beyond the range, infinities too, saturate, as in :func:`qjax.formats.encode`. NaN stays in
    8-bit floats; no other code stands for it.

    Args:
      values: already divided by their scale.
      fmt: the target format.
      key: of the random numbers.

    Returns:
      Unpacked codes of dtype ``fmt.dtype``.

    Example:
      >>> codes = encode(jnp.full(1000, 2.25), formats.INT4, jax.random.key(0))
      >>> sorted(set(codes.tolist())), round(float(codes.mean()), 1)
      ([2, 3], 2.2)
    """
    clipped = jnp.clip(values.astype(jnp.float32), fmt.low, fmt.high)
    below, gap = _neighbours(clipped, fmt)
    # Of a value that the format holds, the chance is zero, and no draw lies below that.
    above = jax.random.uniform(key, clipped.shape) * gap < clipped - below
    return formats.encode(jnp.where(above, below + gap, below), fmt)


def cast(values: Float[Array, "*shape"], dtype: Any, key: Key[Array, ""]) -> Float[Array, "*shape"]:
    """Rounds each value to a neighbour in bfloat16 or float16 by chance.

    Finite values beyond the range, infinities and NaN become what ``astype`` makes of them.

    Args:
      values: float32, or what float32 holds.
      dtype: bfloat16 or float16; a wider one is an exact ``astype``.
      key: of the random numbers.

    Raises:
      ValueError: another dtype.

    Example:
      >>> x = cast(jnp.full(1000, 1 + 2**-9), jnp.bfloat16, jax.random.key(0))
      >>> sorted(set(x.tolist()))
      [1.0, 1.0078125]
    """
    wide, target = values.astype(jnp.float32), jnp.dtype(dtype)
    match target.name:
        case "float32" | "float64":
            return values.astype(target)
        case "bfloat16":
            rounded = _to_bfloat16(wide, key)
        case "float16":
            below, gap = _neighbours_of_floats(wide, target)
            above = jax.random.uniform(key, wide.shape) * gap < wide - below
            rounded = jnp.where(above, below + gap, below).astype(target)
        case _:
            raise ValueError(
                f"stochastic rounding casts to bfloat16 or float16, got {target.name}; encode() rounds "
                f"to {', '.join(formats.NAMES)}"
            )
    inside = jnp.abs(wide) <= float(jnp.finfo(target).max)
    return jnp.where(inside, rounded, wide.astype(target))


def apply_updates_stochastically(params: PyTreeT, updates: Any, key: Key[Array, ""]) -> PyTreeT:
    """``optax.apply_updates`` for parameters in 16 bits without float32 masters.

    Sums are float32, and each is rounded to its parameter's dtype by chance: an update of less than half
    a gap, which rounding to the nearest would lose for ever, arrives in the mean.

    Args:
      params: any pytree; float32 leaves are updated exactly as optax does.
      updates: of the same structure; None leaves a parameter as it is.
      key: a fresh one for each step.

    Example:
      >>> w = jnp.ones(1000, jnp.bfloat16)
      >>> moved = apply_updates_stochastically(w, jnp.full(1000, 2.0**-10), jax.random.key(0))
      >>> bool(abs(moved.astype(jnp.float32).mean() - (1 + 2.0**-10)) < 2.0**-11)
      True
    """
    leaves, structure = jax.tree.flatten(params, is_leaf=lambda leaf: leaf is None)
    keys = jax.tree.unflatten(structure, list(jax.random.split(key, max(1, len(leaves)))))

    def moved(param: Any, update: Any, leaf_key: Any) -> Any:
        if param is None or update is None:
            return param
        total = jnp.asarray(param, jnp.float32) + jnp.asarray(update, jnp.float32)
        return cast(total, jnp.asarray(param).dtype, leaf_key)

    return jax.tree.map(moved, params, updates, keys, is_leaf=lambda leaf: leaf is None)


def _neighbours(
    x: Float[Array, "*shape"], fmt: Format
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """The greatest value of a format not above x, which is in range, and how far the next one lies."""
    match fmt.kind:
        case "integer":
            return jnp.floor(x), jnp.ones_like(x)
        case "float":
            return _neighbours_of_floats(x, jnp.dtype(fmt.dtype))
        case "codebook":
            ladder = jnp.asarray(np.unique(np.asarray(fmt.table, np.float32)))
            place = jnp.clip(jnp.searchsorted(ladder, x, side="right") - 1, 0, len(ladder) - 2)
            return ladder[place], ladder[place + 1] - ladder[place]


def _neighbours_of_floats(
    x: Float[Array, "*shape"], dtype: Any
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """The same for floats of at most 16 bits whose gaps float32 holds: all but bfloat16."""
    info = ml_dtypes.finfo(dtype)
    _, exponent = jnp.frexp(x)  # |x| lies in [2**(exponent - 1), 2**exponent)
    exponent = jnp.maximum(exponent - 1, int(info.minexp))  # subnormals have the least one's gap
    gap = jnp.ldexp(jnp.float32(1), exponent - int(info.nmant))
    return jnp.floor(x / gap) * gap, gap  # powers of two: both exact


def _to_bfloat16(x: Float[Array, "*shape"], key: Key[Array, ""]) -> Float[Array, "*shape"]:
    """The upper half of float32: what the lower half adds up to with a random one, carries."""
    lower = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    carried = lax.bitcast_convert_type(x, jnp.uint32) + lower
    return lax.bitcast_convert_type((carried >> 16).astype(jnp.uint16), jnp.bfloat16)
