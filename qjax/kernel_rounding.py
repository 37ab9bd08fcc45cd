# SPDX-License-Identifier: Apache-2.0
"""Rounding of blocks of inputs that a kernel of :mod:`pallas_kernels` does, for GPTQ."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from pallas_kernels import device, gptq_block
from qjax.formats import Format


def is_there(w: Shaped[Array, "..."]) -> bool:
    """Whether a weight lies on one GPU that the kernel runs on.

    Args:
      w: the weight; or its shape, of an array that is yet to come.
    """
    sharding = w.sharding if isinstance(w, jax.Array) else None
    return device.is_hopper() and (sharding is None or len(sharding.device_set) == 1)


def why_not(fmt: Format, b: int) -> str | None:
    """Why blocks of so many inputs are not for the kernel, in words; None if they are.

    Args:
      fmt: of the codes.
      b: inputs of a block.

    Example:
      >>> from qjax import formats
      >>> why_not(formats.INT4, 128), why_not(formats.E4M3, 128)
      (None, 'e4m3 codes; the kernel rounds to integers')
    """
    if fmt.kind != "integer":
        return f"{fmt.name} codes; the kernel rounds to integers"
    return gptq_block.why_not(b)


def at_their_turn(
    rows: Float[Array, "b n"],
    upper: Float[Array, "b b"],
    step: Float[Array, "b n"],
    zero: Float[Array, "b n"],
    fmt: Format,
) -> Float[Array, "b n"]:
    """What the weights of a block have become when each input is rounded; see the kernel.

    Args:
      rows: the weights, an input a row.
      upper: of the inverse Hessian.
      step: of each weight's grid.
      zero: likewise.
      fmt: of the codes, integers.
    """
    floats = (a.astype(jnp.float32) for a in (rows, upper, step, zero))
    return gptq_block.at_their_turn(*floats, low=fmt.low, high=fmt.high)
