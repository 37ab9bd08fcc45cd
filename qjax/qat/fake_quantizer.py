# SPDX-License-Identifier: Apache-2.0
"""Stock Flax NNX layers that train with fake quantization.

A layer asks its ``promote_dtype`` hook for the arrays that it is about to multiply. Here a small module
stands there: it hands the layer its weight as it will be worth once quantized, and its input likewise
where the scheme quantizes activations. The layer's own weight stays the full-precision parameter that an
optimizer moves; scales that are trained are parameters of the hook.
"""

import math
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from qjax import activations, assignment, nnx_layers, qtensor
from qjax.assignment import Assignment
from qjax.nnx_layers import QuantizableLayer, QuantizedParam
from qjax.qat import form, lsq
from qjax.qat.form import Form
from qjax.qat.lsq import LearnedGrid
from qjax.qtensor import QTensor
from qjax.scheme import ActivationScheme, Recipe

Model = TypeVar("Model", bound=nnx.Module)


class LearnedScale(nnx.Param):
    """A scale or zero that is trained: ``wrt=nnx.Param`` has it, ``wrt=LearnedScale`` nothing else."""


class FixedScale(nnx.Variable):
    """A scale or zero that stays as it is."""


class FakeQuantizer(nnx.Module):
    """The hook of one layer; or of several that share a weight.

    Attributes:
      form: how the weight is going to be held.
      summed: which axes of the layer's input a product sums over, as `nnx_layers.summed_input` says.
      scale: of each tile, where it does not follow the weight.
      zero: likewise; None when symmetric.
      tensor_scale: over e4m3 scales.
      input_scale: of what the layer multiplies, where that is static.
    """

    def __init__(
        self,
        form: Form,
        summed: nnx_layers.SummedInput,
        grid: LearnedGrid | None = None,
        input_scale: nnx.Variable | None = None,
        *,
        learned: bool = True,
    ):
        """A hook with scales that follow the weight, or with a grid.

        Args:
          form: how the weight is going to be held.
          summed: which axes of the layer's input a product sums over.
          grid: scales and zeros; None: they follow the weight.
          input_scale: of a static scheme, a variable that other hooks may have too; None: it is dynamic.
          learned: whether the grid is trained.
        """
        self.form, self.summed = form, summed
        kind = LearnedScale if learned else FixedScale
        scale, zero, tensor_scale = (None, None, None) if grid is None else grid
        self.scale = nnx.data(None if scale is None else kind(scale))
        self.zero = nnx.data(None if zero is None else kind(zero))
        self.tensor_scale = nnx.data(None if tensor_scale is None else FixedScale(tensor_scale))
        self.input_scale = nnx.data(input_scale)

    @property
    def grid(self) -> LearnedGrid | None:
        """Scales and zeros as they are now; None: they follow the weight."""
        if self.scale is None:
            return None
        leaves = self.scale, self.zero, self.tensor_scale
        return LearnedGrid(*(None if leaf is None else leaf[...] for leaf in leaves))

    def __call__(
        self, args: tuple[Any, ...], *, dtype: Any = None, inexact: bool = True
    ) -> tuple[Any, ...]:
        """Flax's ``promote_dtype``, of an input, a weight and a bias."""
        x, w, *rest = args
        w = form.fake_quantize(w, self.form, self.grid)
        x, *others = nnx_layers.promote((x, w, *rest), dtype=dtype, inexact=inexact)
        scheme = self.form.scheme.activations
        if scheme is not None:
            summed = nnx_layers.summed_in(self.summed, x.ndim)
            if self.input_scale is None:
                x = activations.fake_quantize(x, scheme, summed)
            else:
                x = _by_static_scale(x, self.input_scale[...], scheme, summed)
        return (x, *others)

    def quantized(self, w: Float[Array, "..."]) -> QTensor:
        """The QTensor that the layer has been computing with."""
        q, scheme = form.quantize(w, self.form, self.grid), self.form.scheme.activations
        if self.input_scale is None or scheme is None:
            return q
        held = lsq.stored(LearnedGrid(self.input_scale[...]), scheme.format)
        return q.replaced(input_scale=held.scale)


def _by_static_scale(
    x: Float[Array, "*shape"],
    scale: Float[Array, ""],
    scheme: ActivationScheme,
    summed: tuple[int, ...],
) -> Float[Array, "*shape"]:
    """What a product makes of activations by a static scale, with LSQ's gradients."""
    grid = LearnedGrid(scale.reshape((1,) * x.ndim))
    features = math.prod(x.shape[a] for a in summed)
    rounded = lsq.fake_quantize(
        x, grid, scheme.format, x.shape, gradient_scale=lsq.gradient_scale(features, scheme.format)
    )
    return jnp.where(jnp.isnan(x), x, rounded)  # which integers have no code for


def with_hooks(model: Model, recipe: Recipe, dtype: Any = None) -> Model:
    """The same model, its variables too, with a hook in each layer that a recipe quantizes.

    Args:
      model: left as it is.
      recipe: which layers are to be held how.
      dtype: logical dtype of the QTensors later on; None: that of each weight.

    Raises:
      ValueError: no layer is quantized, one is already, or cannot be trained; the message begins with
        its path.
    """
    result = nnx.clone(model, variables=False)
    assigned = assignment.assign(result, recipe)
    for path in assigned.quantized:
        layer = assigned.layers[path]
        w = nnx_layers.weight_of(layer)
        if isinstance(w, QTensor):
            raise ValueError(
                f"{path}: already quantized to {w.format.name}; qjax.trainable makes its weights train"
            )
        if isinstance(layer.promote_dtype, FakeQuantizer):
            raise ValueError(f"{path}: trains with fake quantization already")
        _hook(path, assigned, _form(path, layer, assigned, dtype))
    assignment.warn_of_unmatched(assigned.unmatched_rules)
    return result


def trainable(model: Model, *, learned: bool = True, dtype: Any = jnp.float32) -> Model:
    """A quantized model as one that trains, beginning with exactly its codes.

    Weights are parameters again, with the values of the QTensors, and so is everything else; the layers'
    grids begin as they are, and so do the static scales of what they multiply, one for those layers of a
    module that begin with the same. What the layers compute in stays as it was.

    Args:
      model: with QTensors; left as it is.
      learned: whether scales and zeros are trained (LSQ), static input scales too; else weights are, on
        the grids as they are.
      dtype: of all parameters while they train.

    Raises:
      ValueError: no layer is quantized, or one cannot be trained; the message begins with its path.

    Example:
      >>> import qjax
      >>> model, _ = qjax.quantize_model(nnx.Sequential(nnx.Linear(64, 8, rngs=nnx.Rngs(0))), "w4a16-g64")
      >>> training = trainable(model)
      >>> again = quantized(training)
      >>> bool((again.layers[0].kernel[...].codes == model.layers[0].kernel[...].codes).all())
      True
    """
    result = nnx.clone(model)
    layers = dict(nnx_layers.quantizable_layers(result))
    hooks: dict[int, tuple[nnx.Variable, FakeQuantizer]] = {}
    of_inputs: dict[tuple[str, bytes], nnx.Variable] = {}
    for path, layer in layers.items():
        held = nnx_layers.variable_of(layer)
        q = held.get_value()
        if not isinstance(q, QTensor):
            continue
        if id(held) not in hooks:
            wanted = _trainable_form(path, layer, q)
            grid = None
            if learned or q.scale.dtype != jnp.float8_e8m0fnu:
                grid = form.starting_grid(q, path)
            input_scale = None
            if q.scheme.is_static:
                kind = LearnedScale if learned else FixedScale
                input_scale = of_inputs.setdefault(*_starting_input_scale(path, q, kind))
            hook = FakeQuantizer(wanted, _summed(path, layer), grid, input_scale, learned=learned)
            hooks[id(held)] = nnx.Param(qtensor.dequantize(q, dtype)), hook
        _train(layer, *hooks[id(held)])
    if not hooks:
        raise ValueError(
            "no layer of the model is quantized: qjax.fake_quant begins with plain weights"
        )
    _cast(result, dtype)
    return result


def quantized(model: Model, dtype: Any = None) -> Model:
    """A model that was trained with hooks, with QTensors in their place.

    The codes are those that the hooks computed with.

    Args:
      model: left as it is.
      dtype: of all other parameters; None: they stay as they trained.

    Raises:
      ValueError: no layer has a hook, or a weight holds NaN.
    """
    result = nnx.clone(model)
    done: dict[int, QuantizableLayer] = {}
    for _, layer in nnx_layers.quantizable_layers(result):
        hook, held = layer.promote_dtype, nnx_layers.variable_of(layer)
        if not isinstance(hook, FakeQuantizer):
            continue
        if id(held) in done:
            nnx_layers.share(layer, done[id(held)])
        else:
            nnx_layers.install(layer, hook.quantized(held.get_value()))
            done[id(held)] = layer
    if not done:
        raise ValueError(
            "no layer of the model trains with fake quantization: qjax.fake_quant first"
        )
    if dtype is not None:
        _cast(result, dtype)
    return result


def _form(path: str, layer: QuantizableLayer, assigned: Assignment, dtype: Any) -> Form:
    scheme = assigned.scheme(path)
    assert scheme is not None
    form.check_dynamic(path, scheme)
    _check_kind(path, layer)
    w = nnx_layers.weight_of(layer)
    stacked = nnx_layers.stacked_axes(layer)
    try:
        axis = nnx_layers.contraction_axes(layer)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    held = str(jnp.dtype(dtype or w.dtype))
    result = Form(
        scheme=scheme, axis=axis, shape=w.shape[stacked:], dtype=held, scale_dtype=held, name=path
    )
    _ = result.tile  # whether the group size divides the axis is known now, not in the first step
    return result


def _trainable_form(path: str, layer: QuantizableLayer, q: QTensor) -> Form:
    _check_kind(path, layer)
    return Form.of(q, path)


def _starting_input_scale(
    path: str, q: QTensor, kind: type[nnx.Variable]
) -> tuple[tuple[str, bytes], nnx.Variable]:
    """The first static scale of a layer's inputs, and what layers have alike that train one together.

    Calibration gives queries, keys and values the same scale, and gate and up, for they multiply the same
    array. Joined into one product they need one scale: so those of one module that begin equal stay so.
    """
    if q.input_scale is None:
        raise ValueError(f"{path}: {q.scheme.name} has no input scale yet, which calibration finds")
    alike = path.rpartition("/")[0], np.asarray(q.input_scale).tobytes()
    return alike, kind(jnp.array(q.input_scale))  # a copy: training may give buffers up


def _summed(path: str, layer: QuantizableLayer) -> nnx_layers.SummedInput:
    try:
        return nnx_layers.summed_input(layer)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _check_kind(path: str, layer: QuantizableLayer) -> None:
    if isinstance(layer, nnx.Embed):
        raise ValueError(
            f"{path}: a table of embeddings is read beside its layer's hooks and cannot be trained with "
            "fake quantization; leave it out of the recipe"
        )


def _hook(path: str, assigned: Assignment, wanted: Form) -> None:
    layer = assigned.layers[path]
    if path in assigned.shared:
        hook = assigned.layers[assigned.shared[path]].promote_dtype
    else:
        hook = FakeQuantizer(wanted, _summed(path, layer))
    nnx_layers.set_hooks(layer, promote_dtype=hook)


def _train(layer: QuantizableLayer, weight: nnx.Variable, hook: FakeQuantizer) -> None:
    """Puts a plain weight back; products stay qjax's, which take plain weights too."""
    setattr(layer, "kernel", weight)  # noqa: B010  Flax declares it with a type of its own
    nnx_layers.set_hooks(layer, promote_dtype=hook)


def _cast(model: nnx.Module, dtype: Any) -> None:
    """Casts every parameter that is an array of floats, but for learned scales, which stay float32."""
    for variable in nnx_layers.named_variables(model).values():
        value = variable.get_value()
        if isinstance(variable, QuantizedParam | LearnedScale) or not isinstance(
            variable, nnx.Param
        ):
            continue
        if jnp.issubdtype(value.dtype, jnp.floating):
            variable.set_value(jnp.array(value, dtype))  # a copy: training may give buffers up
