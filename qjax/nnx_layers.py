# SPDX-License-Identifier: Apache-2.0
"""Stock Flax NNX layers that hold a QTensor where their weight was.

Flax gives each layer hooks for this, and nothing else is touched: the layer stays the ``nnx.Linear``
that it was. Two are needed. ``dot_general=`` (``einsum_op=``) computes the product; ``promote_dtype=``
must pass a QTensor on, where Flax's own would turn it into an array.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Num

from qjax import ops, qtensor
from qjax.qtensor import QTensor

QuantizableLayer = nnx.Linear | nnx.LinearGeneral | nnx.Einsum | nnx.Embed


_NEEDS_ONE_WEIGHT = (
    "quantizing by its inputs needs one weight for all rows; this layer has a batch of them"
)


class Router(nnx.Linear):
    """A linear layer whose outputs choose which experts a token goes to.

    It is small, and where it errs a token takes another way: it stays as it is unless a rule names it.
    """


class QuantizedParam(nnx.Variable):
    """A frozen weight: not an ``nnx.Param``, so ``wrt=nnx.Param`` leaves it out of training."""


def quantizable_layers(model: nnx.Module) -> Iterator[tuple[str, QuantizableLayer]]:
    """The layers of a model that can hold a QTensor, with their slash-joined paths, in order.

    A model that is itself such a layer goes by the name of its class: ``Linear``.
    """
    for path, module in nnx.iter_modules(model):
        if isinstance(module, QuantizableLayer):
            yield "/".join(map(str, path)) or type(module).__name__, module


def variable_of(layer: QuantizableLayer) -> nnx.Variable:
    """The variable that holds the layer's weight; two layers may share one."""
    return layer.embedding if isinstance(layer, nnx.Embed) else layer.kernel


def weight_of(layer: QuantizableLayer) -> Any:
    """The array or QTensor that the layer multiplies with, or looks up in; without arrays, its shape."""
    return variable_of(layer).get_value()


def named_variables(module: nnx.Module, prefix: str = "") -> dict[str, nnx.Variable]:
    """The variables of a module by their slash-joined path, behind that of the module if it is given.

    Args:
      module: with arrays, or shapes in place of them.
      prefix: ends with a slash, or is empty.
    """
    return {
        prefix + "/".join(map(str, path)): node
        for path, node in nnx.iter_graph(module)
        if isinstance(node, nnx.Variable)
    }


def contraction_axes(layer: QuantizableLayer) -> tuple[int, ...]:
    """The axes of the weight that the layer's product sums over, counted from the end.

    A table of embeddings is read a row at a time and, as a tied head, summed over its width.

    Raises:
      ValueError: an ``nnx.Einsum`` without an equation of its own, one that sums over nothing, or
        one with an ellipsis in the kernel.
    """
    match layer:
        case nnx.Embed():
            return (-1,)
        case nnx.Linear():
            return (-2,)
        case nnx.LinearGeneral():
            inputs, outputs = len(layer.in_features), len(layer.out_features)
            return tuple(range(-inputs - outputs, -outputs))
        case nnx.Einsum():
            if layer.einsum_str is None:
                raise ValueError("this nnx.Einsum gets its equation at each call; give it one")
            operands, _, result = layer.einsum_str.replace(" ", "").partition("->")
            letters = operands.split(",")[1]
            if "..." in letters:
                raise ValueError(f"{layer.einsum_str!r}: an ellipsis hides axes of the kernel")
            axes = tuple(i - len(letters) for i, c in enumerate(letters) if c not in result)
            if not axes:
                raise ValueError(f"{layer.einsum_str!r} sums over no axis of the kernel")
            return axes


def rows_of(layer: QuantizableLayer, x: Num[Array, "..."]) -> Num[Array, "rows k"]:
    """A layer's input as the rows that its weight, flattened to ``[k, n]``, is multiplied with.

    Raises:
      ValueError: the layer multiplies a batch of weights, or stacked ones.
    """
    summed = summed_axes(layer, x.ndim)
    kept = [i for i in range(x.ndim) if i not in summed]
    k = math.prod(x.shape[i] for i in summed)
    return jnp.transpose(x, (*kept, *summed)).reshape(-1, k)


# Which axes of a layer's input a product sums over: counted from either end, or an einsum's equation.
SummedInput = tuple[int, ...] | str


def summed_axes(layer: QuantizableLayer, ndim: int) -> tuple[int, ...]:
    """The axes of a layer's input that its product sums over, in the order of its weight's.

    Args:
      layer: multiplies all rows of its input with one weight.
      ndim: of the input.

    Raises:
      ValueError: the layer multiplies a batch of weights, or stacked ones.
    """
    if stacked_axes(layer):
        raise ValueError(_NEEDS_ONE_WEIGHT)
    return summed_in(summed_input(layer), ndim)


def summed_input(layer: QuantizableLayer) -> SummedInput:
    """The same for inputs of any number of axes, as a value; of stacked layers, for one of them.

    Raises:
      ValueError: the layer multiplies a batch of weights.
    """
    match layer:
        case nnx.Linear():
            return (-1,)
        case nnx.LinearGeneral() if not layer.batch_axis:
            return tuple(layer.axis)
        case nnx.Einsum() if layer.einsum_str is not None:
            return layer.einsum_str.replace(" ", "")
    raise ValueError(_NEEDS_ONE_WEIGHT)


def summed_in(summed: SummedInput, ndim: int) -> tuple[int, ...]:
    """The axes that :func:`summed_input` means in an input of so many.

    >>> summed_in((-1,), 3), summed_in("...d,dhk->...hk", 3)
    ((2,), (2,))

    Raises:
      ValueError: an equation multiplies a batch of weights.
    """
    if isinstance(summed, tuple):
        return tuple(sorted(a % ndim for a in summed))
    operands, _, result = summed.partition("->")
    given, kernel = operands.split(",")
    before, ellipsis, after = given.partition("...")
    letters = list(before) + [""] * (ndim - len(before + after) if ellipsis else 0) + list(after)
    if any(c in letters for c in kernel if c in result):
        raise ValueError(f"{_NEEDS_ONE_WEIGHT}: {operands!r}")
    return tuple(letters.index(c) for c in kernel if c not in result)


def stacked_axes(layer: QuantizableLayer) -> int:
    """How many leading axes of the weight stack layers that ``nnx.vmap`` made and ``nnx.scan`` runs."""
    match layer:
        case nnx.Embed() | nnx.Linear():
            own = 2
        case nnx.LinearGeneral():
            own = len(layer.batch_axis) + len(layer.in_features) + len(layer.out_features)
        case nnx.Einsum():
            own = len(layer.kernel_shape)
    return weight_of(layer).ndim - own


def install(layer: QuantizableLayer, q: QTensor) -> None:
    """Puts a QTensor where the layer's weight was, and sets the hooks that compute with it.

    Args:
      layer: a stock layer; changed in place.
      q: of the shape of the layer's weight.

    Raises:
      ValueError: the shapes differ.
    """
    shape = weight_of(layer).shape
    if q.shape != shape:
        raise ValueError(f"a QTensor of shape {q.shape} does not fit a layer's weight {shape}")
    _hold(layer, QuantizedParam(q))


def share(layer: QuantizableLayer, holder: QuantizableLayer) -> None:
    """Lets a layer compute with the very variable that another layer's QTensor lies in.

    Args:
      layer: a stock layer; changed in place.
      holder: a layer that :func:`install` was called for.
    """
    _hold(layer, variable_of(holder))


def _hold(layer: QuantizableLayer, variable: nnx.Variable) -> None:
    kind = "embedding" if isinstance(layer, nnx.Embed) else "kernel"
    # setattr, because Flax declares these attributes with the types it fills them with itself.
    setattr(layer, kind, variable)
    match layer:
        case nnx.Embed():
            set_hooks(layer, promote_dtype=promote_table)
        case nnx.Einsum():
            set_hooks(layer, promote_dtype=promote, einsum_op=ops.einsum)
        case _:
            set_hooks(layer, promote_dtype=promote, dot_general=ops.dot_general)


def set_hooks(layer: QuantizableLayer, **hooks: Any) -> None:
    """Sets hooks of a layer: functions, or modules whose variables are to be the model's.

    Args:
      layer: changed in place.
      hooks: by the names of Flax's attributes.
    """
    for name, hook in hooks.items():
        # Flax remembers of an attribute whether it held data, and a hook may have been a module before.
        setattr(layer, name, nnx.data(hook) if isinstance(hook, nnx.Module) else nnx.static(hook))


def quantized_layers(model: nnx.Module) -> dict[str, QTensor]:
    """The QTensors in a model by the path of their layer."""
    weights = ((path, weight_of(layer)) for path, layer in quantizable_layers(model))
    return {path: w for path, w in weights if isinstance(w, QTensor)}


def promote(args: tuple[Any, ...], *, dtype: Any = None, inexact: bool = True) -> tuple[Any, ...]:
    """Flax's ``promote_dtype`` for arguments among which a QTensor may be.

    All are cast to ``dtype``, or to the promoted dtype of all; a QTensor counts with its logical
    dtype, and only that changes: its codes and scales stay.
    """
    given = [a for a in args if a is not None]
    target = dtype or jnp.result_type(*(a.dtype for a in given))
    if inexact and not jnp.issubdtype(target, jnp.inexact):
        target = jnp.promote_types(jnp.float32, target)
    return tuple(
        a.astype(target)
        if isinstance(a, QTensor)
        else None
        if a is None
        else jnp.asarray(a, target)
        for a in args
    )


def promote_table(
    args: tuple[Any, ...], *, dtype: Any = None, inexact: bool = True
) -> tuple[Any, ...]:
    """The hook for ``nnx.Embed``, which takes rows of what this returns: a dequantized table.

    Under jit the table is not written out: XLA moves the lookup before the arithmetic. Code that
    may call :func:`qjax.take` itself does better outside jit too.
    """
    plain = tuple(qtensor.dequantize(a) if isinstance(a, QTensor) else a for a in args)
    return promote(plain, dtype=dtype, inexact=inexact)
