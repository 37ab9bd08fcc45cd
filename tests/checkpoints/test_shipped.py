# SPDX-License-Identifier: Apache-2.0
import json
import sysconfig
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from qjax_checkpoints import shipped


def test_held_out_modules_are_there_once() -> None:
    modules = shipped.HELD_OUT_MODULES
    assert 40 <= len(modules) <= 60
    assert len(set(modules)) == len(modules)


def test_evaluation_text_is_the_modules_in_order() -> None:
    text = shipped.evaluation_text()
    root = Path(sysconfig.get_path("stdlib"))
    position = 0
    for module in shipped.HELD_OUT_MODULES:
        source = root.joinpath(*module.split(".")).with_suffix(".py").read_text("utf-8")
        assert text[position : position + len(source) + 1] == source + "\n"
        position += len(source) + 1
    assert position == len(text) > 1_500_000


def test_missing_library_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"argparse\.py: not readable"):
        shipped.evaluation_text(tmp_path)


def test_missing_model_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shipped, "__file__", str(tmp_path / "shipped.py"))
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        shipped.model_path()


def test_model_is_a_small_bfloat16_llama() -> None:
    path = shipped.model_path()
    config = json.loads((path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (path / "model.safetensors").stat().st_size <= 16 * 2**20
    tensors = load_file(path / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert 5e6 <= sum(tensor.size for tensor in tensors.values()) <= 8e6
    assert all(np.isfinite(tensor.astype(np.float32)).all() for tensor in tensors.values())


def test_model_meets_its_quality_bar() -> None:
    summary = json.loads((shipped.model_path() / "training_summary.json").read_text())
    assert summary["evaluation"]["bits_per_byte"] <= 1.10
    assert summary["steps"] == summary["planned_steps"]
    assert summary["data"]["held_out_modules"] == list(shipped.HELD_OUT_MODULES)
    assert summary["data"]["files_by_fate"]["shares_stdlib"] > 0


def test_tokenizer_gives_back_the_evaluation_text() -> None:
    tokenizer = Tokenizer.from_file(str(shipped.model_path() / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 4096
    text = shipped.evaluation_text()[:200_000]
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.interop
def test_transformers_predicts_the_library_with_it() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    path = shipped.model_path()
    model = transformers.LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    assert isinstance(tokenizer, transformers.PreTrainedTokenizerFast)
    ids = torch.tensor(tokenizer(shipped.evaluation_text()[:20_000])["input_ids"])
    windows = ids[: len(ids) // 1024 * 1024].reshape(-1, 1024)
    with torch.no_grad():
        log_probabilities = model(windows[:, :-1]).logits.log_softmax(-1)
    nll = -log_probabilities.gather(2, windows[:, 1:, None]).mean().item()
    # argparse alone lies near the mean of all modules.
    expected = json.loads((path / "training_summary.json").read_text())["evaluation"]["nll"]
    assert nll == pytest.approx(expected, rel=0.2)
