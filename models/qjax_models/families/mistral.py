# SPDX-License-Identifier: Apache-2.0
"""Mistral: a Llama whose layers all see a sliding window, in the first release; later ones see all.

References:
    Jiang et al., Mistral 7B, 2023, https://arxiv.org/abs/2310.06825.
"""

from collections.abc import Mapping
from dataclasses import replace

from qjax_models.config import DecoderConfig
from qjax_models.config_json import ConfigJson, plain_decoder


def from_hf(config: Mapping[str, object]) -> DecoderConfig:
    """The decoder that a `MistralConfig` describes."""
    json = ConfigJson(config)
    plain = plain_decoder(json)
    window = json.optional_size("sliding_window", default=4096)
    return replace(
        plain,
        sliding_window=window,
        sliding_layers=() if window is None else tuple(range(plain.num_layers)),
    )
