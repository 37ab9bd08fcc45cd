# SPDX-License-Identifier: Apache-2.0
import math
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qjax_models import Decoder, config_from_hf
from qjax_models.rope import LinearScaling, Rope

forward = nnx.jit(Decoder.__call__)


def relative_error(found, expected) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_logits_are_those_of_transformers(golden):
    logits = forward(golden.model(), jnp.asarray(golden.tokens))
    assert logits.dtype == jnp.float32
    assert relative_error(logits, golden.logits) < 2e-6


FEATURES = [
    ("llama", {"rope": Rope(theta=5000.0)}),
    ("llama_linear", {"rope": Rope()}),
    ("mistral", {"sliding_window": None, "sliding_layers": ()}),
    ("mixtral", {"sliding_window": None, "sliding_layers": ()}),
    ("mixtral", {"experts": {"normalized": False}}),
    ("mixtral", {"experts": {"per_token": 3}}),
    ("qwen3_moe", {"experts": {"normalized": True}}),
    ("qwen2", {"sliding_layers": ()}),
    ("qwen2", {"sliding_layers": (0, 1, 2)}),
    ("gemma2", {"sliding_layers": ()}),
    ("gemma2", {"attention_softcap": None}),
    ("gemma2", {"logit_softcap": None}),
    ("gemma2", {"norm_offset": 0.0}),
    ("gemma2", {"embedding_scale": 1.0}),
    ("gemma2", {"query_scale": None}),
    ("gemma2", {"activation": "silu"}),
    ("gemma3", {"sliding_rope": None}),
    ("gemma3", {"rope": Rope(theta=1e5)}),
    ("gemma3", {"sliding_layers": ()}),
    ("phi3", {"sliding_layers": ()}),
    ("phi3_longrope", {"rope": Rope(fraction=0.5)}),
]


@pytest.mark.parametrize(("name", "change"), FEATURES)
def test_every_feature_matters_in_the_goldens(goldens, name, change):
    golden = goldens[name]
    if "experts" in change:
        change = {"experts": replace(golden.config.experts, **change["experts"])}
    model = golden.model(replace(golden.config, **change))
    assert relative_error(forward(model, jnp.asarray(golden.tokens)), golden.logits) > 1e-3


def test_old_spelling_of_rope_gives_the_same_config(goldens):
    for name in ("llama", "llama_linear", "phi3_longrope"):
        new = goldens[name].json
        old = {key: value for key, value in new.items() if key != "rope_parameters"}
        scaling = dict(new["rope_parameters"])
        old["rope_theta"] = scaling.pop("rope_theta")
        scaling["type"] = scaling.pop("rope_type")
        old["rope_scaling"] = scaling
        assert config_from_hf(old) == goldens[name].config


def test_gemma3_reads_the_published_sparse_spelling():
    text = {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    config = config_from_hf({"model_type": "gemma3", "text_config": text, "vision_config": {}})
    assert config == config_from_hf(text)
    assert (config.num_heads, config.num_kv_heads, config.head_size) == (8, 4, 256)
    assert config.rope == Rope(theta=1e6, scaling=LinearScaling(factor=8.0))
    assert config.sliding_rope == Rope(theta=1e4)
    assert [i for i in range(34) if not config.is_sliding(i)] == [5, 11, 17, 23, 29]
    assert config.tied_embeddings and config.activation == "gelu_tanh"


def test_defaults_of_gemma2_and_qwen(goldens):
    gemma = {k: v for k, v in goldens["gemma2"].json.items() if k != "layer_types"}
    assert config_from_hf(gemma).sliding_layers == (0, 2)
    qwen = dict(goldens["qwen2"].json) | {"use_sliding_window": False}
    assert config_from_hf(qwen).sliding_layers == ()
    del qwen["layer_types"]
    assert config_from_hf(qwen | {"use_sliding_window": True}).sliding_layers == (1, 2)


def test_defaults_of_mixtures(goldens):
    """Those of the published files, which leave out what is usual."""
    mixtral = {k: v for k, v in goldens["mixtral"].json.items() if "experts" not in k}
    experts = config_from_hf(mixtral).experts
    assert (experts.count, experts.per_token, experts.mlp_size) == (8, 2, 40)
    qwen = goldens["qwen3_moe"].json
    old = {k: v for k, v in qwen.items() if "experts" not in k and k != "mlp_only_layers"}
    experts = config_from_hf(old).experts
    assert (experts.count, experts.per_token, experts.mlp_size) == (128, 8, 24)
    assert experts.dense_layers == () and not experts.normalized
    assert config_from_hf(old | {"num_experts": 9}).experts.count == 9
    every_second = config_from_hf(old | {"decoder_sparse_step": 2, "mlp_only_layers": [1]})
    assert every_second.experts.dense_layers == (0, 1, 2)
    windows = config_from_hf(old | {"use_sliding_window": True, "sliding_window": 7})
    assert windows.sliding_layers == (0, 1, 2) and windows.sliding_window == 7


WRONG_EXPERTS = [
    ({"num_experts_per_tok": 7}, "config.json: 7 experts a token, but there are 6"),
    ({"mlp_only_layers": [1, "2"]}, "'mlp_only_layers' must be a list of whole numbers from 0 up"),
    ({"moe_intermediate_size": 0}, "'moe_intermediate_size' must be at least 1, not 0"),
]


@pytest.mark.parametrize(("change", "message"), WRONG_EXPERTS)
def test_wrong_experts_are_one_line_errors(goldens, change, message):
    with pytest.raises(ValueError) as error:
        config_from_hf(goldens["qwen3_moe"].json | change)
    assert message in str(error.value) and "\n" not in str(error.value)


WRONG = [
    ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; supported: llama, mistral"),
    ({"model_type": None}, "model_type None is not supported"),
    ({"hidden_size": None}, "config.json has no 'hidden_size'"),
    ({"hidden_size": "32"}, "'hidden_size' must be a whole number, not '32'"),
    ({"rms_norm_eps": True}, "'rms_norm_eps' must be a number, not True"),
    ({"tie_word_embeddings": 1}, "'tie_word_embeddings' must be true or false, not 1"),
    ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported; supported: silu"),
    (
        {"rope_parameters": {"rope_type": "yarn"}},
        "rope type 'yarn' is not supported; supported: def",
    ),
    ({"rope_parameters": {"rope_type": "linear"}}, "config.json rope_parameters has no 'factor'"),
    ({"rope_parameters": 7}, "'rope_parameters' must be an object, not 7"),
    ({"num_key_value_heads": 3}, "num_heads=4 must be a multiple of num_kv_heads=3"),
    ({"head_dim": 7}, "head_size=7 must be even"),
    ({"num_hidden_layers": 0}, "'num_hidden_layers' must be at least 1, not 0"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_wrong_configs_are_one_line_errors(goldens, change, message):
    with pytest.raises(ValueError) as error:
        config_from_hf(goldens["llama"].json | change)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "bad",
    [0, -1, 1, 2.5, math.inf, 10**400, "x", True, None, [], {}, [[]]],
    ids=lambda x: str(x)[:5],
)
def test_no_value_of_any_key_is_a_traceback(golden, bad):
    nested = [
        (outer, outer_value | {key: bad})
        for outer, outer_value in golden.json.items()
        if isinstance(outer_value, dict)
        for key in outer_value
    ]
    for key, value in [*((key, bad) for key in golden.json), *nested]:
        try:
            config_from_hf(golden.json | {key: value})
        except ValueError as error:
            line = str(error)
            assert line.startswith("config.json") and "\n" not in line and len(line) < 300, key


def test_wrong_layer_types_are_named(goldens):
    json = goldens["gemma2"].json
    with pytest.raises(ValueError, match="'layer_types' must be a list of 3 names"):
        config_from_hf(json | {"layer_types": ["full_attention"]})
    with pytest.raises(ValueError, match="layer type 'linear_attention' is not supported"):
        config_from_hf(json | {"layer_types": ["linear_attention"] * 3})
    with pytest.raises(ValueError, match="use_bidirectional_attention is not supported"):
        config_from_hf(goldens["gemma3"].json | {"use_bidirectional_attention": True})
