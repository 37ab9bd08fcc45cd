# SPDX-License-Identifier: Apache-2.0
"""Gemma 2: norms on both sides of every block, soft caps, every other layer sliding.

Norms multiply by 1 + weight, embeddings are scaled by sqrt(D), and attention scores by
1 / sqrt(query_pre_attn_scalar) instead of 1 / sqrt(H).

References:
    Gemma Team, Gemma 2, 2024, https://arxiv.org/abs/2408.00118.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

from qjax_models.config import DecoderConfig
from qjax_models.config_json import ConfigJson, plain_decoder, sliding_layers


def from_hf(config: Mapping[str, object]) -> DecoderConfig:
    """The decoder that a `Gemma2Config` describes."""
    json = ConfigJson(config)
    plain = plain_decoder(json, tied_embeddings=True, head_size=256, activation="gelu_pytorch_tanh")
    attention_bias = json.flag("attention_bias", False)
    every_other = tuple(range(0, plain.num_layers, 2))
    return replace(
        plain,
        norm_offset=1.0,
        post_norms=True,
        embedding_scale=math.sqrt(plain.hidden_size),
        query_scale=json.positive("query_pre_attn_scalar", 256) ** -0.5,
        attention_softcap=json.optional_positive("attn_logit_softcapping", default=50.0),
        logit_softcap=json.optional_positive("final_logit_softcapping", default=30.0),
        sliding_window=json.size("sliding_window", 4096),
        sliding_layers=sliding_layers(json, plain.num_layers, default=every_other),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
    )
