# SPDX-License-Identifier: Apache-2.0
"""Qwen3-MoE: a Qwen3 with experts in all layers, or in those that the configuration does not leave dense.

Its own defaults: one MLP in the layers of `mlp_only_layers` and in all but every
`decoder_sparse_step`-th; where windows are switched on, all layers have them.

References:
    Yang et al., Qwen3 Technical Report, 2025, https://arxiv.org/abs/2505.09388.
"""

from collections.abc import Mapping
from dataclasses import replace

from qjax_models.config import DecoderConfig, ExpertsConfig
from qjax_models.config_json import ConfigJson, plain_decoder


def from_hf(config: Mapping[str, object]) -> DecoderConfig:
    """The decoder that a `Qwen3MoeConfig` describes."""
    json = ConfigJson(config)
    plain = plain_decoder(json)
    attention_bias = json.flag("attention_bias", False)
    windows = json.flag("use_sliding_window", False)
    window = json.optional_size("sliding_window", default=4096) if windows else None
    # transformers 5 writes the name that Mixtral has for it.
    count = "num_local_experts" if json.has("num_local_experts") else "num_experts"
    return replace(
        plain,
        experts=ExpertsConfig(
            count=json.size(count, 128),
            per_token=json.size("num_experts_per_tok", 8),
            mlp_size=json.size("moe_intermediate_size", 768),
            normalized=json.flag("norm_topk_prob", False),
            dense_layers=_dense_layers(json, plain.num_layers),
        ),
        query_key_norm=True,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        sliding_window=window,
        sliding_layers=() if window is None else tuple(range(plain.num_layers)),
    )


def _dense_layers(json: ConfigJson, num_layers: int) -> tuple[int, ...]:
    step = json.size("decoder_sparse_step", 1)
    named = json.indices("mlp_only_layers")
    return tuple(i for i in range(num_layers) if i in named or (i + 1) % step)
