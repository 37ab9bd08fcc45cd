# SPDX-License-Identifier: Apache-2.0
"""Bad input: one line that names what is wrong and what would be right, and nothing half-written."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import safetensors.numpy

from qjax.algorithms import round_nearest

pytestmark = pytest.mark.one_version  # most of it is refused before jax is asked


def fails(outcome, *words: str, status: int = 1) -> None:
    """The command failed with one line that holds all the words."""
    assert outcome.status == status, outcome
    assert outcome.out == ""
    lines = outcome.err.strip().splitlines()
    assert len(lines) == 1, outcome.err
    assert "error:" in lines[0] and "Traceback" not in lines[0]
    for word in words:
        assert word in lines[0], lines[0]


def weights_of(source: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(source / "model.safetensors")


def rewrite(source: Path, weights: dict[str, np.ndarray]) -> None:
    safetensors.numpy.save_file(weights, source / "model.safetensors", {"format": "pt"})


@pytest.fixture
def quantize(qjax, source, tmp_path):
    """Quantizes and checks that a failure leaves nothing behind."""

    def run(scheme="w8a16-g32", *options):
        before = set(tmp_path.iterdir())
        outcome = qjax("quantize", source, tmp_path / "out", "--scheme", scheme, *options)
        if outcome.status:
            assert set(tmp_path.iterdir()) == before
        return outcome

    return run


def test_scales_of_the_cache_need_text(quantize):
    fails(quantize("w8a16-g32", "--kv-cache", "kv-fp8-static"), "kv-fp8-static", "--calib FILE")
    outcome = quantize("w8a16-g32", "--kv-cache", "kv-int2")
    assert outcome.status == 2 and "invalid choice: 'kv-int2'" in outcome.err
    fails(quantize("w8a16-g32", "--kv-cache", "kv-int4"), "--format orbax", "qjax eval")


def test_no_such_directory(qjax, tmp_path):
    for command in (["inspect"], ["generate", "--prompt", "x"], ["eval", "--tokens", "t.npy"]):
        fails(qjax(*command, tmp_path / "nowhere"), "nowhere")


def test_missing_weights(quantize, source):
    (source / "model.safetensors").unlink()
    fails(quantize(), "model.safetensors")


def test_truncated_weights(quantize, source):
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    fails(quantize(), "model.safetensors", "truncated")


def test_weights_cut_inside_the_header(quantize, source):
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:20])
    fails(quantize(), "model.safetensors")


def test_missing_tensor(quantize, source):
    weights = weights_of(source)
    del weights["model.layers.1.mlp.up_proj.weight"]
    rewrite(source, weights)
    fails(quantize(), "model.layers.1.mlp.up_proj.weight")


def test_index_that_names_absent_files(quantize, source):
    (source / "model.safetensors").rename(source / "model-00001-of-00002.safetensors")
    names = {name: "model-00002-of-00002.safetensors" for name in ("model.norm.weight",)}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    fails(quantize(), "model-00002-of-00002.safetensors")


def edit_config(source: Path, **changes) -> None:
    path = source / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_unknown_architecture(quantize, source):
    edit_config(source, model_type="mamba", architectures=["MambaForCausalLM"])
    fails(quantize(), "mamba", "llama")


def test_missing_key(quantize, source):
    edit_config(source, hidden_size=None)
    fails(quantize(), "hidden_size")


def test_sizes_that_are_none(quantize, source):
    edit_config(source, num_attention_heads=0)
    fails(quantize(), "config.json", "num_attention_heads", "at least 1")
    edit_config(source, num_attention_heads=3)
    fails(quantize(), "config.json", "num_heads=3", "multiple")


def test_end_token_that_is_no_id(qjax, source):
    edit_config(source, eos_token_id="</s>")
    fails(qjax("generate", source, "--prompt", "x"), "config.json", "eos_token_id", "</s>")
    edit_config(source, eos_token_id=10**12)
    fails(qjax("generate", source, "--prompt", "x"), "config.json", "eos_token_id", "259")
    (source / "tokenizer_config.json").write_text('{"bos_token": 5}')
    edit_config(source, eos_token_id=1)
    fails(qjax("generate", source, "--prompt", "x"), "tokenizer_config.json", "bos_token", "5")


def test_weights_far_out_of_range(qjax, source):
    rewrite(source, {name: array * 1000 for name, array in weights_of(source).items()})
    np.save(tokens := source.parent / "tokens.npy", np.arange(8, dtype=np.int32)[None])
    fails(qjax("eval", source, "--tokens", tokens), "logits", "out of range")


def test_config_is_no_json(quantize, source):
    (source / "config.json").write_text("{")
    fails(quantize(), "config.json")


def test_group_that_does_not_divide_names_the_layer_and_what_would(quantize):
    fails(quantize("w4a16-g48"), "model/layers/0/", "48", "64", "32")


def test_nan_weights_name_the_layer(quantize, qjax, source):
    weights = weights_of(source)
    weights["model.layers.1.self_attn.k_proj.weight"][3, 5] = np.nan
    rewrite(source, weights)
    fails(quantize(), "model.layers.1.self_attn.k_proj", "NaN")
    fails(qjax("generate", source, "--prompt", "x"), "model.layers.1.self_attn.k_proj", "NaN")
    np.save(tokens := source.parent / "tokens.npy", np.zeros((1, 4), np.int32))
    fails(qjax("eval", source, "--tokens", tokens), "model.layers.1.self_attn.k_proj", "NaN")


@pytest.mark.parametrize("bad", [0, -1, 1.5, "x", True, [], [4], {}, ["re:("]], ids=str)
def test_no_quantization_config_is_a_traceback(quantize, qjax, tmp_path, bad):
    assert quantize("w8a16-g32").status == 0
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    method = config["quantization_config"]
    group = method["config_groups"]["group_0"]
    broken = [bad]
    broken += [method | {key: bad} for key in method]
    broken += [method | {"config_groups": {"g": group | {key: bad}}} for key in group]
    weights = group["weights"] | {"block_structure": None}
    broken += [
        method | {"config_groups": {"g": group | {"weights": weights | {key: bad}}}}
        for key in weights
    ]
    for value in broken:
        path.write_text(json.dumps(config | {"quantization_config": value}))
        outcome = qjax("inspect", tmp_path / "out")
        if outcome.status:
            fails(outcome, str(tmp_path / "out"))
            assert "report" not in outcome.err


@pytest.mark.parametrize("bad", [0, -1, 1.5, "x", True, None, [], [0], {}], ids=str)
def test_no_description_is_a_traceback(quantize, qjax, tmp_path, bad):
    assert quantize("w8a8", "--format", "orbax").status == 0
    path = tmp_path / "out" / "qjax.json"
    good = json.loads(path.read_text())
    name = next(name for name, entry in good["parameters"].items() if "format" in entry)
    entry = good["parameters"][name]

    def replaced(entry):
        return good | {"parameters": good["parameters"] | {name: entry}}

    broken = [good | {key: bad} for key in good] + [replaced(bad)]
    broken += [replaced(entry | {key: bad}) for key in entry if key != "activations"]
    broken += [replaced({k: v for k, v in entry.items() if k != key}) for key in entry]
    activations = entry["activations"]
    broken += [replaced(entry | {"activations": activations | {k: bad}}) for k in activations]
    for value in broken:
        path.write_text(json.dumps(value))
        outcome = qjax("inspect", tmp_path / "out")
        if outcome.status:
            fails(outcome, str(tmp_path / "out"))
            assert "report" not in outcome.err


@pytest.mark.parametrize("format", ["compressed-tensors", "orbax"])
def test_nan_scales_name_the_layer(quantize, qjax, tmp_path, format, monkeypatch):
    def spoiled(q):
        return jax.tree.map(lambda leaf: leaf * np.nan if leaf.dtype == "bfloat16" else leaf, q)

    original = round_nearest.quantize
    monkeypatch.setattr(
        round_nearest, "quantize", lambda *args, **options: spoiled(original(*args, **options))
    )
    assert quantize("w8a16-g32", "--format", format).status == 0
    fails(qjax("inspect", tmp_path / "out"), "layers", "0", "proj", "NaN")


def test_scheme_that_the_format_cannot_hold_is_refused_before_the_work(quantize, monkeypatch):
    monkeypatch.setattr("qjax.quantize_sequentially", None)
    fails(quantize("nf4-g32"), "model.layers.0.", "orbax")
    fails(quantize("w4a4-g32", "--method", "rotation"), "inputs of down_proj", "--format orbax")
    fails(quantize("w4a16-g48"), "model/layers/0/", "48", "64", "32")


def test_output_that_exists(qjax, source, tmp_path):
    (tmp_path / "out").mkdir()
    fails(qjax("quantize", source, tmp_path / "out", "--scheme", "w8a16-g32"), "out", "exists")


def test_source_that_is_quantized_already(qjax, quantize, tmp_path):
    assert quantize().status == 0
    again = qjax("quantize", tmp_path / "out", tmp_path / "out2", "--scheme", "w4a16-g32")
    fails(again, "already quantized")


@pytest.fixture
def process():
    """Runs the command in a process of its own, as it is installed; no file may exceed `limit` bytes."""

    def run(*arguments, limit: int | None = None):
        # Limited from inside: preexec_fn would fork this process, in which JAX has threads.
        limits = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))" if limit else ""
        program = f"import resource\nfrom qjax_cli.main import entry\n{limits}\nentry()"
        done = subprocess.run(
            [sys.executable, "-c", program, *map(str, arguments)],
            capture_output=True,
            text=True,
            env={
                "PATH": "/usr/bin:/bin",
                "PYTHONPATH": ":".join(sys.path),
                # Python would cut its compiled modules off at the limit, and keep them.
                "PYTHONDONTWRITEBYTECODE": "1",
            },
        )
        return SimpleNamespace(status=done.returncode, out=done.stdout, err=done.stderr)

    return run


@pytest.mark.parametrize("format", ["compressed-tensors", "orbax"])
def test_full_disk(process, source, tmp_path, format):
    out = tmp_path / "out"
    options = ("--scheme", "w8a16-g32", "--format", format)
    fails(process("quantize", source, out, *options, limit=20_000), "out", "disk full")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_truncated_arrays(quantize, process, tmp_path):
    assert quantize("w8a16-g32", "--format", "orbax").status == 0
    for file in (tmp_path / "out" / "arrays").rglob("*"):
        if file.is_file() and file.stat().st_size > 10_000:
            file.write_bytes(file.read_bytes()[:100])
    fails(process("inspect", tmp_path / "out"), "out/arrays", "cannot be restored")


@pytest.mark.parametrize("text", ["", "x"])
def test_text_of_less_than_two_tokens(qjax, source, tmp_path, text):
    path = tmp_path / "text.txt"
    path.write_text(text)
    fails(qjax("eval", source, "--text", path), path.name, "tokens", "two")


def test_text_that_is_no_text(qjax, source, tmp_path):
    path = tmp_path / "text.bin"
    path.write_bytes(b"\xff\xfe\x00")
    fails(qjax("eval", source, "--text", path), "text.bin", "UTF-8")


def test_missing_text(qjax, source, tmp_path):
    fails(qjax("eval", source, "--text", tmp_path / "absent.txt"), "absent.txt")
    fails(qjax("eval", source, "--text", source), str(source), "directory")


def test_missing_recipe(qjax, source, tmp_path):
    for recipe in ("absent.json", source.name):
        fails(qjax("quantize", source, tmp_path / "o", "--recipe", tmp_path / recipe), recipe)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((3,), np.int32),
        np.zeros((2, 4)),
        np.full((2, 4), 260),
        np.full((2, 4), -1),
        np.zeros((3, 1), np.int32),
        np.zeros((0, 5), np.int32),
    ],
)
def test_tokens_that_are_none(qjax, source, tmp_path, array):
    np.save(tmp_path / "tokens.npy", array)
    fails(qjax("eval", source, "--tokens", tmp_path / "tokens.npy"), "tokens.npy")


def test_archive_of_arrays(qjax, source, tmp_path):
    np.savez(tmp_path / "tokens.npz", a=np.zeros((2, 4), np.int32))
    fails(qjax("eval", source, "--tokens", tmp_path / "tokens.npz"), "tokens.npz", "one array")


@pytest.mark.parametrize(
    "option",
    [
        ("--seed", 10**20),
        ("--seed", -1),
        ("--temperature", "nan"),
        ("--temperature", "hot"),
        ("--top-p", 0),
        ("--top-p", 1.1),
        ("--top-k", 0),
        ("--max-new", 0),
        ("--max-new", "x"),
    ],
)
def test_numbers_out_of_range(qjax, source, option):
    outcome = qjax("generate", source, "--prompt", "x", f"{option[0]}={option[1]}")
    fails(outcome, option[0], "must be a", str(option[1]), status=2)


def test_windows_of_one_token(qjax, source):
    outcome = qjax("eval", source, "--tokens", "t.npy", "--seq-len", 1)
    fails(outcome, "--seq-len", "from 2 up", status=2)


def test_what_nobody_foresaw_is_one_line_too(monkeypatch, qjax, source):
    def broken(*arguments):
        raise AttributeError("first\nsecond")

    monkeypatch.setattr("qjax_cli.inspect.load", broken)
    fails(qjax("inspect", source), "AttributeError", "test_bad_input.py", "first second", "report")


def test_interrupt_while_importing(monkeypatch, qjax, source):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib, "import_module", interrupted)
    outcome = qjax("inspect", source)
    assert outcome.status == 130 and outcome.err == "qjax inspect: interrupted\n"


def test_wrong_tokenizer(qjax, source, tmp_path):
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {f"<word{i}>": 256 + i for i in range(50)}
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    fails(qjax("generate", source, "--prompt", "x"), "tokenizer.json", "306", "260")


def test_broken_tokenizer(qjax, source):
    (source / "tokenizer.json").write_text("{}")
    fails(qjax("generate", source, "--prompt", "x"), "tokenizer.json")


def test_no_tokenizer(qjax, source):
    (source / "tokenizer.json").unlink()
    fails(qjax("generate", source, "--prompt", "x"), "tokenizer.json")


def test_empty_prompt(qjax, source):
    fails(qjax("generate", source, "--prompt", ""), "prompt")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["florb"],
        ["quantize", "a", "b"],
        ["quantize", "a", "b", "--scheme", "w5a16"],
        ["quantize", "a", "b", "--scheme", "fp8-block-static"],
        ["quantize", "a", "b", "--scheme", "w4a16", "--method", "magic"],
        ["eval", "a"],
        ["eval", "a", "--tokens", "t.npy", "--dtype", "int8"],
        ["generate", "a"],
        ["inspect"],
    ],
)
def test_bad_arguments_end_with_two(qjax, arguments):
    fails(qjax(*arguments), status=2)


@pytest.mark.parametrize("rules", ["{", "[]", '[["(", "w8a8"]]', '[[".*", "w9"]]', '[["a"]]'])
def test_bad_recipes(qjax, source, tmp_path, rules):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(rules)
    outcome = qjax("quantize", source, tmp_path / "out", "--recipe", recipe)
    fails(outcome)


def test_recipe_that_matches_nothing(qjax, source, tmp_path):
    recipe = tmp_path / "recipe.json"
    recipe.write_text('[["nothing", "w8a8"]]')
    fails(qjax("quantize", source, tmp_path / "out", "--recipe", recipe), "nothing", "model/")


def test_calibration_that_is_missing_or_of_no_use(qjax, source, tmp_path):
    out, text = tmp_path / "out", tmp_path / "short.txt"
    text.write_text("a short text")
    base = ("quantize", source, out, "--scheme", "w4a16-g32")
    fails(qjax(*base, "--method", "gptq"), "gptq", "--calib")
    fails(qjax(*base, "--range", "output"), "--range output", "--calib")
    fails(qjax(*base, "--calib", text), "rtn", "leave out --calib")
    fails(qjax(*base, "--true-sequential"), "rtn", "leave out --true-sequential")
    static = qjax("quantize", source, tmp_path / "out", "--scheme", "w8a8-static")
    fails(
        static, "w8a8-static has input scales from calibration", "--calib FILE", "without -static"
    )
    fails(qjax(*base, "--method", "gptq", "--calib", text), "short.txt", "12 tokens", "1024")
    fails(
        qjax(*base, "--method", "gptq", "--calib", text, "--seq-len", 8),
        "model/layers/0/self_attn/q_proj", "8 calibration tokens for 64 inputs",
    )  # fmt: skip
    fails(qjax(*base, "--method", "gptq", "--calib", tmp_path / "none.txt"), "none.txt")
    fails(
        qjax(*base, "--method", "learned", "--calib", text, "--seq-len", 8, "--samples", 1),
        "learned", "windows", "2 or more",
    )  # fmt: skip


def test_outliers_that_a_scheme_or_a_format_has_no_place_for(quantize, tmp_path):
    """Said before any work: the calibration text is not even looked for."""
    options = ("--method", "llm-int8", "--calib", tmp_path / "nowhere.txt", "--format")
    fails(quantize("w4a16-g32", *options, "orbax"), "llm-int8", "for w8a8", "not for w4a16-g32")
    fails(quantize("w8a8", *options, "compressed-tensors"), "llm-int8", "--format orbax does")
    fails(quantize("w8a8", *options, "orbax", "--resume"), "--resume", "compressed-tensors")


def test_calibration_tokens_that_the_model_does_not_know(qjax, source, tmp_path):
    tokens = tmp_path / "tokens.npy"
    np.save(tokens, np.full((4, 64), 300, np.int32))
    base = ("quantize", source, tmp_path / "out", "--scheme", "w4a16-g32", "--method", "gptq")
    fails(qjax(*base, "--calib", tokens), "tokens.npy", "300", "259")
    fails(qjax(*base, "--calib", tokens, tmp_path / "text.txt"), "tokens.npy", "alone")
    np.save(tokens, np.zeros((4, 512), np.int32))
    fails(qjax(*base, "--calib", tokens), "512", "256", "--seq-len 256")


def test_activations_that_overflow_behind_a_finished_block(qjax, source, tmp_path):
    weights = weights_of(source)
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = weights[name].copy()
    weights[name][0] = 3e38
    rewrite(source, weights)
    tokens = np.random.default_rng(0).integers(0, 256, (32, 24)).astype(np.int32)
    np.save(tmp_path / "tokens.npy", tokens)
    options = "--scheme", "w8a8-static", "--calib", tmp_path / "tokens.npy"
    outcome = qjax("quantize", source, tmp_path / "out", *options)
    fails(outcome, "not finite", ".out.partial", "remove it to begin anew")
    assert not (tmp_path / "out").exists()
