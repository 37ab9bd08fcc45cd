# SPDX-License-Identifier: Apache-2.0
"""The page on QLoRA is run as it stands: a fine-tune, to an adapter and two models.

On the first block of the shipped model, for the sake of time.
"""

import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from qjax import QTensor, quantize_model
from qjax.lora import adapters
from qjax_checkpoints import load, load_adapter, shipped
from qjax_models import Decoder


@pytest.fixture
def one_block(tmp_path) -> Path:
    source, path = shipped.model_path(), tmp_path / "source"
    path.mkdir()
    for file in source.glob("tokenizer*"):
        shutil.copyfile(file, path / file.name)
    config = json.loads((source / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    tensors = safetensors.numpy.load_file(source / "model.safetensors")
    kept = {k: v for k, v in tensors.items() if not re.match(r"model\.layers\.[1-9]\.", k)}
    safetensors.numpy.save_file(kept, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.mark.one_version
def test_the_page_runs(run_page, one_block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shipped, "model_path", lambda: one_block)
    page = run_page("qlora.md")
    losses, model = page["losses"], page["model"]
    assert losses[-1] < 0.9 * losses[0] and len(adapters(model)) == 7
    untouched, _ = quantize_model(load(one_block).model, "nf4")
    for block, other in zip(model.model.layers, untouched.model.layers, strict=True):
        ours, theirs = (b.mlp.down_proj.kernel[...] for b in (block, other))
        assert isinstance(ours, QTensor)
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    again = adapters(load_adapter(page["base"], "out/adapter"))
    for path, adapter in adapters(model).items():
        jax.tree.map(np.testing.assert_array_equal, again[path].factors, adapter.factors)
    assert load("out/w4a16").kind == "compressed-tensors"
    merged = load("out/merged")
    assert merged.kind == "plain"
    forward = nnx.jit(Decoder.__call__)
    ours, expected = (forward(m, page["tokens"]) for m in (merged.model, model))
    # bfloat16 has 8 bits, and every layer rounds.
    assert np.linalg.norm(ours - expected) < 0.02 * np.linalg.norm(expected)
