# SPDX-License-Identifier: Apache-2.0
"""Llama 2, 3, 3.1, 3.2: the plain decoder. Llama 3.1 and later stretch their rotary positions.

References:
    Touvron et al., Llama 2, 2023, https://arxiv.org/abs/2307.09288.
    Grattafiori et al., The Llama 3 Herd of Models, 2024, https://arxiv.org/abs/2407.21783.
"""

from collections.abc import Mapping
from dataclasses import replace

from qjax_models.config import DecoderConfig
from qjax_models.config_json import ConfigJson, plain_decoder


def from_hf(config: Mapping[str, object]) -> DecoderConfig:
    """The decoder that a `LlamaConfig` describes."""
    json = ConfigJson(config)
    attention_bias = json.flag("attention_bias", False)
    return replace(
        plain_decoder(json),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=json.flag("mlp_bias", False),
    )
