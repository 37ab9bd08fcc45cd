# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters as directories in the layout of Hugging Face PEFT.

    adapter_config.json          rank, alpha, and which modules of the base have an adapter
    adapter_model.safetensors    base_model.model.MODULE.lora_A.weight    [rank, inputs]
                                 base_model.model.MODULE.lora_B.weight    [outputs, rank]

    y = W x + lora_alpha / r * B A x

Both factors are the transposes of what a layer here holds. Ranks and alphas that differ from those of
most layers stand in `rank_pattern` and `alpha_pattern`, under the modules' names.

References:
    Hugging Face PEFT, checkpoint format,
    https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from qjax import lora
from qjax.low_rank import Adapter, Factors
from qjax.nnx_layers import quantizable_layers, weight_of
from qjax.post_training import copied
from qjax_checkpoints.atomic import check_space, new_directory
from qjax_checkpoints.json_file import read_json, write_json
from qjax_checkpoints.parameters import check_numbers
from qjax_checkpoints.safetensors_file import SafetensorsFile, open_safetensors
from qjax_checkpoints.shards import PendingTensor, pending, write_safetensors
from qjax_models import Decoder
from qjax_models.joined import is_joined

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
# What would make an adapter compute something else than the formula above; PEFT's own defaults.
_EXPECTED = {
    "peft_type": "LORA",
    "bias": "none",
    "use_dora": False,
    "use_rslora": False,
    "fan_in_fan_out": False,
    "lora_bias": False,
    "modules_to_save": None,
    "trainable_token_indices": None,
    "target_parameters": None,
}


def save_adapter(model: Decoder, out: Path, *, base: str, dtype: DTypeLike | None = None) -> None:
    """Writes the adapters of a model, and nothing of its weights.

    Args:
        model: with adapters (`qjax.add_lora`).
        out: the directory to make; it must not exist. It appears when everything is written.
        base: the model that they belong to, as PEFT is to find it: a directory or a name on the hub.
            Adapters trained beside a quantized base correct its errors, too: they fit best to what its
            codes stand for, which `save` writes as `dense`.
        dtype: of the stored factors; None: as they are.

    Raises:
        ValueError: the model has no adapters, has one where PEFT's layout has no place for it (an expert,
            or joined projections), `out` exists or cannot be made, or the disk is full. Nothing is left
            then.
    """
    found = lora.adapters(model)
    if not found:
        raise ValueError("the model has no adapters to be saved; qjax.add_lora makes some")
    if is_joined(model):
        raise ValueError(
            "the model's projections or experts are joined (join_projections, stack_experts), and an "
            "adapter's file has them apart: add adapters to the model as it was before"
        )
    if expert := next((path for path in found if "/experts/" in path), None):
        raise ValueError(
            f"{expert}: PEFT's layout has no place for the adapter of one expert; merge it "
            "(qjax.merge_lora) and save the model"
        )
    tensors: dict[str, PendingTensor] = {}
    for path, adapter in found.items():
        for factor, array in zip("AB", adapter.factors, strict=True):
            cast = _transposed if dtype is None else _cast_to(dtype)
            tensors[_tensor_name(path, factor)] = pending(cast, array)
    check_space(out, sum(tensor.nbytes for tensor in tensors.values()))
    with new_directory(out) as folder:
        write_json(folder / CONFIG_FILE, _config(model, found, base))
        write_safetensors(folder / WEIGHTS_FILE, tensors)


def load_adapter(model: Decoder, path: Path | str) -> Decoder:
    """Puts the adapters of a directory beside the layers of a model.

    Args:
        model: the base, quantized or plain; it is left as it is.
        path: a directory in PEFT's layout, written by `save_adapter` or by PEFT.

    Returns:
        The model with frozen layers and trainable adapters, as `qjax.add_lora` makes it.

    Raises:
        ValueError: the directory is no adapter, one of a kind that computes something else, or does not
            fit the model; the message is one line that names the file or the tensor.
    """
    path = Path(path)
    config = _read_config(path / CONFIG_FILE)
    file = open_safetensors(path / WEIGHTS_FILE)
    result = copied(model)
    layers = dict(quantizable_layers(result))
    for module in _modules(file):
        layer_path = module.replace(".", "/")
        layer = layers.get(layer_path)
        if not isinstance(layer, nnx.Linear):
            raise ValueError(
                f"{file.path}: tensor {_tensor_name(layer_path, 'A')}: the model has no linear layer "
                f"{layer_path}"
            )
        rank = _value_for(config, module, "r", "rank_pattern")
        inputs, outputs = weight_of(layer).shape
        a = _factor(file, _tensor_name(layer_path, "A"), (rank, inputs))
        b = _factor(file, _tensor_name(layer_path, "B"), (outputs, rank))
        alpha = float(_value_for(config, module, "lora_alpha", "alpha_pattern"))
        lora.adapt(layer_path, layer, Factors(a, b), alpha)
    return result


def _tensor_name(path: str, factor: str) -> str:
    return f"base_model.model.{path.replace('/', '.')}.lora_{factor}.weight"


def _transposed(array: jnp.ndarray) -> jnp.ndarray:
    return jnp.transpose(array)


def _cast_to(dtype: DTypeLike):
    return lambda array: jnp.transpose(array).astype(dtype)


def _config(model: Decoder, found: Mapping[str, Adapter], base: str) -> dict[str, Any]:
    """What PEFT reads before the tensors; the keys that it has no default for, and ours."""
    modules = {path.replace("/", "."): adapter for path, adapter in found.items()}
    ranks = {module: adapter.rank for module, adapter in modules.items()}
    alphas = {module: _plain(adapter.alpha) for module, adapter in modules.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    every = [path.replace("/", ".") for path, _ in quantizable_layers(model)]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": _targets(list(modules), every),
        "rank_pattern": {module: r for module, r in ranks.items() if r != rank},
        "alpha_pattern": {module: a for module, a in alphas.items() if a != alpha},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_dora": False,
        "use_rslora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }


def _plain(alpha: float) -> int | float:
    """A whole number as such: PEFT declares alpha so."""
    return int(alpha) if float(alpha).is_integer() else float(alpha)


def _targets(modules: list[str], every: list[str]) -> list[str]:
    """Last names of modules where they mean all of that name, as PEFT takes them; else whole names."""
    last = {module.rpartition(".")[2] for module in modules}
    meant = {module for module in every if module.rpartition(".")[2] in last}
    return sorted(last if meant == set(modules) else modules)


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json(path)
    for key, expected in _EXPECTED.items():
        # Empty lists and dictionaries say as little as null.
        if (config.get(key, expected) or None) != (expected or None):
            raise ValueError(
                f"{path}: {key} is {config[key]!r}; adapters are read with {expected!r} only"
            )
    for key in ("r", "lora_alpha"):
        if type(config.get(key)) not in (int, float):
            raise ValueError(f"{path}: {key} must be a number, got {config.get(key)!r}")
    return config


def _value_for(config: Mapping[str, Any], module: str, key: str, pattern_key: str) -> Any:
    """A module's rank or alpha: of the first pattern that its name ends with, as in PEFT, or of all."""
    for pattern, value in (config.get(pattern_key) or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise ValueError(
                f"{CONFIG_FILE}: {pattern_key}: {pattern!r} is no regular expression: {error}"
            ) from error
    return config[key]


def _modules(file: SafetensorsFile) -> Iterator[str]:
    """The modules that an adapter's file has factors for; each must have both."""
    modules = {}
    for name in file.entries:
        if not (match := _TENSOR.fullmatch(name)):
            raise ValueError(
                f"{file.path}: tensor {name} is no factor of a low-rank adapter: "
                f"{_tensor_name('MODULE', 'A')} and ...lora_B.weight are"
            )
        modules.setdefault(match["module"], set()).add(match["factor"])
    if not modules:
        raise ValueError(f"{file.path}: holds no tensors")
    for module, factors in modules.items():
        for missing in {"A", "B"} - factors:
            raise ValueError(
                f"{file.path}: tensor {_tensor_name(module, missing)} is missing, the other half of the "
                "adapter is there"
            )
        yield module


def _factor(file: SafetensorsFile, name: str, expected: tuple[int, int]) -> jnp.ndarray:
    """A factor as a layer holds it, copied out of the mapped file."""
    stored = file.entry(name).shape
    if stored != expected:
        raise ValueError(
            f"{file.path}: tensor {name} has shape {list(stored)}, the layer and the rank in "
            f"{CONFIG_FILE} ask for {list(expected)}"
        )
    array = jnp.asarray(np.array(file.tensor(name).T))
    check_numbers(array, f"{file.path}: tensor {name}")
    return array
