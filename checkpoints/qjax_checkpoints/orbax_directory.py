# SPDX-License-Identifier: Apache-2.0
"""qjax's own directory: arrays by Orbax, and beside them what arrays cannot say.

    config.json, tokenizer.json, ...    as in the directory that the model came from
    qjax.json                           format version; shapes, dtypes, each QTensor's static part;
                                        whether inputs are turned online and how keys and values are
                                        kept, which config.json cannot say
    arrays/                             the Orbax checkpoint: parameter path -> array, or -> codes,
                                        scale, zero, tensor_scale, input_scale, order, columns and
                                        outliers of a QTensor

It holds whatever a QTensor can be. Codes below 8 bits are stored as the bytes of
:mod:`pallas_kernels.packing`, however the model holds them to compute.
"""

import dataclasses
from collections.abc import Collection, Mapping
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.typing import DTypeLike

from pallas_kernels import packing
from qjax import QTensor, formats, input_order, kv_cache, nnx_layers, outliers
from qjax.nnx_layers import named_variables
from qjax.qtensor import plain, unpacked
from qjax.scheme import ActivationScheme
from qjax_checkpoints.directory import ARRAYS, CONFIG_FILE, DESCRIPTION_FILE
from qjax_checkpoints.json_file import read_json, write_json
from qjax_checkpoints.parameters import (
    check_found,
    check_numbers,
    check_positive,
    place,
    read_decoder_config,
)
from qjax_models import Decoder

_VERSION = 1
_PLAIN = ("codes", "scale", "zero", "tensor_scale")  # of a QTensor; the last two may be absent
# The input scale is there only if the scheme of activations is static, the order only if it is not that
# of the inputs; the last two together, or absent.
_LEAVES = (*_PLAIN, "input_scale", "order", "columns", "outliers")


def write_orbax(folder: Path, model: Decoder) -> None:
    """Writes the arrays of a model and their description into an existing directory."""
    arrays, parameters = {}, {}
    for path, variable in named_variables(model).items():
        value = variable.get_value()
        value = plain(value) if isinstance(value, QTensor) else value
        check_found(path, value)
        arrays[path] = _leaves(value) if isinstance(value, QTensor) else value
        parameters[path] = _describe(value) if isinstance(value, QTensor) else _abstract(value)
    description = {
        "format": "qjax",
        "version": _VERSION,
        # What activations are computed in; the parameters' own dtypes stand with them.
        "dtype": str(np.dtype(model.model.activations)),
        "online_hadamard": model.config.online_hadamard,
        "kv_cache": model.config.kv_cache,
        "parameters": parameters,
    }
    # In a thread of its own Orbax does not see an interrupt: seeing one, it would leave threads that
    # go on writing while the directory is being removed. Leaving the pool waits for the writing.
    with futures.ThreadPoolExecutor(max_workers=1) as pool:
        pool.submit(_write_arrays, folder / ARRAYS, arrays).result()
    write_json(folder / DESCRIPTION_FILE, description)


def _write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), arrays)


def load_orbax(path: Path, dtype: DTypeLike | None) -> tuple[Decoder, dict[str, Any]]:
    """Loads a directory that `write_orbax` wrote.

    Args:
        path: the directory.
        dtype: what plain arrays are cast to, and the logical dtype of QTensors; None: as stored.

    Returns:
        The model and its `config.json`.

    Raises:
        ValueError: written by a newer qjax, an incomplete or broken directory, NaN, or parameters
            other than `config.json` describes.
    """
    description = _read_description(path / DESCRIPTION_FILE)
    config = read_json(path / CONFIG_FILE)
    shape = read_decoder_config(config, where=path)
    shape = dataclasses.replace(
        shape,
        online_hadamard=description.get("online_hadamard", False),
        kv_cache=description.get("kv_cache"),
    )
    model = Decoder.abstract(shape, description["dtype"] if dtype is None else dtype)
    parameters = description["parameters"]
    kv_cache.expect(model)
    variables = named_variables(model)
    _check_parameters(path, parameters, {p: v.get_value().shape for p, v in variables.items()})
    arrays = _restore(path / ARRAYS, parameters, dtype, exact=kv_cache.scales_of(model))
    layers = dict(nnx_layers.quantizable_layers(model))
    for name, entry in parameters.items():
        value = arrays[name]
        if "format" in entry:
            try:
                value = _assemble(entry, value, dtype)
            except ValueError as error:
                raise ValueError(f"{path / DESCRIPTION_FILE}: parameter {name}: {error}") from error
        check_numbers(value, f"{path}: parameter {name}")
        if isinstance(value, QTensor):
            place(layers[name.rpartition("/")[0]], variables[name], value)
            continue
        if isinstance(variables[name], kv_cache.CacheScale):
            check_positive(value, f"{path}: parameter {name}")
        variables[name].set_value(value)
    return model, config


def _leaves(q: QTensor) -> dict[str, jax.Array]:
    present = {name: getattr(q, name) for name in _LEAVES}
    if q.format.bits < 8:
        present["codes"] = packing.pack(unpacked(q), q.format.bits)
    return {name: leaf for name, leaf in present.items() if leaf is not None}


def _abstract(array: jax.Array) -> dict[str, Any]:
    return {"shape": list(array.shape), "dtype": str(array.dtype)}


def _describe(q: QTensor) -> dict[str, Any]:
    """Returns everything of a QTensor but its arrays."""
    entry: dict[str, Any] = {
        "format": q.format.name,
        "shape": list(q.shape),
        "dtype": str(np.dtype(q.dtype)),
        "axis": list(q.axis),
        "tile": list(q.tile),
        "leaves": {name: _abstract(leaf) for name, leaf in _leaves(q).items()},
    }
    if q.activations is not None:
        activations = dataclasses.asdict(q.activations) | {"format": q.activations.format.name}
        # Said only where it is so: what was written before there were static scales reads the same.
        entry["activations"] = {k: v for k, v in activations.items() if k != "static" or v}
    return entry


def _assemble(
    entry: Mapping[str, Any], leaves: Mapping[str, jax.Array], dtype: DTypeLike | None
) -> QTensor:
    """Inverse of `_leaves` and `_describe` together."""
    activations = entry.get("activations")
    if activations is not None:
        format = formats.format_named(activations["format"])
        activations = ActivationScheme(**(activations | {"format": format}))
    format, codes = formats.format_named(entry["format"]), leaves["codes"]
    if format.bits < 8:
        codes = packing.unpack(codes, format.bits, entry["shape"][-1], signed=format.signed)
    q = QTensor.from_codes(
        **({name: leaves[name] for name in _PLAIN if name in leaves} | {"codes": codes}),
        format=format,
        axis=tuple(entry["axis"]),
        tile=tuple(entry["tile"]),
        dtype=entry["dtype"] if dtype is None else dtype,
        activations=activations,
    )
    if "input_scale" in leaves:
        q = q.replaced(input_scale=leaves["input_scale"])
        _check_input_scale(q)
    if "order" in leaves:
        input_order.check_axes(q.axis)
        input_order.check(leaves["order"], (*_stacked(q), q.shape[q.axis[0]]))
        q = q.replaced(order=leaves["order"])
    if "outliers" not in leaves:
        return q
    columns, held = leaves["columns"], leaves["outliers"]
    outliers.check(q.shape, columns, held, q.axis)
    return q.replaced(columns=columns, outliers=held)


def _check_input_scale(q: QTensor) -> None:
    scale, stacked = q.input_scale, _stacked(q)
    if scale.shape != stacked or scale.dtype != jnp.float32 or not bool((scale > 0).all()):
        raise ValueError(
            f"the static input scale must be positive, float32 {list(stacked)}; it is {scale.dtype} "
            f"{list(scale.shape)}"
        )


def _stacked(q: QTensor) -> tuple[int, ...]:
    """Leading axes of stacked weights."""
    return q.shape[: q.ndim - len(q.tile)]


def _read_description(path: Path) -> dict[str, Any]:
    description = read_json(path)
    version = description.get("version")
    if description.get("format") != "qjax" or not isinstance(version, int):
        raise ValueError(f"{path}: not the description of a qjax directory")
    if version > _VERSION:
        raise ValueError(
            f"{path}: version {version} of the format, this qjax reads up to {_VERSION}; update qjax"
        )
    parameters = description.get("parameters")
    if not isinstance(parameters, dict) or not _is_dtype(description.get("dtype")):
        raise ValueError(f"{path}: needs dtype and parameters")
    if not isinstance(description.get("online_hadamard", False), bool):
        raise ValueError(f"{path}: online_hadamard must be true or false")
    if description.get("kv_cache") not in (None, *kv_cache.SCHEMES):
        raise ValueError(
            f"{path}: kv_cache must be null or one of {', '.join(kv_cache.SCHEMES)}, not "
            f"{description['kv_cache']!r}"
        )
    for name, entry in parameters.items():
        if not _is_described(entry):
            raise ValueError(f"{path}: parameter {name}: its description is broken or incomplete")
    return description


def _is_described(entry: Any) -> bool:
    """Whether an entry has the form that `_abstract` or `_describe` give it."""
    match entry:
        case {"format": format, "axis": axis, "tile": tile, "leaves": dict(leaves)}:
            activations = entry.get("activations")
            return (
                format in formats.NAMES
                and _is_array(entry)
                and _are_sizes(tile)
                and 1 <= len(tile) <= len(entry["shape"])
                and isinstance(axis, list)
                and axis != []
                and all(type(a) is int and -len(tile) <= a < 0 for a in axis)
                and {"codes", "scale"} <= set(leaves) <= set(_LEAVES)
                and ("columns" in leaves) == ("outliers" in leaves)
                and all(map(_is_array, leaves.values()))
                and (activations is None or _are_activations(activations))
                and ("input_scale" not in leaves or (activations or {}).get("static", False))
            )
    return _is_array(entry) and "leaves" not in entry


def _are_activations(value: Any) -> bool:
    match value:
        case {"format": format, "group_size": size, "scale_format": "float" | "e8m0" as kind}:
            static = value.get("static", False)
            return (
                format in formats.NAMES
                and value.keys() <= {"format", "group_size", "scale_format", "static"}
                and (size is None or _are_sizes([size]))
                and isinstance(static, bool)
                and (not static or (size is None and kind == "float"))
            )
    return False


def _is_array(value: Any) -> bool:
    match value:
        case {"shape": shape, "dtype": dtype}:
            return _are_sizes(shape, least=0) and _is_dtype(dtype)
    return False


def _are_sizes(value: object, least: int = 1) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= least for n in value)


def _is_dtype(value: object) -> bool:
    try:
        return isinstance(value, str) and jnp.dtype(value) is not None
    except TypeError:
        return False


def _check_parameters(
    path: Path, parameters: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Checks that the description and `config.json` mean the same model."""
    if different := sorted(set(parameters) ^ set(shapes)):
        raise ValueError(
            f"{path / DESCRIPTION_FILE}: does not fit {CONFIG_FILE}: {len(different)} parameters "
            f"are only in one of them, such as {different[0]}"
        )
    for name, shape in shapes.items():
        if tuple(parameters[name]["shape"]) != shape:
            raise ValueError(
                f"{path / DESCRIPTION_FILE}: {name} has shape {parameters[name]['shape']}, "
                f"{CONFIG_FILE} asks for {list(shape)}"
            )


def _restore(
    path: Path, parameters: Mapping[str, Any], dtype: DTypeLike | None, exact: Collection[str]
) -> dict[str, Any]:
    """Restores all arrays; the plain ones are cast on the way, but for `exact` ones."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def abstract(entry: Mapping[str, Any], cast: DTypeLike | None) -> jax.ShapeDtypeStruct:
        stored = entry["dtype"] if cast is None else cast
        return jax.ShapeDtypeStruct(tuple(entry["shape"]), jnp.dtype(stored), sharding=sharding)

    tree = {
        name: {leaf: abstract(part, None) for leaf, part in entry["leaves"].items()}
        if "leaves" in entry
        else abstract(entry, None if name in exact else dtype)
        for name, entry in parameters.items()
    }
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(path.absolute(), tree)
    except Exception as error:  # Orbax and TensorStore raise many kinds, plain Exception too
        first = str(error).partition("\n")[0].partition(". See full")[0][:200]
        raise ValueError(f"{path}: the Orbax arrays cannot be restored: {first}") from error
