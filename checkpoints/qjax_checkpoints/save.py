# SPDX-License-Identifier: Apache-2.0
"""The one door out: a model directory, whole or not at all."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qjax import QTensor, Recipe, dequantize
from qjax.formats import device_bytes
from qjax.lora import adapters
from qjax.nnx_layers import named_variables
from qjax_checkpoints.atomic import check_space, check_writable, new_directory
from qjax_checkpoints.checkpoint import Checkpoint
from qjax_checkpoints.compressed_tensors.write import (
    check_nothing_online,
    compressed,
    encoded,
)
from qjax_checkpoints.directory import CONFIG_FILE
from qjax_checkpoints.json_file import write_json
from qjax_checkpoints.orbax_directory import write_orbax
from qjax_checkpoints.outline import outline
from qjax_checkpoints.parameters import pending_parameter, stored_values
from qjax_checkpoints.shards import SHARD_BYTES, PendingTensor, pending, write_weights
from qjax_models import Decoder, config_from_hf
from qjax_models.joined import is_joined
from qjax_models.names import Layout

FORMATS = ("compressed-tensors", "orbax", "dense")

REPORT_FILE = "qjax_report.json"
# What describes a model beside its weights and its configuration.
_COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "chat_template*",
    "LICEN[CS]E*",
    "NOTICE*",
    "COPYING*",
    "USE_POLICY*",
)


def save(
    model: Decoder,
    source: Checkpoint,
    out: Path,
    format: str,
    report: Mapping[str, Any] | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a model with everything that belongs to it.

    Args:
        model: the model to write; it may hold QTensors.
        source: where it came from: its configuration, tokenizer and licence go along.
        out: the directory to make; it must not exist. It appears when everything is written.
        format: one of `FORMATS`. `compressed-tensors` and `dense` (plain arrays, QTensors
            dequantized) are Hugging Face directories; `orbax` is qjax's own, it holds everything.
        report: written beside the weights as `qjax_report.json`.
        shard_bytes: size above which Hugging Face weights are split.

    Raises:
        ValueError: no such format, `out` exists or cannot be made, the format does not hold a layer
            (named), the model has adapters or joined projections, or the disk is full. Nothing is left
            then.
    """
    if is_joined(model):
        raise ValueError(
            "the model's projections or experts are joined (join_projections, stack_experts), and files "
            "have them apart: "
            "save the model as it was before"
        )
    if adapters(model):
        raise ValueError(
            "the model has adapters, which these formats have no place for: merge them (qjax.merge_lora, "
            "qjax.requantize_lora), or write them by themselves (save_adapter)"
        )
    check_writable(out)
    config = plain_config(model, source.config)
    tensors: dict[str, PendingTensor] = {}
    match format:
        case "compressed-tensors":
            tensors, config["quantization_config"] = compressed(model)
        case "dense":
            check_nothing_online(model)
            _check_exact_cache(model)
            for name, layout, value in stored_values(model):
                tensors[name] = _pending_dense(value, layout)
        case "orbax":
            pass  # Orbax takes the model as it is
        case _:
            raise ValueError(f"unknown format {format!r}; there are {', '.join(FORMATS)}")
    weights = sum(tensor.nbytes for tensor in tensors.values())
    check_space(out, weights or device_bytes(nnx.state(model)))
    with new_directory(out) as folder:
        copy_companions(source.path, folder)
        write_json(folder / CONFIG_FILE, config)
        if report is not None:
            write_json(folder / REPORT_FILE, dict(report))
        if format == "orbax":
            write_orbax(folder, model)
        else:
            write_weights(folder, tensors, shard_bytes=shard_bytes)


def check_format(model: Decoder, recipe: Recipe, format: str) -> None:
    """Checks that a format will hold what a recipe makes of a model: before the work, not after it.

    Args:
        model: not quantized yet.
        recipe: how it is going to be.
        format: one of `FORMATS`.

    Raises:
        ValueError: the format does not hold a layer (named), a group size does not divide it, or the
            recipe quantizes none.
    """
    if format == "compressed-tensors":
        compressed(outline(model, recipe))


def written_bytes(model: Decoder, format: str) -> dict[str, int]:
    """Returns the bytes of a model's tensors in a format, added up for each layer, by its path.

    What a file says of its tensors comes on top.

    Args:
        model: quantized or not; shapes in place of arrays will do (`outline`).
        format: `compressed-tensors` or `orbax`.

    Raises:
        ValueError: the format does not hold a layer (named).
    """
    if format == "orbax":
        sizes = {
            path: device_bytes(variable.get_value())
            for path, variable in named_variables(model).items()
        }
    else:
        tensors, _ = encoded(model)
        sizes = {name.replace(".", "/"): tensor.nbytes for name, tensor in tensors.items()}
    total: dict[str, int] = {}
    for path, size in sizes.items():
        layer = path.rpartition("/")[0]
        total[layer] = total.get(layer, 0) + size
    return total


def plain_config(model: Decoder, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the configuration of the model as if nothing were quantized, with its dtype and head."""
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    tied = model.config.tied_embeddings
    if tied != config_from_hf(config).tied_embeddings:  # its head was untied
        config["tie_word_embeddings"] = tied
    dtype = str(np.dtype(model.model.activations))
    # transformers before version 5 calls it torch_dtype.
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    return config | dict.fromkeys(keys, dtype)


def _check_exact_cache(model: Decoder) -> None:
    if model.config.kv_cache is not None:
        raise ValueError(
            f"the model keeps keys and values as {model.config.kv_cache}, which a plain directory cannot "
            "say; --format orbax does, and compressed-tensors if it is kv-fp8-static"
        )


def _pending_dense(value: jax.Array | QTensor, layout: Layout) -> PendingTensor:
    if not isinstance(value, QTensor):
        return pending_parameter(value, layout)
    return pending(_dequantized_kernel if layout == "linear" else dequantize, value)


def _dequantized_kernel(q: QTensor) -> jax.Array:
    return jnp.transpose(dequantize(q))


def copy_companions(source: Path, folder: Path) -> None:
    """Copies what describes a model beside its weights: tokenizer, licence."""
    for pattern in _COMPANIONS:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
