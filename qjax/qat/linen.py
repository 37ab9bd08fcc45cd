# SPDX-License-Identifier: Apache-2.0
"""Fake quantization of Linen modules: by their ``apply``, or of what their layers multiply alone.

apply = fake_quant_apply(module.apply, recipe)          once; then as module.apply

with nn.intercept_methods(fake_quant_activations(recipe)):
    logits = module.apply({"params": qjax.fake_quant(params, recipe)}, x)
"""

import functools
from collections.abc import Callable
from typing import Any

from flax import linen as nn

from qjax import activations
from qjax.qat.fake_quant import fake_quant
from qjax.qat.form import check_dynamic
from qjax.qat.parameter_tree import Axes
from qjax.scheme import Recipe


def fake_quant_apply(
    apply: Callable[..., Any], recipe: str | Recipe, *, axes: Axes | None = None, dtype: Any = None
) -> Callable[..., Any]:
    """A Linen module's ``apply`` that computes as the quantized module will, weights and activations.

    Args:
      apply: of variables with ``"params"``, and whatever else.
      recipe: which layers are to be held how.
      axes: as in :func:`qjax.fake_quant`.
      dtype: as in :func:`qjax.fake_quant`.

    Returns:
      A function of the same arguments, for a loss or as ``apply_fn`` of a train state. The gradients of
      params pass straight through.

    Raises:
      ValueError: when it is called, as :func:`qjax.fake_quant` does, or a layer's scheme is static.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> module = nn.Dense(2, use_bias=False)
      >>> variables = module.init(jax.random.key(0), jnp.ones((1, 4)))
      >>> fake_quant_apply(module.apply, "w4a8")(variables, jnp.ones((1, 4))).shape
      (1, 2)
    """
    intercept = fake_quant_activations(recipe)

    @functools.wraps(apply)
    def applied(variables: Any, *args: Any, **kwargs: Any) -> Any:
        worth = fake_quant(variables["params"], recipe, axes=axes, dtype=dtype)
        with nn.intercept_methods(intercept):
            return apply({**variables, "params": worth}, *args, **kwargs)

    return applied


def fake_quant_activations(recipe: str | Recipe) -> Callable[..., Any]:
    """An interceptor that rounds the inputs of dense layers as a recipe's schemes say.

    ``nn.Dense`` and ``nn.DenseGeneral`` are reached, by their slash-joined paths.

    Args:
      recipe: which layers are to be held how; schemes without quantized activations change nothing.

    Returns:
      For ``flax.linen.intercept_methods``.

    Raises:
      ValueError: under it, in the call of a layer whose scheme is static.
    """
    known = Recipe.uniform(recipe) if isinstance(recipe, str) else recipe

    def intercept(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        layer = context.module
        if context.method_name != "__call__" or not isinstance(layer, nn.Dense | nn.DenseGeneral):
            return call(*args, **kwargs)
        scheme = known.scheme_for("/".join(layer.path))
        if scheme is None or scheme.activations is None:
            return call(*args, **kwargs)
        check_dynamic("/".join(layer.path), scheme)
        x, *others = args or (kwargs.pop("inputs"),)
        axis = layer.axis if isinstance(layer, nn.DenseGeneral) else -1
        axes = (axis,) if isinstance(axis, int) else tuple(axis)
        summed = tuple(sorted(a % x.ndim for a in axes))
        return call(activations.fake_quantize(x, scheme.activations, summed), *others, **kwargs)

    return intercept
