# SPDX-License-Identifier: Apache-2.0
"""Weights as a kernel reads them: which ones a kernel takes, and how their leaves are arranged for it.

:func:`qjax.qtensor.plain` is the way back.
"""

from typing import cast

import jax.numpy as jnp

from pallas_kernels import product, quantized_matmul, row_blocks
from pallas_kernels.machine import Half
from pallas_kernels.operands import Weights
from qjax import formats
from qjax.qtensor import SCALE_FORMATS, KernelLayout, QTensor


def kernel_tokens(q: QTensor) -> str:
    """Dtype that a kernel multiplies this weight with: of its scales, or of quantized activations."""
    if q.layout is not None:
        return q.layout.tokens
    return q.activations.format.storage if q.activations else str(q.scale.dtype)


def why_no_kernel(q: QTensor) -> str | None:
    """Why no kernel takes products with this weight, in words; None if one does."""
    if q.format not in (formats.INT4, formats.INT8, formats.E4M3):
        return f"the only kernel is for int4, int8 and e4m3 weights, this is {q.scheme.name}"
    if len(q.tile) != 2 or q.axis != (-2,):
        return f"it must be a [k, n] weight, summed over k; this has {len(q.tile)} axes"
    if q.tensor_scale is not None or str(q.scale.dtype) in SCALE_FORMATS:
        return f"scales must be floats of 16 or 32 bits, these are {q.scale.dtype}"
    (k, n), tokens = q.shape[-2:], kernel_tokens(q)
    if tokens not in product.TOKENS and q.activations is None:
        return (
            f"scales are {tokens}, must be bfloat16 or float16 where activations are not quantized"
        )
    reason = product.why_not(
        1, k, n, weights=q.format.storage, tokens=tokens, group_size=q.group_size,
        has_zeros=q.zero is not None,
    )  # fmt: skip
    return reason or _why_not_scales(q)


def _why_not_scales(q: QTensor) -> str | None:
    """Why scales are not those of a kernel, of weights whose dtypes and group are."""
    (k, n), (_, outputs), by_block = q.shape[-2:], q.tile, _by_block(q)
    if by_block and outputs != product.BLOCK and outputs < n:
        return f"scales must be for 128 x 128 weights, these are for tiles of {q.tile}"
    if not by_block and outputs != 1 and (outputs < n or q.group_size is not None):
        return f"scales must be per output or one for all, these are for tiles of {q.tile}"
    if q.activations is None:
        return None
    if _in_pairs(q) and str(q.scale.dtype) not in ("bfloat16", "float16"):
        return f"scales of groups must have 16 bits, these are {q.scale.dtype}"
    of_tokens, expected = q.activations.group_size, q.group_size if by_block else None
    of_tokens = None if of_tokens is None or of_tokens >= k else of_tokens
    if of_tokens != expected:
        return f"activations have a scale for {of_tokens} inputs, must have one for {expected}; None: all"
    return None


def _by_block(q: QTensor) -> bool:
    """Whether the kernel wants scales of 128 x 128 weights."""
    same = q.activations is not None and q.activations.format == q.format
    return same and q.group_size is not None


def _in_pairs(q: QTensor) -> bool:
    """Whether it wants them in pairs of 16 bits."""
    return q.activations is None or (q.group_size is not None and not _by_block(q))


def for_kernel(q: QTensor) -> QTensor:
    """The same weight with its leaves arranged for the kernel that multiplies it; as it is if none does.

    To be done once, when a model is loaded: the arrangement is what makes the kernel fast. It is
    reversible, and whatever writes files writes the plain one.

    >>> import qjax
    >>> q = for_kernel(qjax.quantize(jnp.ones((128, 32), jnp.bfloat16), "w4a16-g64"))
    >>> q.codes.shape, q.shape, q.nbytes
    ((2, 2, 32, 4), (128, 32), 2176)
    """
    if q.layout is not None or why_no_kernel(q) is not None:
        return q
    tokens, weights = cast(product.Tokens, kernel_tokens(q)), cast(Weights, q.format.storage)
    codes, scale, zero = quantized_matmul.tiled_codes(q.codes, weights), q.scale, q.zero
    if _in_pairs(q):
        # One scale for the whole tensor stands there once for each output.
        each = jnp.broadcast_to(scale, (*scale.shape[:-1], q.shape[-1]))
        scale = row_blocks.tile_pairs(each)
        if zero is not None:
            zero = jnp.broadcast_to(zero, each.shape)
            zero = quantized_matmul.pack_zeros(zero, cast(Half, tokens), weights)
    else:
        scale = scale.astype(jnp.float32)
    result = q.replaced(codes=codes, scale=scale, zero=zero)
    result.layout = KernelLayout(tokens=tokens, scale_dtype=str(q.scale.dtype), pairs=_in_pairs(q))
    return result
