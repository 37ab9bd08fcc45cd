# SPDX-License-Identifier: Apache-2.0
"""One layer of a model: its weight to a QTensor, by the method asked for, and what is reported of it."""

import functools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from qjax import activations, compilation, low_rank, nnx_layers, qtensor, statistics
from qjax.algorithms import gptq, llm_int8, round_nearest
from qjax.assignment import Assignment
from qjax.method import Method
from qjax.nnx_layers import QuantizableLayer
from qjax.observation import Observed
from qjax.qtensor import QTensor
from qjax.report import LayerReport
from qjax.scheme import Scheme
from qjax.statistics import InputStatistics


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What calibration knows of the input of some layers.

    Attributes:
      statistics: of its rows.
      factors: of their Hessian, for each order and group size that a layer wants; filled as they are
        made, so that layers with one input share them.
      few: how many rows the layers really saw, where statistics of too few were filled up; else None.
    """

    statistics: InputStatistics
    factors: dict[tuple[gptq.Options, int | None], gptq.Factor]
    few: int | None = None

    @property
    def rows(self) -> int:
        """How many rows the layers saw."""
        return int(self.statistics.rows) if self.few is None else self.few

    @property
    def without_hessian(self) -> "Inputs":
        """The extremes and magnitudes alone: what a few rows say as well as many."""
        return replace(self, statistics=replace(self.statistics, hessian=None), factors={})

    @property
    def shortage(self) -> str:
        """In words, that there are fewer rows than inputs; empty if there are enough."""
        inputs = len(self.statistics.magnitude)
        return f"{self.rows} calibration tokens for {inputs} inputs" if self.rows < inputs else ""

    def factor(self, options: gptq.Options, group_size: int | None) -> gptq.Factor:
        """The factor of the Hessian for GPTQ."""
        key = options, group_size
        if key not in self.factors:
            assert self.statistics.hessian is not None
            self.factors[key] = gptq.factor(self.statistics.hessian, options, group_size)
        return self.factors[key]


def inputs_of(
    observed: Observed, prefix: str = "", few: Mapping[str, int] = MappingProxyType({})
) -> dict[str, Inputs]:
    """What is known of each layer's input, one object for layers that share it.

    Args:
      observed: of a module.
      prefix: its path in the model and a slash, to be put in front of the layers'.
      few: how many rows layers saw whose statistics were filled up, by their path in the module.
    """
    known = {}
    for layers, found in zip(observed.layers, observed.inputs, strict=True):
        inputs = Inputs(statistics=found, factors={}, few=few.get(layers[0]))
        known |= {prefix + path: inputs for path in layers}
    return known


def quantize_layer(
    path: str,
    assignment: Assignment,
    method: Method,
    inputs: Inputs | None = None,
    fallback: str = "",
) -> LayerReport:
    """Quantizes a layer in place, or leaves it, as an assignment says.

    Args:
      path: of the layer.
      assignment: of its model.
      method: how.
      inputs: what the layer multiplies; None: not known, and its weights are rounded to nearest.
      fallback: for the report: why so.

    Raises:
      ValueError: the weight cannot be quantized so, or its scheme is static and nobody saw what the
        layer multiplies; the message begins with the path.
    """
    layer, scheme = assignment.layers[path], assignment.scheme(path)
    if scheme is None:
        return _left_alone(path, layer, assignment.why_plain(path))
    if path in assignment.shared:
        earlier = assignment.shared[path]
        return _share(path, layer, scheme, earlier, assignment.layers[earlier])
    return replace(_quantize(path, layer, scheme, method, inputs), fallback=fallback)


def programs(
    paths: Sequence[str], assignment: Assignment, method: Method
) -> Iterator[jax.stages.Lowered]:
    """What :func:`quantize_layer` is going to run for some layers and takes long to compile.

    And what makes plain values of its result, for the blocks behind it.

    Args:
      paths: of the layers.
      assignment: of their model.
      method: how they are going to be quantized.

    Raises:
      ValueError: as :func:`quantize_layer` does.
    """
    options, found = method.rounding, set()
    for path in paths:
        layer, scheme = assignment.layers[path], assignment.scheme(path)
        if options is None or scheme is None or path in assignment.shared:
            continue
        w, axis = nnx_layers.weight_of(layer), _contraction_axes(path, layer)
        alike = w.shape, w.dtype, scheme, axis
        # Where arrays lie on several devices, those that are computed from them are not known yet.
        if isinstance(w, QTensor) or alike in found or len(w.sharding.device_set) > 1:
            continue
        lowered, q = gptq.programs(
            w, scheme, axis=axis, search=method.search, options=options, name=path
        )
        inputs = math.prod(w.shape[i] for i in axis)
        hessian = jax.ShapeDtypeStruct((inputs, inputs), jnp.float32)
        found.add(alike)
        yield from lowered
        yield _compared.lower(w, q, hessian)
        if scheme.activations is None:
            yield jax.jit(qtensor.dequantize).lower(q)  # jit knows functions again


def _quantize(
    path: str, layer: QuantizableLayer, scheme: Scheme, method: Method, inputs: Inputs | None
) -> LayerReport:
    start = time.perf_counter()
    if low_rank.adapter_of(layer) is not None:
        raise ValueError(
            f"{path}: has an adapter, which its weight belongs to; qjax.requantize_lora takes both"
        )
    w = nnx_layers.weight_of(layer)
    if isinstance(w, QTensor):
        raise ValueError(f"{path}: already quantized to {w.format.name}; start from the original")
    axis = _contraction_axes(path, layer)
    common: dict[str, Any] = {"axis": axis, "search": method.search, "name": path}
    hessian = None if inputs is None else inputs.statistics.hessian
    noted: dict[str, Any] = {}
    if inputs is not None and method.rounding is not None:
        factor = inputs.factor(method.rounding, scheme.weights.group_size)
        q = gptq.quantize(w, scheme, factor, options=method.rounding, **common)
        damping = float(factor.damping)
        doublings = round(math.log2(damping / method.rounding.damping))
        noted = {"damping": damping, "damping_raised": doublings}
    elif inputs is not None and method.outliers is not None:
        chosen = llm_int8.choose(inputs.statistics.absmax, method.outliers)
        q = llm_int8.quantize(w, scheme, chosen.columns, hessian=hessian, **common)
        noted = {"outliers": len(chosen.columns), "crowded_out": chosen.crowded_out}
    else:
        stacked = nnx_layers.stacked_axes(layer)
        q = round_nearest.quantize(w, scheme, stacked=stacked, hessian=hessian, **common)
    error, saturated = compared(w, q, inputs)
    if scheme.is_static:
        q = with_input_scale(path, q, inputs)
        noted["input_scale"] = float(q.input_scale)
    nnx_layers.install(layer, q)
    return LayerReport(
        path=path,
        scheme=scheme.name,
        method=(method.without_inputs if inputs is None else method).name,
        shape=tuple(w.shape),
        relative_output_error=error,
        bytes_before=w.nbytes,
        bytes_after=q.nbytes,
        seconds=time.perf_counter() - start,
        saturated=saturated,
        calibration_rows=None if inputs is None else inputs.rows,
        **noted,
    )


def with_input_scale(path: str, q: QTensor, inputs: Inputs | None) -> QTensor:
    """A weight of a static scheme with the scale of what it multiplied in calibration.

    Args:
      path: of its layer.
      q: the weight.
      inputs: what calibration knows.

    Raises:
      ValueError: nothing, or no token reached the layer.
    """
    assert q.activations is not None
    if inputs is None or not int(inputs.statistics.rows):
        raise ValueError(
            f"{path}: {q.scheme.name} has an input scale from calibration, which did not see what this "
            "layer multiplies; a scheme without -static needs none"
        )
    return q.replaced(input_scale=activations.static_scale(inputs.statistics.absmax, q.activations))


def _contraction_axes(path: str, layer: QuantizableLayer) -> tuple[int, ...]:
    try:
        return nnx_layers.contraction_axes(layer)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _share(
    path: str,
    layer: QuantizableLayer,
    scheme: Scheme,
    earlier_path: str,
    earlier: QuantizableLayer,
) -> LayerReport:
    """Gives a layer the QTensor of the earlier one; no bytes are counted twice."""
    ours, theirs = _contraction_axes(path, layer), nnx_layers.contraction_axes(earlier)
    if ours != theirs:
        raise ValueError(
            f"{path}: sums over axes {ours} of a weight that {earlier_path} shares and sums over "
            f"{theirs}; leave both plain"
        )
    if scheme.is_static:
        raise ValueError(
            f"{path}: shares the weight of {earlier_path} and multiplies other inputs, so that one "
            "static scale does not fit both; a scheme without -static does"
        )
    nnx_layers.share(layer, earlier)
    return LayerReport(
        path=path,
        scheme=scheme.name,
        method="rtn",
        shape=nnx_layers.weight_of(layer).shape,
        relative_output_error=None,
        bytes_before=0,
        bytes_after=0,
        seconds=0.0,
        reason=f"shares the weight of {earlier_path}",
    )


def _left_alone(path: str, layer: QuantizableLayer, reason: str) -> LayerReport:
    w = nnx_layers.weight_of(layer)
    return LayerReport(
        path=path,
        scheme=None,
        method=None,
        shape=tuple(w.shape),
        relative_output_error=None,
        bytes_before=w.nbytes,
        bytes_after=w.nbytes,
        seconds=0.0,
        reason=reason,
    )


def compared(w: Float[Array, "..."], q: QTensor, inputs: Inputs | None) -> tuple[float, int]:
    """What :class:`qjax.report.LayerReport` calls the relative output error, and infinite weights."""
    error, saturated = _compared(w, q, None if inputs is None else inputs.statistics.hessian)
    return float(error), int(saturated)


@functools.partial(jax.jit, compiler_options=compilation.WITHOUT_TRIALS)
def _compared(
    w: Float[Array, "..."], q: QTensor, hessian: Float[Array, "k k"] | None
) -> tuple[Float[Array, ""], Integer[Array, ""]]:
    """The relative error of the outputs, or without a Hessian of the finite weights; infinite ones."""
    near = qtensor.dequantize(q, jnp.float32)
    known = jnp.isfinite(w)
    if hessian is not None:
        rows = (gptq.as_inputs(leaf, q.axis) for leaf in (w, near))
        return statistics.relative_output_error(*rows, hessian), jnp.sum(~known)
    w = jnp.where(known, w.astype(jnp.float32), near)  # an infinity has no relative error
    wrong = jnp.linalg.norm(near - w)
    error = wrong / jnp.maximum(jnp.linalg.norm(w), jnp.finfo(jnp.float32).tiny)
    return error, jnp.sum(~known)
