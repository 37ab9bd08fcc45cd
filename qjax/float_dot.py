# SPDX-License-Identifier: Apache-2.0
"""The product of floats that :mod:`qjax.ops` takes of activations and of what codes stand for."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped


def float_dot(
    x: Shaped[Array, "..."],
    w: Shaped[Array, "..."],
    numbers: Any,
    precision: Any,
    dtype: Any = jnp.float32,
    out_sharding: Any = None,
) -> Float[Array, "..."]:
    """A dot of floats, accumulated in float32 and rounded to ``dtype``.

    Two things make XLA's CPU backend leave the 16-bit instructions for loops of its own: a 16-bit
    result, and a single row. So there the product is taken in float32 and rounded, and a single row
    is doubled: one bfloat16 token times [4096, 14336] took 60 ms without and 8 ms with (jax 0.10.2,
    AVX512-BF16). Elsewhere the result stays 16-bit, and with it both products of the backward pass.

    Args:
      x: activations.
      w: weight.
      numbers: as in ``jax.lax.dot_general``.
      precision: as there.
      dtype: of the result.
      out_sharding: as there.
    """
    sharding = {} if out_sharding is None else {"out_sharding": out_sharding}
    if jax.default_backend() != "cpu" or x.dtype != jnp.bfloat16:
        return lax.dot_general(
            x, w, numbers, precision=precision, preferred_element_type=dtype, **sharding
        )
    rows, single = doubled(x, numbers)
    y = lax.dot_general(
        rows, w, numbers, precision=precision, preferred_element_type=jnp.float32, **sharding
    )
    return (y[:1] if single else y).astype(dtype)


def doubled(x: Shaped[Array, "..."], numbers: Any) -> tuple[Shaped[Array, "..."], bool]:
    """A single row twice, and whether it was one: of the result the first is to be taken.

    Args:
      x: activations.
      numbers: as in ``jax.lax.dot_general``.
    """
    (contracting, _), (batch, _) = numbers
    free = [i for i in range(x.ndim) if i not in contracting and i not in batch]
    single = bool(free) and not batch and math.prod(x.shape[i] for i in free) == 1
    return (jnp.concatenate([x, x], axis=free[0]) if single else x), single
