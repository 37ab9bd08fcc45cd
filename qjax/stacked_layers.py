# SPDX-License-Identifier: Apache-2.0
"""Scans over stacked layers that copy no weight.

``jax.lax.scan`` hands each step a slice of what is stacked, and XLA writes a slice out before a kernel
that it cannot look into reads it: every weight would be read twice and written once. Here each step gets
all layers and the number of its own, and the kernel reads that layer in its place.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from qjax.qtensor import QTensor

Carry = TypeVar("Carry")


def scan_layers(
    f: Callable[[Carry, Any], tuple[Carry, Any]], init: Carry, xs: Any, **options: Any
) -> tuple[Carry, Any]:
    """``jax.lax.scan``, in which weights that :func:`qjax.prepare` has arranged are not copied.

    Args:
      f: ``f(carry, x) -> (carry, y)``; x is a slice of every leaf of ``xs``, or of an arranged QTensor a
        view of its layer, which computes the same.
      init: of the carry.
      xs: pytree whose leaves are stacked along their first axis.
      options: as in ``jax.lax.scan``: length, reverse, unroll.

    Raises:
      ValueError: there is nothing to scan over, or leaves are stacked to different lengths.

    Example:
      >>> import qjax
      >>> w = qjax.quantize(jnp.ones((3, 128, 128), jnp.bfloat16), "w4a16-g64", stacked=1)
      >>> x = jnp.ones((1, 128), jnp.bfloat16) / 128
      >>> y, _ = scan_layers(lambda x, w: (qjax.matmul(x, w), None), x, w)
      >>> y.shape
      (1, 128)
    """
    leaves, tree = jax.tree.flatten(xs, is_leaf=lambda leaf: isinstance(leaf, QTensor))
    sliced = [None if _is_stack(leaf) else leaf for leaf in leaves]
    numbers = jnp.arange(_length(leaves, options), dtype=jnp.int32)

    def step(carry: Carry, number_and_slices: tuple[jax.Array, list[Any]]) -> tuple[Carry, Any]:
        number, slices = number_and_slices
        own = [
            leaf.replaced(layer=number) if _is_stack(leaf) else part
            for leaf, part in zip(leaves, slices, strict=True)
        ]
        return f(carry, jax.tree.unflatten(tree, own))

    return jax.lax.scan(step, init, (numbers, sliced), **options)


def layer_of(xs: Any, number: Int[Array, ""]) -> Any:
    """One of stacked layers, whichever: a slice of every leaf, or of an arranged QTensor a view of it.

    Args:
      xs: pytree whose leaves are stacked along their first axis.
      number: of the layer.
    """

    def own(leaf: Any) -> Any:
        if _is_stack(leaf):
            return leaf.replaced(layer=number)
        return jax.tree.map(lambda array: array[number], leaf)

    return jax.tree.map(own, xs, is_leaf=lambda leaf: isinstance(leaf, QTensor))


def _length(leaves: list[Any], options: dict[str, Any]) -> int:
    shapes = [jnp.shape(leaf) if not isinstance(leaf, QTensor) else leaf.shape for leaf in leaves]
    lengths = {shape[0] if shape else 0 for shape in shapes}
    if options.get("length") is not None:
        lengths.add(options["length"])
    if len(lengths) != 1 or () in shapes:
        raise ValueError(
            f"leaves must be stacked to one length, their shapes are {shapes}; "
            f"length={options.get('length')}"
        )
    if any(isinstance(leaf, QTensor) and leaf.layout and leaf.ndim < 3 for leaf in leaves):
        raise ValueError(f"weights must be stacked [layers, k, n], shapes are {shapes}")
    return lengths.pop()


def _is_stack(leaf: Any) -> bool:
    """Whether a kernel can read a layer of it in its place: of [layers, k, n]; others are sliced."""
    return isinstance(leaf, QTensor) and leaf.layout is not None and leaf.ndim == 3
