# SPDX-License-Identifier: Apache-2.0
"""FP8 training of stock Flax NNX layers: hooks on their products, and histories that a step carries on.

    train_in_fp8(model)                                 once, when the model is made
    loss, grads = value_and_grad(loss_fn)(model, ...)   in each step, in place of nnx.value_and_grad
    end_fp8(model)                                      before the last steps, if they are to be plain

A layer stays the ``nnx.Linear`` that it was; its ``dot_general`` (``einsum_op``) becomes a product of
:mod:`qjax.low_precision.fp8_dot_general`. With current scaling that is a function, and nothing else
changes. With delayed scaling it is a small module that holds three :class:`AmaxHistory` variables, which
are no ``nnx.Param``: optimizers and ``wrt=nnx.Param`` leave them out. Their "gradients" are the histories
of the next step, and :func:`value_and_grad` puts them in their place.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PyTree

from qjax import assignment, formats, nnx_layers
from qjax.low_precision import amax_history, fp8_dot_general
from qjax.low_precision.fp8_dot_general import Histories
from qjax.nnx_layers import QuantizableLayer
from qjax.qtensor import QTensor
from qjax.scheme import Recipe, Scheme


class AmaxHistory(nnx.Variable):
    """Largest magnitudes of one operand in the last steps: :mod:`qjax.low_precision.amax_history`."""


class DelayedProduct(nnx.Module):
    """A product scaled by earlier steps, as ``dot_general=`` or ``einsum_op=`` of a stock layer.

    Example:
      >>> layer = nnx.Linear(4, 4, dot_general=DelayedProduct(), rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 4))).shape
      (2, 4)
    """

    def __init__(self, *, window: int = 16, margin: int = 0, leading: tuple[int, ...] = ()):
        """A product that has not seen anything yet.

        Args:
          window: steps whose largest magnitude counts.
          margin: powers of two of the range that are kept free above it.
          leading: shape of the stack of layers that ``nnx.vmap`` made and ``nnx.scan`` runs.

        Raises:
          ValueError: a window below 1 or a negative margin.
        """
        if margin < 0:
            raise ValueError(f"a margin is a number of powers of two, 0 or more, got {margin=}")
        self.margin = margin
        self.inputs = AmaxHistory(amax_history.empty(window, leading))
        self.kernel = AmaxHistory(amax_history.empty(window, leading))
        self.gradient = AmaxHistory(amax_history.empty(window, leading))

    def __call__(self, *args: Any, **kwargs: Any) -> Float[Array, "..."]:
        """The product of :func:`~qjax.low_precision.fp8_dot_general.dot_general`, or its einsum."""
        product = (
            fp8_dot_general.einsum if isinstance(args[0], str) else fp8_dot_general.dot_general
        )
        histories = Histories(self.inputs[...], self.kernel[...], self.gradient[...])
        return product(*args, histories=histories, margin=self.margin, **kwargs)


def train_in_fp8(
    model: nnx.Module,
    *,
    scaling: Literal["current", "delayed"] = "delayed",
    recipe: Recipe | None = None,
    window: int = 16,
    margin: int = 0,
) -> tuple[str, ...]:
    """Lets the linear layers of a model multiply in FP8, forward and backward.

    Embeddings, norms, the output head and routers stay as they are unless a rule names them.

    Args:
      model: with stock layers; changed in place.
      scaling: by the tensors themselves, or by their history.
      recipe: which layers; all if None. A rule's scheme says which: null, or one of e4m3 weights and
        activations such as ``fp8-dynamic``. In training each tensor has one scale.
      window: steps of a history.
      margin: powers of two of the range that are kept free.

    Returns:
      Paths of the layers that multiply in FP8 now.

    Raises:
      ValueError: no layer is left, a rule names a scheme that is not FP8, or a layer that cannot do it.

    Example:
      >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 2, rngs=nnx.Rngs(1)))
      >>> train_in_fp8(model, scaling="current")
      ('layers/0', 'layers/1')
    """
    if scaling not in ("current", "delayed"):
        raise ValueError(f"scaling is 'current' or 'delayed', got {scaling!r}")
    assigned = assignment.assign(model, recipe or Recipe.uniform("fp8-dynamic"))
    for path in assigned.quantized:
        _check(path, assigned.layers[path], assigned.scheme(path))
    for path in assigned.quantized:
        layer = assigned.layers[path]
        hook: Any = None
        if scaling == "delayed":
            leading = nnx_layers.weight_of(layer).shape[: nnx_layers.stacked_axes(layer)]
            hook = DelayedProduct(window=window, margin=margin, leading=leading)
        _install(layer, hook, margin)
    return tuple(assigned.quantized)


def end_fp8(model: nnx.Module) -> tuple[str, ...]:
    """Lets the layers that :func:`train_in_fp8` changed multiply in their own dtype again.

    For the last tenth of a run, which takes away half or more of what FP8 cost in loss: measured in
    docs/low_precision_training.md, suggested for four bits in NVIDIA, 2025 (arXiv:2509.25149).
    Parameters, and so the state of an optimizer, stay as they are; a jitted step is compiled once more.

    Args:
      model: with layers that multiply in FP8; changed in place. A function of the caller's own that was
        their ``dot_general`` before is not brought back; Flax's is.

    Returns:
      Paths of these layers.

    Raises:
      ValueError: there are none.

    Example:
      >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 2, rngs=nnx.Rngs(1)))
      >>> paths = train_in_fp8(model)
      >>> end_fp8(model)
      ('layers/0', 'layers/1')
    """
    paths = []
    for path, layer in nnx_layers.quantizable_layers(model):
        name, of_flax, _ = _products_of(layer)
        if _is_fp8(getattr(layer, name, None)):
            setattr(layer, name, nnx.static(of_flax))
            paths.append(path)
    if not paths:
        raise ValueError("no layer of the model multiplies in FP8: train_in_fp8(model) lets them")
    return tuple(paths)


def value_and_grad(loss_fn: Callable[..., Any], *, has_aux: bool = False) -> Callable[..., Any]:
    """``nnx.value_and_grad`` with regard to the ``nnx.Param`` of the first argument, a model.

    Histories of delayed scaling in the model advance by one step. A model without any gets exactly what
    ``nnx.value_and_grad`` gives.

    Args:
      loss_fn: of the model and whatever else.
      has_aux: whether it returns a loss and something more.

    Returns:
      A function of the same arguments; of what ``loss_fn`` returns, and the gradients.

    Example:
      >>> model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
      >>> paths = train_in_fp8(model)
      >>> loss, grads = value_and_grad(lambda model, x: jnp.sum(model(x)))(model, jnp.ones((1, 4)))
      >>> float(model.dot_general.inputs[0]), [str(path[-1]) for path, _ in nnx.to_flat_state(grads)]
      (1.0, ['bias', 'kernel'])
    """
    wanted = nnx.DiffState(0, nnx.Any(nnx.Param, AmaxHistory))
    differentiate = nnx.value_and_grad(loss_fn, argnums=wanted, has_aux=has_aux)

    @functools.wraps(loss_fn)
    def stepped(model: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        value, gradients = differentiate(model, *args, **kwargs)
        histories, of_params = nnx.split_state(gradients, AmaxHistory, ...)
        old = nnx.state(model, AmaxHistory)
        nnx.update(model, _advanced(old, histories))
        return value, of_params

    return stepped


def _advanced(old: PyTree, cotangents: PyTree) -> PyTree:
    """The next histories; of a layer that took no part in the step, the old one."""

    def next_one(path: Any, variable: nnx.Variable) -> nnx.Variable:
        cotangent = new[path][...]
        used = amax_history.was_used(cotangent)[..., None]
        return variable.replace(jnp.where(used, cotangent, variable[...]))

    new = dict(nnx.to_flat_state(cotangents))
    return nnx.from_flat_state([(p, next_one(p, v)) for p, v in nnx.to_flat_state(old)])


def _check(path: str, layer: QuantizableLayer, scheme: Scheme | None) -> None:
    assert scheme is not None, "of the layers to be quantized"
    inputs = scheme.activations
    if scheme.weights.format != formats.E4M3 or (
        inputs is None or inputs.format != formats.E4M3 or inputs.static
    ):
        raise ValueError(
            f"{path}: {scheme.name} is not trained in FP8: name fp8-dynamic, or null to leave it as it is"
        )
    if isinstance(layer, nnx.Embed):
        raise ValueError(f"{path}: a table of embeddings has no product to be done in FP8")
    if isinstance(nnx_layers.weight_of(layer), QTensor):
        raise ValueError(f"{path}: is quantized already; FP8 training starts from plain weights")


def _products_of(layer: QuantizableLayer) -> tuple[str, Callable[..., Any], Callable[..., Any]]:
    """Where a layer's hook is, and what stands there: Flax's function, or that of FP8."""
    if isinstance(layer, nnx.Einsum):
        return "einsum_op", jnp.einsum, fp8_dot_general.einsum
    return "dot_general", jax.lax.dot_general, fp8_dot_general.dot_general


def _is_fp8(hook: Any) -> bool:
    if isinstance(hook, functools.partial):
        return hook.func in (fp8_dot_general.dot_general, fp8_dot_general.einsum)
    return isinstance(hook, DelayedProduct)


def _install(layer: QuantizableLayer, hook: Any, margin: int) -> None:
    """Sets the hook of a layer: the module, or if None the function that scales by the tensors."""
    name, _, function = _products_of(layer)
    # Flax must be told: the attribute was declared to hold a function.
    as_function = nnx.static(functools.partial(function, margin=margin))
    setattr(layer, name, as_function if hook is None else nnx.data(hook))
    if isinstance(layer, nnx.LinearGeneral):
        layer.dot_general_cls = None  # which Flax would ask first
