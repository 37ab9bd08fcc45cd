# SPDX-License-Identifier: Apache-2.0
"""Products that a kernel of :mod:`pallas_kernels` computes, under jit, vmap and grad.

:mod:`qjax.ops` sends a product here when :func:`why_not` has nothing against it.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import configs, device
from pallas_kernels.machine import Half
from pallas_kernels.operands import Weights
from pallas_kernels.product import MOST_RESULTS, Product
from pallas_kernels.quantized_matmul import quantized_matmul
from qjax import activations, kernel_layout, qtensor
from qjax.qtensor import QTensor

Tree = TypeVar("Tree")


def prepare(tree: Tree) -> Tree:
    """Arranges the weights of a model for the kernels of this machine; once, when it is loaded.

    On a Hopper GPU every QTensor that a kernel takes is rearranged
    (:func:`qjax.kernel_layout.for_kernel`); all else, and everything on other machines, stays as it is.
    The result computes the same.

    Args:
      tree: an ``nnx.State``, a QTensor, or any pytree that holds some.

    Example:
      >>> prepare({"bias": 1.0})
      {'bias': 1.0}
    """
    if not device.is_hopper():
        return tree
    return jax.tree.map(
        lambda leaf: kernel_layout.for_kernel(leaf) if isinstance(leaf, QTensor) else leaf,
        tree,
        is_leaf=lambda leaf: isinstance(leaf, QTensor),
    )


def why_not(x: Any, w: Any, numbers: Any) -> str | None:
    """Why a product does not go through a kernel here, in words with the numbers; None if it does.

    Args:
      x: activations, or their shape and dtype.
      w: weight, likewise.
      numbers: as in ``jax.lax.dot_general``.
    """
    if not isinstance(w, QTensor):
        return "the weight is not quantized"
    if w.layout is None:
        reason = kernel_layout.why_no_kernel(w)
        return reason or "the weight is not arranged for the kernel: qjax.prepare does that"
    if not device.is_hopper():
        return f"it runs on Hopper GPUs, this is {jax.devices()[0].device_kind}"
    (x_axes, w_axes), (batch, _) = numbers
    if w.ndim != 2 or batch or tuple(w_axes) != (0,) or tuple(x_axes) != (x.ndim - 1,):
        return "it computes x [..., k] . w [k, n] only"
    assert w.layout is not None
    if w.activations is None and str(x.dtype) != w.layout.tokens:
        return f"activations are {x.dtype}, the scales are {w.layout.tokens}"
    rows = x.size // x.shape[-1] if x.size else 0
    if _takes(rows, w):
        return None
    most = most_rows(w) or MOST_RESULTS // w.shape[-1]
    return f"{rows} rows of activations, it is for 1 to {most}"


def most_rows(w: QTensor) -> int | None:
    """Rows of activations up to which a kernel is faster than XLA; None: however many.

    Args:
      w: weight that a kernel takes (:func:`qjax.kernel_layout.why_no_kernel`), arranged or not.
    """
    k, n = w.shape[-2:]
    return configs.most_tokens(
        Product(
            m=1, k=k, n=n, group_size=w.group_size, weights=cast(Weights, w.format.storage),
            tokens=cast(Any, kernel_layout.kernel_tokens(w)),
        )
    )  # fmt: skip


def _takes(rows: int, w: QTensor) -> bool:
    most = most_rows(w) or MOST_RESULTS // w.shape[-1]
    return 1 <= rows <= most


def product(
    x: Float[Array, "*batch k"], w: QTensor, dtype: Any, *, many: Callable[..., Array]
) -> Float[Array, "*batch n"]:
    """``x @ w`` through the kernel; activations that the weight wants quantized are quantized before it.

    Under vmap over activations their batch joins the rows; with a batch of weights one product follows
    the other. Gradients flow to ``x``, straight through its rounding; the arranged scales have none.

    Args:
      x: activations that :func:`why_not` accepts.
      w: weight, arranged, inputs as they are.
      dtype: of the result.
      many: ``many(x, w, dtype)`` computes the product of more rows than the kernel is for.
    """
    assert w.order is None
    y: Array = _product(x.reshape(-1, x.shape[-1]), w, dtype, many)
    return y.reshape(*x.shape[:-1], y.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(
    x: Float[Array, "m k"], w: QTensor, dtype: Any, many: Callable[..., Array]
) -> Float[Array, "m n"]:
    batchable: Any = jax.custom_batching.custom_vmap(functools.partial(_launched, dtype=dtype))

    def batched(size: int, is_batched: Any, x: Any, w: Any):
        if any(jax.tree.leaves(is_batched[1])):
            leaves, tree = jax.tree.flatten((x, w))
            where = [i for i, is_mapped in enumerate(jax.tree.leaves(is_batched)) if is_mapped]

            def one(mapped: list[Array]) -> Array:
                own = dict(zip(where, mapped, strict=True))
                return batchable(
                    *jax.tree.unflatten(tree, [own.get(i, leaf) for i, leaf in enumerate(leaves)])
                )

            return jax.lax.map(one, [leaves[i] for i in where]), True
        rows = x.reshape(-1, x.shape[-1])
        y = batchable(rows, w) if _takes(len(rows), w) else many(rows, w, dtype)
        return y.reshape(*x.shape[:-1], -1), True

    batchable.def_vmap(batched)
    return batchable(x, w)


def _launched(x: Float[Array, "m k"], w: QTensor, *, dtype: Any) -> Float[Array, "m n"]:
    """The kernel itself."""
    weights = cast(Weights, w.format.storage)
    if w.activations is None:
        return quantized_matmul(
            x, w.codes, w.scale, w.zero, weights=weights, layer=w.layer, out_dtype=dtype
        )
    quantized = activations.quantize(x, w.activations, (-1,), activations.input_scale(w, x.ndim))
    layers = () if w.layer is None else w.scale.shape[:1]
    scale = w.scale if w.group_size else w.scale.reshape(*layers, -1)
    # A static scale is one for all tokens.
    token_scale = jnp.broadcast_to(quantized.scale, (len(x), quantized.scale.shape[-1]))
    token_scale = token_scale.reshape(-1) if token_scale.shape[-1] == 1 else token_scale
    return quantized_matmul(
        quantized.codes, w.codes, scale, weights=weights, token_scale=token_scale, layer=w.layer,
        out_dtype=dtype, scale_dtype=_pair_dtype(w),
    )  # fmt: skip


def _pair_dtype(w: QTensor) -> Half:
    """Of the scales of groups that meet 8-bit activations; any where there are none."""
    assert w.layout is not None
    return "float16" if w.layout.scale_dtype == "float16" else "bfloat16"


def _forward(x, w, dtype, many):
    return _product(x, w, dtype, many), (x, w)


def _backward(dtype, many, saved, cotangent):
    del dtype, many
    x, w = saved
    dense = qtensor.dequantize(w, x.dtype)
    gradient = jnp.matmul(cotangent.astype(x.dtype), dense.T, preferred_element_type=jnp.float32)
    if w.activations is not None:
        held = activations.input_scale(w, x.ndim)
        (gradient,) = jax.vjp(lambda x: activations.within_range(x, w.activations, held), x)[1](
            gradient.astype(x.dtype)
        )
    return gradient.astype(x.dtype), None


_product.defvjp(_forward, _backward)
