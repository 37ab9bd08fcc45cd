# SPDX-License-Identifier: Apache-2.0
"""Loading a compressed-tensors directory: quantized layers become QTensors, bit for bit.

A layer is quantized if the directory has its `weight_scale`; the configuration says how. So a layer
that a sloppy configuration targets but that was left plain is plain.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from qjax import formats, input_order, kv_cache, nnx_layers
from qjax.nnx_layers import named_variables
from qjax.qtensor import QTensor
from qjax_checkpoints.compressed_tensors import layouts
from qjax_checkpoints.compressed_tensors.config import (
    QuantizationConfig,
    is_dynamic,
    read_activations,
    read_config,
)
from qjax_checkpoints.compressed_tensors.layouts import LayerSpec
from qjax_checkpoints.directory import ModelDirectory
from qjax_checkpoints.parameters import (
    abstract_model,
    check_numbers,
    check_stored,
    fill,
    place,
)
from qjax_models import Decoder
from qjax_models.names import hf_tensors

_SUFFIXES = (
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_global_scale",
    "weight_shape",
    "weight_g_idx",
    "input_scale",
)
# Of static activations and of the KV cache as they are not read: not used, and said so in the notes.
_UNUSED = (
    ".input_scale",
    ".input_zero_point",
    ".input_global_scale",
    ".k_scale",
    ".v_scale",
    ".q_scale",
)
_FORMATS = {
    ("int", 2): formats.INT2,
    ("int", 3): formats.INT3,
    ("int", 4): formats.INT4,
    ("int", 8): formats.INT8,
    ("float", 4): formats.E2M1,
    ("float", 8): formats.E4M3,
}


def load_compressed(
    directory: ModelDirectory, dtype: DTypeLike | None
) -> tuple[Decoder, tuple[str, ...]]:
    """Loads a model that compressed-tensors can hold.

    Args:
        directory: the open directory; its configuration has a `quantization_config`.
        dtype: what plain tensors are cast to, and the logical dtype of quantized layers; codes and
            scales stay as they are stored.

    Returns:
        The model, and a line for everything that was read with a difference.

    Raises:
        ValueError: the configuration or a tensor cannot be read, or they do not fit each other; the
            message names the layer.
    """
    config = read_config(directory.config["quantization_config"], str(directory.path))
    config = _with_scales_of_cache(config, directory)
    model = abstract_model(directory, dtype, config.kv_cache)
    kv_cache.expect(model)
    parts = _parts(_quantized_layers(directory))
    plain = {name: value for name, value in hf_tensors(model).items() if name not in parts}
    check_stored(
        model,
        directory,
        wanted=plain,
        names=[
            name
            for name in directory
            if name in plain or (name not in parts and not name.endswith(_UNUSED))
        ],
    )
    static = fill_compressed(model, directory, config, dtype)
    notes = list(config.notes)
    if static:
        notes.append(
            f"{static} layers are said to have static input scales, but there is not one for all inputs: "
            "their inputs are quantized from their own values"
        )
    return model, tuple(notes)


def _with_scales_of_cache(
    config: QuantizationConfig, directory: ModelDirectory
) -> QuantizationConfig:
    """Leaves the cache as it is where the directory has no scale for it."""
    if config.kv_cache is None or any(name.endswith(".k_scale") for name in directory):
        return config
    note = "kv_cache_scheme is not used, for there are no scales: the cache stays unquantized"
    return dataclasses.replace(config, kv_cache=None, notes=(*config.notes, note))


def fill_compressed(
    module: nnx.Module,
    directory: ModelDirectory,
    config: QuantizationConfig,
    dtype: DTypeLike | None = None,
    prefix: str = "",
) -> int:
    """Puts arrays and QTensors of a directory into a model, or into a part of it.

    Args:
        module: a decoder or a module of one, with arrays or shapes; changed in place.
        directory: the open directory.
        config: of its quantized layers.
        dtype: what plain tensors are cast to; None leaves each as it is stored.
        prefix: the module's path and a slash; empty for a decoder.

    Returns:
        How many layers have static input scales that are not used.

    Raises:
        ValueError: a layer cannot be read; the message names it.
    """
    quantized = [
        name for name in _quantized_layers(directory) if f"{name}.".startswith(_dotted(prefix))
    ]
    parts = _parts(quantized)
    plain = {name: v for name, v in hf_tensors(module, prefix).items() if name not in parts}
    fill(named_variables(module, prefix), directory, wanted=plain, dtype=dtype)
    layers = {prefix + path: layer for path, layer in nnx_layers.quantizable_layers(module)}
    if isinstance(module, nnx_layers.QuantizableLayer):
        layers = {prefix.removesuffix("/"): module}
    static = 0
    for name in quantized:
        layer = layers.get(name.replace(".", "/"))
        try:
            static += not _install(directory, config, name, layer)
        except ValueError as error:
            raise ValueError(f"{directory.path}: layer {name}: {error}") from error
    return static


def _dotted(path: str) -> str:
    return path.replace("/", ".")


def _parts(layers: Iterable[str]) -> set[str]:
    """The names that the tensors of quantized layers can have."""
    return {f"{layer}.{suffix}" for layer in layers for suffix in _SUFFIXES}


def _quantized_layers(directory: ModelDirectory) -> list[str]:
    """The layers of which the directory has scales, in file order."""
    ending = ".weight_scale"
    return [name.removesuffix(ending) for name in directory if name.endswith(ending)]


def _install(
    directory: ModelDirectory, config: QuantizationConfig, name: str, layer: nnx.Module | None
) -> bool:
    """Reads one layer into its place; returns whether its inputs are quantized as the file says."""
    if not isinstance(layer, nnx.Linear):
        raise ValueError("has a weight_scale, but the model has no linear layer of this name")
    group = config.group_of(name)
    if group is None:
        raise ValueError("has a weight_scale, but no entry of config_groups targets it")
    tensors = {
        suffix: directory.tensor(f"{name}.{suffix}")
        for suffix in _SUFFIXES
        if f"{name}.{suffix}" in directory
    }
    inputs, outputs = layer.kernel.get_value().shape
    activations = read_activations(group.activations)
    if activations is not None and activations.static and "input_scale" not in tensors:
        activations = dataclasses.replace(activations, static=False)
    static = activations is not None and activations.static
    spec = LayerSpec(
        **_weight_spec(group.weights, (inputs, outputs)),
        dtype=np.dtype(layer.kernel.get_value().dtype),
        activations=activations,
    )
    q = _decode({k: v for k, v in tensors.items() if static or k != "input_scale"}, spec)
    check_numbers(q, "codes and scales")
    place(layer, layer.kernel, q)
    for suffix in tensors:
        directory.release(f"{name}.{suffix}")
    return static or is_dynamic(group.activations)


def _weight_spec(arguments: Mapping[str, Any], shape: tuple[int, int]) -> dict[str, Any]:
    """Returns the fields of a LayerSpec that the weight arguments decide."""
    number = (arguments.get("type") or "int", arguments.get("num_bits") or 8)
    if number not in _FORMATS:
        raise ValueError(f"weights of type {number[0]} with {number[1]} bits cannot be read")
    inputs, outputs = shape
    size = arguments.get("group_size")
    match _strategy(arguments):
        case "tensor":
            tile = (inputs, outputs)
        case "channel":
            tile = (inputs, 1)
        case "group" | "tensor_group" if isinstance(size, int) and size > 0:
            tile = (min(size, inputs), 1)
        case "block" if len(arguments.get("block_structure") or ()) == 2:
            rows, columns = arguments["block_structure"]
            tile = (columns, rows)
        case strategy:
            raise ValueError(f"weights with strategy {strategy!r}, {size=} cannot be read")
    return {
        "format": _FORMATS[number],
        "shape": shape,
        "tile": tile,
        "symmetric": arguments.get("symmetric") is not False,
    }


def _strategy(arguments: Mapping[str, Any]) -> str:
    """Returns the strategy, which may be left to follow from the group size."""
    if arguments.get("strategy"):
        return arguments["strategy"]
    size = arguments.get("group_size")
    return "tensor" if size is None else "group" if size > 0 else "channel"


def _decode(tensors: dict[str, np.ndarray], spec: LayerSpec) -> QTensor:
    """Checks a layer's tensors and decodes them."""
    _check_groups(tensors, spec)
    if tuple(tensors.pop("weight_shape", spec.shape[::-1])) != spec.shape[::-1]:
        raise ValueError(f"weight_shape is not the {list(spec.shape[::-1])} of config.json")
    if spec.symmetric:
        tensors.pop("weight_zero_point", None)
    needed = {"weight_scale", "weight_packed" if "weight_packed" in tensors else "weight"}
    if not spec.symmetric:
        needed.add("weight_zero_point")
    needed |= tensors.keys() & {"weight_g_idx"}
    if "input_scale" in tensors:
        needed.add("input_scale")
        _check_input_scale(tensors["input_scale"])
    if spec.format == formats.E2M1 and tensors["weight_scale"].dtype != np.uint8:
        needed.add("weight_global_scale")
    if set(tensors) != needed:
        raise ValueError(f"needs {sorted(needed)}, has {sorted(tensors)}")
    arrays = {}
    for suffix, tensor in tensors.items():
        if suffix in ("weight", "weight_packed") and tensor.dtype != spec.code_dtype(suffix):
            raise ValueError(
                f"{suffix} is {tensor.dtype}, {spec.format.name} needs {spec.code_dtype(suffix)}"
            )
        expected = spec.stored_shape(suffix, tensor.dtype)
        if _without_ones(tensor.shape) != _without_ones(expected):
            raise ValueError(
                f"{suffix} has shape {list(tensor.shape)}, {spec.format.name} in tiles of "
                f"{list(spec.tile[::-1])} needs {list(expected)}"
            )
        # A copy: the CPU device would keep the mapped file itself as its buffer.
        arrays[suffix] = jnp.asarray(np.array(tensor).reshape(expected))
    return layouts.decode(arrays, spec)


def _check_input_scale(scale: np.ndarray) -> None:
    values = np.asarray(scale, np.float32)
    if not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(f"input_scale must be a positive number, it is {values.tolist()}")


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape up to axes of length one: scales are stored as `[]`, `[1]` or `[out]` too."""
    return tuple(n for n in shape if n != 1)


def _check_groups(tensors: dict[str, np.ndarray], spec: LayerSpec) -> None:
    """Leaves a `weight_g_idx` only where it says more than that groups are runs of the inputs."""
    groups = tensors.pop("weight_g_idx", None)
    inputs, size = spec.shape[0], spec.tile[0]
    if groups is None or np.all(groups == -1):
        return
    if groups.dtype.kind != "i" or groups.shape != (inputs,):
        raise ValueError(
            f"weight_g_idx must be integers {[inputs]}, it is {groups.dtype} {list(groups.shape)}"
        )
    try:
        order = input_order.of_groups(groups, size)
    except ValueError as error:
        raise ValueError(f"weight_g_idx: {error}") from error
    if not np.array_equal(order, np.arange(inputs)):
        tensors["weight_g_idx"] = groups
