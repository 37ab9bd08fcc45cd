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

    Example:
      >>> import qjax
      >>> w = qjax.quantize(jnp.ones((3, 128, 128), jnp.bfloat16), "w4a16-g64", stacked=1)
      >>> x = jnp.ones((1, 128), jnp.bfloat16) / 128
      >>> y, _ = scan_layers(lambda x, w: (qjax.matmul(x, w), None), x, w)
      >>> y.shape
      (1, 128)
    """
    leaves, tree = jax.tree.flatten(xs, is_leaf=lambda leaf: isinstance(leaf, QTensor))
    sliced = [None if _is_arranged(leaf) else leaf for leaf in leaves]
    length = jax.tree.leaves(xs)[0].shape[0] if leaves else options["length"]
    numbers = jnp.arange(length, dtype=jnp.int32)

    def step(carry: Carry, number_and_slices: tuple[jax.Array, list[Any]]) -> tuple[Carry, Any]:
        number, slices = number_and_slices
        own = [
            leaf.replaced(layer=number) if _is_arranged(leaf) else part
            for leaf, part in zip(leaves, slices, strict=True)
        ]
        return f(carry, jax.tree.unflatten(tree, own))

    return jax.lax.scan(step, init, (numbers, sliced), **options)


def _is_arranged(leaf: Any) -> bool:
    return isinstance(leaf, QTensor) and leaf.layout is not None
