# SPDX-License-Identifier: Apache-2.0
"""The matrix product of the decoder's layers: the `dot_general=` hook of its stock Flax ones."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from qjax import ops
from qjax.qtensor import QTensor


def dot_general(
    inputs: Float[Array, "..."],
    kernel: Float[Array, "..."] | QTensor,
    dimension_numbers: ops.DimensionNumbers,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    out_sharding: Any = None,
) -> Float[Array, "..."]:
    """`lax.dot_general`, except for quantized kernels and for bfloat16 on a CPU.

    Two things make XLA's CPU backend leave the 16-bit instructions for loops of its own: a 16-bit
    result, and a single row. So there the product is taken in float32 and rounded, and a single row is
    doubled. One token times [4096, 14336] took 60 ms without and 8 ms with (jax 0.10.2, AVX512-BF16).
    Elsewhere the result type stays 16-bit, and with it both products of the backward pass.
    """
    if isinstance(kernel, QTensor):
        return ops.dot_general(inputs, kernel, dimension_numbers, precision, preferred_element_type)
    if jax.default_backend() != "cpu" or inputs.dtype != jnp.bfloat16:
        return lax.dot_general(
            inputs,
            kernel,
            dimension_numbers,
            precision,
            preferred_element_type,
            out_sharding=out_sharding,
        )
    single_row = inputs.size == inputs.shape[-1]
    rows = jnp.concatenate([inputs, inputs]) if single_row else inputs
    product = lax.dot_general(
        rows, kernel, dimension_numbers, precision, jnp.float32, out_sharding=out_sharding
    )
    product = product[: inputs.shape[0]] if single_row else product
    return product.astype(preferred_element_type or inputs.dtype)
