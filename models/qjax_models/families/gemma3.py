# SPDX-License-Identifier: Apache-2.0
"""Gemma 3 (text): five sliding layers to one full, each kind with rotary positions of its own.

As Gemma 2, but heads are normalized instead of capped. Full layers turn slowly (theta 1e6) and may be
stretched; sliding ones keep theta 1e4. Of a `gemma3` file, which describes images and text, the
`text_config` is read.

References:
    Gemma Team, Gemma 3 Technical Report, 2025, https://arxiv.org/abs/2503.19786.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

from qjax_models.config import DecoderConfig
from qjax_models.config_json import ConfigJson, plain_decoder, read_rope, sliding_layers
from qjax_models.rope import Rope

# What the published files of the larger models leave to the reader.
LEFT_OUT: Mapping[str, object] = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131_072,
    "sliding_window_pattern": 6,  # every sixth layer is full
}


def from_hf(config: Mapping[str, object]) -> DecoderConfig:
    """The decoder that a `Gemma3TextConfig` describes."""
    json = ConfigJson({**LEFT_OUT, **config})
    if json.flag("use_bidirectional_attention", False):
        raise ValueError(
            "config.json: use_bidirectional_attention is not supported: decoders are causal"
        )
    full, sliding = _ropes(json)
    plain = plain_decoder(
        json, tied_embeddings=True, head_size=256, activation="gelu_pytorch_tanh", rope=full
    )
    attention_bias = json.flag("attention_bias", False)
    pattern = json.size("sliding_window_pattern")
    all_but_every_nth = tuple(i for i in range(plain.num_layers) if (i + 1) % pattern)
    return replace(
        plain,
        norm_offset=1.0,
        post_norms=True,
        query_key_norm=True,
        embedding_scale=math.sqrt(plain.hidden_size),
        query_scale=json.positive("query_pre_attn_scalar", 256) ** -0.5,
        attention_softcap=json.optional_positive("attn_logit_softcapping"),
        logit_softcap=json.optional_positive("final_logit_softcapping"),
        sliding_rope=sliding,
        sliding_window=json.size("sliding_window", 4096),
        sliding_layers=sliding_layers(json, plain.num_layers, default=all_but_every_nth),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
    )


def text_part(config: Mapping[str, object]) -> DecoderConfig:
    """The decoder inside a `Gemma3Config` of images and text."""
    return from_hf(ConfigJson(config).nested("text_config").values)


def _ropes(json: ConfigJson) -> tuple[Rope, Rope]:
    """Positions of full and of sliding layers, in either spelling."""
    by_kind = json.nested("rope_parameters")
    full = by_kind.nested("full_attention") if by_kind.values else json.nested("rope_scaling")
    full_theta = json.positive("rope_theta", 1e6)
    sliding_theta = json.positive("rope_local_base_freq", 1e4)
    max_positions = json.size("max_position_embeddings")
    sliding = by_kind.nested("sliding_attention")
    return (
        read_rope(full, theta=full_theta, max_positions=max_positions),
        read_rope(sliding, theta=sliding_theta, max_positions=max_positions),
    )
