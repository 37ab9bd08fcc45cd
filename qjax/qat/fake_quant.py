# SPDX-License-Identifier: Apache-2.0
"""The one line that makes a model train with fake quantization, whatever it is made of."""

from typing import Any

from flax import nnx

from qjax.qat import fake_quantizer, form, parameter_tree
from qjax.qat.lsq import LearnedGrid
from qjax.qat.parameter_tree import Axes, Weights
from qjax.scheme import Recipe


def fake_quant(
    model: Any,
    recipe: str | Recipe,
    grids: dict[str, LearnedGrid] | None = None,
    *,
    axes: Axes | None = None,
    dtype: Any = None,
) -> Any:
    """What a model is worth once it is quantized, for training it.

    A tree of arrays, such as the parameters of a Linen module, becomes the tree of what its weights will
    be worth, with gradients that pass straight through; activations are the affair of
    :func:`qjax.fake_quant_apply`. It belongs into the loss::

        loss = loss_fn(qjax.fake_quant(params, recipe), batch)

    An NNX module becomes one of the same variables whose layers do so themselves, activations included:
    once, before the optimizer is made, or in the loss like a tree.

    Args:
      model: an ``nnx.Module`` of stock layers, or a tree of arrays.
      recipe: which layers are to be held how; a scheme's name means that scheme everywhere.
      grids: scales and zeros that are trained beside a tree (:func:`qjax.learned_grids`); None: they
        follow the weights.
      axes: of a tree, as in :func:`qjax.qat.parameter_tree.weights_of`.
      dtype: logical dtype of the QTensors later on; None: that of each weight.

    Returns:
      The model, or the tree, to train with.

    Warns:
      UserWarning: a rule that decides for no layer.

    Raises:
      ValueError: the recipe quantizes nothing, or not all of what it names can be trained; the message
        begins with the layer's path. A grid or an axis is given for what is no quantized layer.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> params = {"kernel": jnp.ones((4, 2))}
      >>> slopes = jax.grad(lambda p: fake_quant(p, "w4a16-channel")["kernel"].sum())(params)
      >>> float(slopes["kernel"][0, 0])
      1.0
    """
    recipe = Recipe.uniform(recipe) if isinstance(recipe, str) else recipe
    if isinstance(model, nnx.Module):
        if grids is not None or axes is not None:
            raise ValueError(
                "a module knows its axes, and qjax.trainable gives it grids of its own"
            )
        return fake_quantizer.with_hooks(model, recipe, dtype)
    weights = parameter_tree.weights_of(model, recipe, axes, dtype)
    known = _known(grids, weights)
    return weights.map(
        lambda path, w: form.fake_quantize(w, weights.forms[path], known.get(path)), model
    )


def learned_grids(
    params: Any, recipe: str | Recipe, *, axes: Axes | None = None, dtype: Any = None
) -> dict[str, LearnedGrid]:
    """The first scales and zeros of a tree's weights, to be trained beside it (LSQ).

    They are those of rounding to nearest, under which nothing is cut off yet.

    Args:
      params: tree of arrays.
      recipe: which layers are to be held how.
      axes: as in :func:`fake_quant`.
      dtype: as in :func:`fake_quant`.

    Returns:
      A tree of parameters by the layers' paths.

    Raises:
      ValueError: as :func:`fake_quant` does, or scales are powers of two, which cannot be learned.

    Example:
      >>> import jax.numpy as jnp
      >>> learned_grids({"up": {"kernel": jnp.ones((4, 2))}}, "w4a16-channel")["up"].scale.shape
      (1, 2)
    """
    recipe = Recipe.uniform(recipe) if isinstance(recipe, str) else recipe
    weights = parameter_tree.weights_of(params, recipe, axes, dtype)
    grids: dict[str, LearnedGrid] = {}

    def remember(path: str, w: Any) -> Any:
        grids[path] = form.starting_grid(form.quantize(w, weights.forms[path]), path)
        return w

    weights.map(remember, params)
    return grids


def quantized_params(
    params: Any,
    recipe: str | Recipe,
    grids: dict[str, LearnedGrid] | None = None,
    *,
    axes: Axes | None = None,
    dtype: Any = None,
) -> Any:
    """The tree with QTensors of the codes that :func:`fake_quant` computed with.

    Args:
      params: tree of arrays as they trained: masters, not what :func:`fake_quant` made of them.
      recipe: as in training.
      grids: as in training.
      axes: as in training.
      dtype: as in training.

    Raises:
      ValueError: as :func:`fake_quant` does.
    """
    recipe = Recipe.uniform(recipe) if isinstance(recipe, str) else recipe
    weights = parameter_tree.weights_of(params, recipe, axes, dtype)
    known = _known(grids, weights)
    return weights.map(
        lambda path, w: form.quantize(w, weights.forms[path], known.get(path)), params
    )


def _known(grids: dict[str, LearnedGrid] | None, weights: Weights) -> dict[str, LearnedGrid]:
    """The grids that are given, each of a layer."""
    for path in grids or {}:
        if path not in weights.forms:
            raise ValueError(
                f"grids: {path!r} is no quantized layer; there are {', '.join(list(weights.forms)[:3])}"
            )
    return grids or {}
