# SPDX-License-Identifier: Apache-2.0
"""Fake quantization of what Linen layers multiply, by Flax's own method interceptors.

with nn.intercept_methods(fake_quant_activations(recipe)):
    logits = module.apply({"params": qjax.fake_quant(params, recipe)}, x)
"""

from collections.abc import Callable
from typing import Any

from flax import linen as nn

from qjax import activations
from qjax.qat.form import check_dynamic
from qjax.scheme import Recipe


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
