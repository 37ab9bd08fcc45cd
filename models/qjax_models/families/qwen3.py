# SPDX-License-Identifier: Apache-2.0
"""Qwen3: every query and key head is normalized before rotation; biases only where asked for.

References:
    Yang et al., Qwen3 Technical Report, 2025, https://arxiv.org/abs/2505.09388.
"""

from collections.abc import Mapping
from dataclasses import replace

from qjax_models.config import DecoderConfig
from qjax_models.config_json import ConfigJson, plain_decoder, upper_layers_slide


def from_hf(config: Mapping[str, object]) -> DecoderConfig:
    """The decoder that a `Qwen3Config` describes."""
    json = ConfigJson(config)
    attention_bias = json.flag("attention_bias", False)
    return replace(
        upper_layers_slide(plain_decoder(json, head_size=128), json),
        query_key_norm=True,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
    )
