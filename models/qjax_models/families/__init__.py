# SPDX-License-Identifier: Apache-2.0
"""The supported families: one file each, and the table that finds them."""

from collections.abc import Callable, Mapping

from qjax_models.config import DecoderConfig
from qjax_models.config_json import shown
from qjax_models.families import (
    gemma2,
    gemma3,
    llama,
    mistral,
    mixtral,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
)

# `model_type` of config.json -> its reader.
FAMILIES: Mapping[str, Callable[[Mapping[str, object]], DecoderConfig]] = {
    "llama": llama.from_hf,
    "mistral": mistral.from_hf,
    "mixtral": mixtral.from_hf,
    "qwen2": qwen2.from_hf,
    "qwen3": qwen3.from_hf,
    "qwen3_moe": qwen3_moe.from_hf,
    "gemma2": gemma2.from_hf,
    "gemma3_text": gemma3.from_hf,
    "gemma3": gemma3.text_part,
    "phi3": phi3.from_hf,
}


def config_from_hf(config: Mapping[str, object]) -> DecoderConfig:
    """The decoder that a Hugging Face config.json describes.

    Args:
        config: the parsed file.

    Raises:
        ValueError: the family is not supported, or a key is missing or wrong; the message names it.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"config.json: model_type {shown(model_type)} is not supported; "
            f"supported: {', '.join(FAMILIES)}"
        )
    try:
        return FAMILIES[model_type](config)
    except ValueError as error:
        # Sizes that do not go together are found by DecoderConfig, which knows no file.
        message = str(error)
        named = message if message.startswith("config.json") else f"config.json: {message}"
        raise ValueError(named) from error
