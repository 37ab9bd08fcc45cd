# SPDX-License-Identifier: Apache-2.0
"""Mixtral: a Mistral with eight experts a layer, two of them for each token, under names of its own.

References:
    Jiang et al., Mixtral of Experts, 2024, https://arxiv.org/abs/2401.04088.
"""

from collections.abc import Mapping
from dataclasses import replace

from qjax_models.config import DecoderConfig, ExpertNames, ExpertsConfig
from qjax_models.config_json import ConfigJson, plain_decoder

_NAMES = ExpertNames(layer="block_sparse_moe", gate="w1", up="w3", down="w2")


def from_hf(config: Mapping[str, object]) -> DecoderConfig:
    """The decoder that a `MixtralConfig` describes."""
    json = ConfigJson(config)
    plain = plain_decoder(json)
    window = json.optional_size("sliding_window")
    return replace(
        plain,
        experts=ExpertsConfig(
            count=json.size("num_local_experts", 8),
            per_token=json.size("num_experts_per_tok", 2),
            mlp_size=plain.mlp_size,
            normalized=True,
            names=_NAMES,
        ),
        sliding_window=window,
        sliding_layers=() if window is None else tuple(range(plain.num_layers)),
    )
