# SPDX-License-Identifier: Apache-2.0
"""The `quantization_config` of compressed-tensors: written minimally, read leniently.

Releases of compressed-tensors refuse keys that they do not know, and their schema moves; so a written
configuration has no key that is not needed and never a null. A read one may have any.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from qjax import formats
from qjax.qtensor import QTensor
from qjax.scheme import ActivationScheme
from qjax_checkpoints.compressed_tensors import layouts
from qjax_models.config_json import shown

METHOD = "compressed-tensors"
_MIXED = "mixed-precision"
_LINEAR = "Linear"  # the class name that stands for every linear layer
_REGEX = "re:"
_E8M0_STORAGE = {"scale_dtype": "torch.uint8"}  # how e8m0 is called there
# Formats of older releases; what they hold is sparse or shuffled for one kernel.
_REFUSED = ("sparse-bitmask", "sparse-24-bitmask", "marlin-24", "mxfp6-pack-quantized")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """One entry of `config_groups`: how the layers that `targets` name are held.

    Attributes:
        targets: layer names, `re:` regular expressions, or class names.
        weights: the arguments of the weights, as in the file.
        activations: those of the layers' inputs; None leaves them as they are.
    """

    targets: tuple[str, ...]
    weights: Mapping[str, Any]
    activations: Mapping[str, Any] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """What of a `quantization_config` decides how tensors are read.

    Attributes:
        groups: in file order.
        ignore: layers that stay plain, in the three forms of a target.
        notes: what else it says that is read with a difference, a line each.
        kv_cache: how keys and values are kept, one of `qjax.kv_cache.SCHEMES`; None: as they are.
    """

    groups: tuple[Group, ...]
    ignore: tuple[str, ...]
    notes: tuple[str, ...]
    kv_cache: str | None = None

    def group_of(self, layer: str) -> Group | None:
        """Returns the group of a linear layer: by its name, else by a pattern, else by its class."""
        if any(_matches(target, layer) for target in self.ignore):
            return None
        for kind in (_is_name, _is_pattern, _is_class):
            for group in self.groups:
                if any(kind(target) and _matches(target, layer) for target in group.targets):
                    return group
        return None


def _is_pattern(target: str) -> bool:
    return target.startswith(_REGEX)


def _is_class(target: str) -> bool:
    return target == _LINEAR


def _is_name(target: str) -> bool:
    return not _is_pattern(target) and not _is_class(target)


def _matches(target: str, layer: str) -> bool:
    """Says whether a target means a linear layer; patterns match from the start, as there."""
    if _is_pattern(target):
        return re.match(target.removeprefix(_REGEX), layer) is not None
    return target in (layer, _LINEAR)


def read_config(value: object, where: str) -> QuantizationConfig:
    """Reads the `quantization_config` of a `config.json`.

    Args:
        value: the object.
        where: the directory, for messages.

    Raises:
        ValueError: another method, a format that cannot be read, or groups in another form.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: quantization_config must be an object, not {shown(value)}")
    method = value.get("quant_method")
    if method != METHOD:
        raise ValueError(
            f"{where}: quantized by {method!r}; of quantized models only {METHOD} can be read"
        )
    groups = value.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ValueError(f"{where}: quantization_config has no config_groups")
    for format in (value.get("format"), *(_get(group, "format") for group in groups.values())):
        if format in _REFUSED:
            raise ValueError(f"{where}: the compressed-tensors format {format!r} cannot be read")
    ignore = value.get("ignore") or []
    if not _are_targets(ignore):
        raise ValueError(f"{where}: quantization_config: ignore must be {_TARGETS}")
    cache = value.get("kv_cache_scheme")
    kept = _read_cache(where, cache)
    return QuantizationConfig(
        groups=tuple(_read_group(where, name, group) for name, group in groups.items()),
        ignore=tuple(ignore),
        kv_cache=kept,
        notes=(_EXACT_CACHE,) if cache and kept is None else (),
    )


_EXACT_CACHE = "kv_cache_scheme is not used: the cache stays unquantized; only static e4m3 is read"
_FP8_CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}


def _read_cache(where: str, arguments: object) -> str | None:
    """Returns how keys and values are kept, if it is in a way that there is here."""
    if not arguments:
        return None
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{where}: kv_cache_scheme must be an object, not {shown(arguments)}")
    fits = all(arguments.get(key, right) == right for key, right in _FP8_CACHE.items())
    static = not arguments.get("dynamic", False)
    return "kv-fp8-static" if fits and static and "num_bits" in arguments else None


_TARGETS = "a list of layer names, class names and re: patterns"


def _get(value: object, key: str) -> Any:
    return value.get(key) if isinstance(value, Mapping) else None


def _read_group(where: str, name: str, group: object) -> Group:
    where = f"{where}: quantization_config {name}"
    targets, weights = _get(group, "targets"), _get(group, "weights")
    if not isinstance(targets, list) or not isinstance(weights, Mapping):
        raise ValueError(f"{where} needs targets and weights")
    if not _are_targets(targets):
        raise ValueError(f"{where}: targets must be {_TARGETS}")
    if _get(group, "output_activations"):
        raise ValueError(f"{where} quantizes outputs, which is not read")
    activations = _get(group, "input_activations") or None
    for arguments in (weights, activations):
        _check_arguments(where, arguments)
    return Group(targets=tuple(targets), weights=weights, activations=activations)


def _are_targets(value: object) -> bool:
    if not isinstance(value, list) or not all(isinstance(target, str) for target in value):
        return False
    try:
        for target in filter(_is_pattern, value):
            re.compile(target.removeprefix(_REGEX))
    except re.error:
        return False
    return True


def _check_arguments(where: str, arguments: object) -> None:
    """Checks the types in the arguments of weights or activations; any key may be absent or null."""
    if arguments is None:
        return
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{where}: arguments must be an object, not {shown(arguments)}")
    for key, (fits, right) in _ARGUMENT_TYPES.items():
        value = arguments.get(key)
        if value is not None and not fits(value):
            raise ValueError(f"{where}: {key!r} must be {right}, not {shown(value)}")


def _is_whole(value: object) -> bool:
    return type(value) is int and abs(value) < 2**31


def _is_block(value: object) -> bool:
    return (
        isinstance(value, list) and len(value) == 2 and all(_is_whole(n) and n > 0 for n in value)
    )


_ARGUMENT_TYPES: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "num_bits": (_is_whole, "a whole number"),
    "type": (lambda value: isinstance(value, str), "a string"),
    "strategy": (lambda value: isinstance(value, str), "a string"),
    "group_size": (_is_whole, "a whole number"),
    "block_structure": (_is_block, "two numbers, rows and columns of a block"),
    "symmetric": (lambda value: isinstance(value, bool), "true or false"),
}


def read_activations(arguments: Mapping[str, Any] | None) -> ActivationScheme | None:
    """Returns how a layer's input is quantized: by a static scale, or from its own values token by token.

    Scales over a whole batch are coarser than the latter, so they are read as this; and so are static
    scales of another kind than one for all inputs.

    Raises:
        ValueError: a number format that activations cannot take; without the layer's name.
    """
    if arguments is None:
        return None
    kind = (arguments.get("type") or "int", arguments.get("num_bits") or 8)
    known = {
        ("int", 8): formats.INT8,
        ("int", 4): formats.INT4,
        ("float", 8): formats.E4M3,
        ("float", 4): formats.E2M1,
    }
    if kind not in known or not arguments.get("symmetric", True):
        raise ValueError(f"activations of {json.dumps(dict(arguments))} cannot be read")
    grouped = arguments.get("strategy") in ("group", "tensor_group")
    powers = str(arguments.get("scale_dtype", "")).endswith("uint8")
    one_scale = arguments.get("strategy") in (None, "tensor") and not powers
    return ActivationScheme(
        format=known[kind],
        group_size=arguments.get("group_size") if grouped else None,
        scale_format="e8m0" if powers else "float",
        static=one_scale and not arguments.get("dynamic"),
    )


def is_dynamic(arguments: Mapping[str, Any] | None) -> bool:
    """Says whether activation scales are found at run time."""
    return arguments is None or arguments.get("dynamic") is True


def write_config(
    layers: Mapping[str, QTensor], unquantized: Iterable[str], kv_cache: str | None = None
) -> dict[str, Any]:
    """Returns the `quantization_config` of a model.

    Args:
        layers: the quantized layers by their dotted name.
        unquantized: every other linear layer, by its dotted name.
        kv_cache: how keys and values are kept, one of `qjax.kv_cache.SCHEMES`; None: as they are.

    Raises:
        ValueError: a layer that no format holds; without the layer's name.
    """
    members: dict[str, list[str]] = {}
    for name, q in layers.items():
        members.setdefault(json.dumps(_group(q)), []).append(name)
    groups = {
        # With a single group the class name stands for all linear layers but the ignored ones.
        f"group_{i}": {"targets": [_LINEAR] if len(members) == 1 else names} | json.loads(group)
        for i, (group, names) in enumerate(members.items())
    }
    held = {layouts.format_of(q) for q in layers.values()}
    if len(held) > 1:
        for group, names in zip(groups.values(), members.values(), strict=True):
            group["format"] = layouts.format_of(layers[names[0]])
    config = {
        "quant_method": METHOD,
        "format": held.pop() if len(held) == 1 else _MIXED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(unquantized),
    }
    if kv_cache is not None:
        config["kv_cache_scheme"] = _FP8_CACHE | {"dynamic": False}
    return config


def _group(q: QTensor) -> dict[str, Any]:
    """Returns a layer's entry of `config_groups`, without its targets."""
    format = layouts.format_of(q)
    group: dict[str, Any] = {"weights": _weight_arguments(q)}
    if q.activations is not None:
        group["input_activations"] = _activation_arguments(q)
        # Where a group names no format, compressed-tensors goes by the numbers, and takes packed
        # integers that meet integer activations for unpacked ones.
        if format == layouts.PACKED_INTEGERS:
            group["format"] = format
    return group


def _weight_arguments(q: QTensor) -> dict[str, Any]:
    arguments = _number(q.format) | {"symmetric": q.zero is None} | _strategy(q)
    if q.scale.dtype == jnp.float8_e8m0fnu:
        arguments |= _E8M0_STORAGE
    return arguments | {"dynamic": False}


def _number(format: formats.Format) -> dict[str, Any]:
    return {"num_bits": format.bits, "type": "int" if format.kind == "integer" else "float"}


def _strategy(q: QTensor) -> dict[str, Any]:
    if layouts.format_of(q) == layouts.NVFP4:
        return {"strategy": "tensor_group", "group_size": q.tile[0]}
    if q.format.kind == "float" and layouts.one_scale(q):
        return {"strategy": "tensor"}
    if q.format.kind == "float" and q.tile[1] > 1:
        side = layouts.block_size(q)
        return {"strategy": "block", "block_structure": [side, side]}
    if q.group_size is None:
        return {"strategy": "channel"}
    return {"strategy": "group", "group_size": q.tile[0]}


def _activation_arguments(q: QTensor) -> dict[str, Any]:
    scheme = q.activations
    assert scheme is not None
    arguments = _number(scheme.format) | {"symmetric": True, "dynamic": not scheme.static}
    if scheme.static:
        return arguments | {"strategy": "tensor"}
    if scheme.scale_format == "e8m0":
        arguments |= _E8M0_STORAGE
    if scheme.group_size is None or scheme.group_size >= q.shape[0]:
        return arguments | {"strategy": "token"}
    return arguments | {"strategy": "group", "group_size": scheme.group_size}
