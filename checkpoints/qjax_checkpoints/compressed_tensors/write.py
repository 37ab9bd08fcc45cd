# SPDX-License-Identifier: Apache-2.0
"""Writing a model as compressed-tensors: QTensors in its layouts, everything else as it is."""

from typing import Any

from flax import nnx

from qjax import QTensor, nnx_layers
from qjax_checkpoints.compressed_tensors import layouts
from qjax_checkpoints.compressed_tensors.config import write_config
from qjax_checkpoints.parameters import check_found, pending_parameter, stored_values
from qjax_checkpoints.shards import PendingTensor
from qjax_models import Decoder, DecoderConfig

_HEAD = "lm_head"


def compressed(model: Decoder) -> tuple[dict[str, PendingTensor], dict[str, Any]]:
    """Returns the tensors of a model and its `quantization_config`.

    Args:
        model: shapes in place of arrays will do, for tensors that are never computed.

    Raises:
        ValueError: no layer is quantized, or one in a way that no format holds (the message names
            the layer); or the model turns activations at run time.
    """
    check_nothing_online(model)
    _check_cache(model.config)
    tensors, layers = encoded(model)
    if not layers:
        raise ValueError("no layer is quantized; --format dense writes a plain model")
    return tensors, write_config(layers, _plain_layers(model, layers), model.config.kv_cache)


def encoded(
    module: nnx.Module, prefix: str = ""
) -> tuple[dict[str, PendingTensor], dict[str, QTensor]]:
    """Returns the tensors of a model or a part of it, and its QTensors by their layer's dotted name.

    Args:
        module: a decoder or a module of one; with shapes in place of arrays the tensors have theirs.
        prefix: the module's path and a slash; empty for a decoder.

    Raises:
        ValueError: a layer is quantized in a way that no format holds, or a scale of the cache has not
            been found; the message names it.
    """
    tensors: dict[str, PendingTensor] = {}
    layers: dict[str, QTensor] = {}
    for name, layout, value in stored_values(module, prefix):
        if isinstance(value, QTensor):
            layer = name.removesuffix(".weight")
            layers[layer] = value
            check_held(layer, value)
            tensors |= {f"{layer}.{key}": part for key, part in layouts.encode(value).items()}
        else:
            check_found(name, value)
            tensors[name] = pending_parameter(value, layout)
    return tensors, layers


def check_nothing_online(model: Decoder) -> None:
    """Checks that a model is one that Hugging Face directories describe: no product's input is turned.

    Raises:
        ValueError: it is not.
    """
    if model.config.online_hadamard:
        raise ValueError(
            "rotated for activations of 4 bits, the model turns the inputs of down_proj at run "
            "time, which no Hugging Face directory can say; --format orbax holds it"
        )


def _check_cache(config: DecoderConfig) -> None:
    if config.kv_cache is not None and not config.has_static_cache:
        raise ValueError(
            f"the model keeps keys and values as {config.kv_cache}, and compressed-tensors knows static "
            "scales alone: --format orbax holds it, and qjax eval and qjax generate take "
            f"--kv-cache {config.kv_cache} for a model that does not say"
        )


def check_held(layer: str, q: QTensor) -> None:
    """Checks that a format of compressed-tensors holds a layer.

    Args:
        layer: its dotted name.
        q: its weight; shapes in place of arrays will do.

    Raises:
        ValueError: none does; the message names the layer.
    """
    try:
        layouts.format_of(q)
    except ValueError as error:
        raise ValueError(
            f"layer {layer}: compressed-tensors: {error}; --format orbax holds everything"
        ) from error


def _plain_layers(model: Decoder, quantized: dict[str, QTensor]) -> list[str]:
    """The linear layers of the PyTorch model that stay plain."""
    linear = [
        path.replace("/", ".")
        for path, layer in nnx_layers.quantizable_layers(model)
        if isinstance(layer, nnx.Linear)
    ]
    # A tied head is a linear layer there, though here it is just the token table.
    names = linear if _HEAD in linear else [*linear, _HEAD]
    return [name for name in names if name not in quantized]
