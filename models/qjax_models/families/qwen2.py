# SPDX-License-Identifier: Apache-2.0
"""Qwen2 and Qwen2.5: a Llama with biases on queries, keys and values.

Sliding windows are in the configuration but off in the published models; where `use_sliding_window` is
on, the layers from number `max_window_layers` slide.

References:
    Yang et al., Qwen2 Technical Report, 2024, https://arxiv.org/abs/2407.10671.
"""

from collections.abc import Mapping
from dataclasses import replace

from qjax_models.config import DecoderConfig
from qjax_models.config_json import ConfigJson, plain_decoder, upper_layers_slide


def from_hf(config: Mapping[str, object]) -> DecoderConfig:
    """The decoder that a `Qwen2Config` describes."""
    json = ConfigJson(config)
    return replace(upper_layers_slide(plain_decoder(json), json), qkv_bias=True)
