# SPDX-License-Identifier: Apache-2.0
"""A directory in, a smaller one out, measured, inspected and generating."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from qjax import quantize_model
from qjax_checkpoints.load import load
from qjax_checkpoints.parameters import stored_values
from qjax_checkpoints.tokenizer import load_tokenizer
from qjax_models import Decoder, config_from_hf
from qjax_models.generate import Generator


@pytest.fixture
def tokens(tmp_path):
    path = tmp_path / "tokens.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (5, 24)).astype(np.int32))
    return path


@pytest.mark.parametrize("target", ["compressed-tensors", "orbax"])
def test_quantized_directory_is_smaller_complete_and_as_good_as_in_memory(
    qjax, source, tokens, tmp_path, target
):
    out = tmp_path / "out"
    done = qjax("quantize", source, out, "--scheme", "w8a16-g32", "--format", target, "--json")
    assert done.status == 0, done.err
    assert done.json["quantized"] == 14
    assert done.json["bytes_after"] < 0.6 * done.json["bytes_before"] + 260 * 64 * 2

    report = json.loads((out / "qjax_report.json").read_text())
    by_path = {layer["path"]: layer for layer in report["layers"]}
    mlp = by_path["model/layers/0/mlp/up_proj"]
    assert mlp["scheme"] == "w8a16-g32" and mlp["method"] == "rtn"
    assert mlp["bytes_after"] == 64 * 128 + 2 * 128 * 2
    assert 0.001 < mlp["relative_output_error"] < 0.02
    assert by_path["model/embed_tokens"]["reason"]
    assert "model/embed_tokens" in done.err
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()

    judged = qjax("eval", out, "--tokens", tokens, "--baseline", source, "--json")
    assert judged.status == 0, judged.err
    assert judged.json["tokens"] == 5 * 23
    assert judged.json["perplexity"] == pytest.approx(math.exp(judged.json["nll"]))
    assert 0 < judged.json["kl"] < 0.01
    assert judged.json["top1_agreement"] > 0.9

    seen = qjax("inspect", out, "--json").json
    schemes = {layer["path"]: layer["scheme"] for layer in seen["layers"]}
    assert schemes["model/layers/1/self_attn/q_proj"] == "w8a16-g32"
    assert schemes["model/embed_tokens"] is None

    spoken = qjax("generate", out, "--prompt", "abc", "--max-new", 5, "--json")
    assert spoken.status == 0, spoken.err
    assert spoken.json["new_tokens"] == 5 and isinstance(spoken.json["text"], str)


@pytest.mark.one_version  # whole commands; the parts have tests of their own
@pytest.mark.parametrize(
    ("method", "chain"),
    [("gptq", "gptq"), ("awq+gptq", "awq+gptq"), ("best", "outlier-suppression+gptq+learned")],
)
def test_calibrated_methods(qjax, source, tokens, tmp_path, method, chain):
    out, calibration = tmp_path / "out", tmp_path / "text.txt"
    calibration.write_text("the quick brown fox jumps over the lazy dog, again and again; " * 40)
    done = qjax(
        "quantize", source, out, "--scheme", "w4a16-g32", "--method", method,
        "--calib", calibration, "--samples", 20, "--seq-len", 64, "--json",
    )  # fmt: skip
    assert done.status == 0, done.err
    report = json.loads((out / "qjax_report.json").read_text())
    quantized = [layer for layer in report["layers"] if layer["scheme"]]
    assert {layer["method"] for layer in quantized} == {chain}
    assert {layer["calibration_rows"] for layer in quantized} == {20 * 64}
    assert all(layer["damping"] == pytest.approx(0.01) for layer in quantized)
    judged = qjax("eval", out, "--tokens", tokens, "--baseline", source, "--json")
    assert judged.status == 0 and 0 < judged.json["kl"] < 0.5


@pytest.mark.one_version  # whole commands; the parts have tests of their own
def test_best_goes_without_a_rotation_where_none_passes_through_the_model(qjax, tmp_path):
    gemma, tokens = Path(__file__).parents[2] / "golden" / "gemma2", tmp_path / "tokens.npy"
    vocabulary = json.loads((gemma / "config.json").read_text())["vocab_size"]
    np.save(tokens, np.random.default_rng(0).integers(0, vocabulary, (16, 32)).astype(np.int32))

    def quantized(method):
        words = "--scheme", "w4a4-channel", "--method", method, "--calib", tokens
        return qjax("quantize", gemma, tmp_path / method, *words, "--format", "orbax")

    done = quantized("best")
    assert done.status == 0, done.err
    assert "best is smoothquant+gptq+learned here, without a rotation: this model" in done.err
    report = json.loads((tmp_path / "best" / "qjax_report.json").read_text())
    assert {x["method"] for x in report["layers"] if x["scheme"]} == {"smoothquant+gptq+learned"}
    refused = quantized("rotation+gptq")
    assert (
        refused.status and "no rotation passes through that: take a method without" in refused.err
    )


@pytest.mark.one_version  # whole commands; the parts have tests of their own
def test_static_scales_of_what_layers_multiply(qjax, source, tokens, tmp_path):
    out, scheme = tmp_path / "out", "fp8-static"
    done = qjax("quantize", source, out, "--scheme", scheme, "--calib", tokens, "--json")
    assert done.status == 0, done.err
    report = json.loads((out / "qjax_report.json").read_text())
    told = {layer["path"]: layer["input_scale"] for layer in report["layers"] if layer["scheme"]}
    assert len(told) == 14 and min(told.values()) > 0
    seen = qjax("inspect", out, "--json").json["layers"]
    assert {x["path"]: x["input_scale"] for x in seen if x["scheme"] == scheme} == told
    words = qjax("inspect", out)
    assert "14 quantize their inputs by a static scale, " in words.out, words.out
    judged = qjax("eval", out, "--tokens", tokens, "--baseline", source, "--json")
    assert judged.status == 0 and 0 < judged.json["kl"] < 0.05
    assert qjax("generate", out, "--prompt", "abc", "--max-new", 3, "--json").status == 0


@pytest.mark.one_version  # whole commands; the parts have tests of their own
def test_keys_and_values_in_4_bits(qjax, source, tokens, tmp_path):
    def judged(directory, *options):
        done = qjax("eval", directory, "--tokens", tokens, "--baseline", source, *options, "--json")
        assert done.status == 0, done.err
        return done.json

    kept = judged(source, "--kv-cache", "kv-int4")
    assert kept["kv_cache"] == "kv-int4" and 0 < kept["kl"] < 0.5
    assert judged(source)["kv_cache"] is None
    words = "--scheme", "w8a16-g32", "--kv-cache", "kv-int4", "--format", "orbax"
    done = qjax("quantize", source, tmp_path / "out", *words)
    assert done.status == 0, done.err
    said, given = (judged(tmp_path / "out", *o) for o in ([], ["--kv-cache", "kv-int4"]))
    assert said["nll"] == given["nll"] and said["kv_cache"] == "kv-int4"
    assert "kept as kv-int4 by scales of their own" in qjax("inspect", tmp_path / "out").out
    for directory, options in ((source, ["--kv-cache", "kv-int4"]), (tmp_path / "out", [])):
        spoken = qjax("generate", directory, "--prompt", "abc", "--max-new", 3, "--json", *options)
        assert spoken.status == 0, spoken.err


@pytest.mark.one_version  # whole commands; the parts have tests of their own
def test_inputs_with_outliers_stay_in_16_bits(qjax, source, tokens, tmp_path):
    """In a model whose norms make two of 64 inputs large, and whose weights make up for it."""
    weights = safetensors.numpy.load_file(source / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith("layernorm.weight"):
            weight[[3, 60]] = 64
        elif name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):  # fmt: skip
            weight[:, [3, 60]] /= 256
    safetensors.numpy.save_file(weights, source / "model.safetensors", {"format": "pt"})
    calibration, out = tmp_path / "text.txt", tmp_path / "out"
    calibration.write_text("the quick brown fox jumps over the lazy dog, again and again; " * 20)
    done = qjax(
        "quantize", source, out, "--scheme", "w8a8", "--method", "llm-int8", "--format", "orbax",
        "--calib", calibration, "--seq-len", 64, "--json",
    )  # fmt: skip
    assert done.status == 0, done.err
    judged = qjax("eval", out, "--tokens", tokens, "--baseline", source, "--json")
    assert judged.json["kl"] < 0.005
    report = json.loads((out / "qjax_report.json").read_text())
    seen = qjax("inspect", out, "--json").json["layers"]
    for layer, held in zip(report["layers"], seen, strict=True):
        assert (layer["path"], layer["bytes_after"]) == (held["path"], held["bytes"])
        assert (layer["outliers"] or 0) == held["outliers"]
        if layer["path"].endswith(("q_proj", "up_proj")):
            assert held["outliers"] == 2
            width = layer["shape"][1]
            assert held["bytes"] == 64 * width + 2 * width + 2 * 2 * width + 2 * 4
            assert held["runs_as"].endswith("; 2 inputs in bfloat16")


@pytest.mark.one_version  # whole commands; the parts have tests of their own
def test_a_rotated_model_says_what_became_of_its_tied_head(qjax, source, tokens, tmp_path):
    out = tmp_path / "out"
    done = qjax("quantize", source, out, "--scheme", "w8a16-channel", "--method", "rotation")
    assert done.status == 0, done.err
    assert "lm_head: no longer the token table" in done.err and "0.03 MiB more" in done.err
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    report = json.loads((out / "qjax_report.json").read_text())
    assert {layer["method"] for layer in report["layers"] if layer["scheme"]} == {"rotation"}
    judged = qjax("eval", out, "--tokens", tokens, "--baseline", source, "--json")
    assert judged.status == 0 and 0 < judged.json["kl"] < 0.01


@pytest.mark.one_version  # with both, two formats of directories are read by their own tests
@pytest.mark.parametrize(
    "scheme", ["w4a16-g32", "w4a8", "w4afp8-g32", "w3a16-g32-asym", "fp8-block", "nvfp4"]
)
def test_every_kind_of_codes_generates_what_it_does_in_memory(qjax, source, tmp_path, scheme):
    model, _ = quantize_model(load(source).model, scheme)
    tokenizer = load_tokenizer(source, vocab_size=260)
    generator = Generator(model, capacity=8, stop_tokens=tokenizer.eos_ids)
    (answer,) = generator.generate([tokenizer.encode("abc")], 5).tokens
    for target in ("compressed-tensors", "orbax"):
        out = tmp_path / target
        done = qjax("quantize", source, out, "--scheme", scheme, "--format", target)
        assert done.status == 0, done.err
        spoken = qjax("generate", out, "--prompt", "abc", "--max-new", 5, "--json")
        assert spoken.status == 0, spoken.err
        assert spoken.json["text"] == tokenizer.decode(answer), target


def test_eval_reads_text(qjax, source, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("x" * 100, encoding="utf-8")
    judged = qjax("eval", source, "--text", text, "--seq-len", 32, "--json")
    assert judged.status == 0, judged.err
    assert judged.json["tokens"] == 3 * 31  # four tokens are left over


def test_long_rows_of_tokens_are_cut_to_seq_len(qjax, source, tokens):
    assert qjax("eval", source, "--tokens", tokens, "--seq-len", 9, "--json").json["tokens"] == 40


def test_recipe_file_decides_layer_by_layer(qjax, source, tmp_path):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(
        json.dumps([[".*down_proj", None], [".*self_attn.*", "w4afp8-g32"], [".*", "w8a8"]])
    )
    out = tmp_path / "out"
    done = qjax("quantize", source, out, "--recipe", recipe)
    assert done.status == 0, done.err
    layers = qjax("inspect", out, "--json").json["layers"]
    schemes = {layer["path"].rpartition("/")[2]: layer["scheme"] for layer in layers}
    assert (schemes["down_proj"], schemes["q_proj"], schemes["up_proj"]) == (
        None,
        "w4afp8-g32",
        "w8a8",
    )


def test_generated_text_streams_to_stdout_and_speed_to_stderr(qjax, source):
    spoken = qjax("generate", source, "--prompt", "abc", "--max-new", 4)
    assert spoken.status == 0 and spoken.out.endswith("\n")
    assert "/s" in spoken.err


def test_sampling_is_seeded(qjax, source):
    def speak(seed):
        options = ("--temperature", 1.5, "--top-k", 50, "--seed", seed, "--json")
        return qjax("generate", source, "--prompt", "abc", "--max-new", 12, *options).json["text"]

    assert speak(1) == speak(1) != speak(2)


@pytest.mark.parametrize("command", ["demo", "quantize", "eval", "generate", "inspect"])
def test_every_command_explains_itself_with_an_example(qjax, command):
    shown = qjax(command, "--help")
    assert shown.status == 0
    assert f"qjax {command} " in shown.out.partition("Example:")[2]


def test_help_lists_the_commands_without_importing_jax(qjax):
    shown = qjax("--help")
    assert shown.status == 0
    for command in ("demo", "quantize", "eval", "generate", "inspect"):
        assert command in shown.out


@pytest.mark.one_version  # whole commands; the parts have tests of their own
def test_experts_are_calibrated_as_asked(qjax, source, tokens, tmp_path):
    """And every command takes the model; at 120 tokens an expert or two see fewer than they need."""
    config = json.loads((source / "config.json").read_text())
    config |= {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 1}
    config |= {"moe_intermediate_size": 32, "num_hidden_layers": 1, "tie_word_embeddings": True}
    (source / "config.json").write_text(json.dumps(config))
    model = Decoder(config_from_hf(config), rngs=nnx.Rngs(0))
    tensors = {
        name: np.array(value.T if layout == "linear" else value)
        for name, layout, value in stored_values(model)
    }
    safetensors.numpy.save_file(tensors, source / "model.safetensors", {"format": "pt"})
    rules = tmp_path / "rules.json"
    rules.write_text('[[".*experts.*", "w4a16-g32"]]')
    options = ("--recipe", rules, "--method", "gptq", "--calib", tokens, "--json")
    done = qjax("quantize", source, tmp_path / "routed", *options)
    assert done.status == 0 and done.json["quantized"] == 12, done.err
    assert "calibration tokens for 64 inputs: filled up with the average of all" in done.err
    assert "model/layers/0/mlp/gate stays as it is: no rule names it" in done.err
    done = qjax("quantize", source, tmp_path / "all", *options, "--experts", "all")
    assert done.status == 0 and "calibration tokens" not in done.err
    report = json.loads((tmp_path / "all" / "qjax_report.json").read_text())
    rows = {x["calibration_rows"] for x in report["layers"] if "/experts/" in x["path"]}
    assert rows == {5 * 24}

    judged = qjax("eval", tmp_path / "all", "--tokens", tokens, "--baseline", source, "--json")
    assert judged.status == 0 and 0 < judged.json["kl"] < 0.01, judged.err
    spoken = qjax("generate", tmp_path / "all", "--prompt", "abc", "--max-new", 3, "--json")
    assert spoken.status == 0 and spoken.json["new_tokens"] == 3, spoken.err
