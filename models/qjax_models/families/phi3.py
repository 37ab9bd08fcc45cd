# SPDX-License-Identifier: Apache-2.0
"""Phi-3, Phi-3.5 and Phi-4: a Llama with fused projections, and LongRoPE in the long-context models.

Queries, keys and values are one matrix, gate and up another, as in the published tensors.

References:
    Abdin et al., Phi-3 Technical Report, 2024, https://arxiv.org/abs/2404.14219.
"""

from collections.abc import Mapping
from dataclasses import replace

from qjax_models.config import DecoderConfig
from qjax_models.config_json import ConfigJson, plain_decoder


def from_hf(config: Mapping[str, object]) -> DecoderConfig:
    """The decoder that a `Phi3Config` describes."""
    json = ConfigJson(config)
    plain = plain_decoder(json)
    window = json.optional_size("sliding_window")
    return replace(
        plain,
        fused_projections=True,
        sliding_window=window,
        sliding_layers=() if window is None else tuple(range(plain.num_layers)),
    )
