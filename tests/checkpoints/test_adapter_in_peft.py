# SPDX-License-Identifier: Apache-2.0
"""Hugging Face PEFT as the oracle: it computes with our adapters what we do, and we with its."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax.lora import adapters, add_lora, merge_lora, requantize_lora
from qjax_checkpoints.adapter import load_adapter, save_adapter
from qjax_checkpoints.load import load
from qjax_checkpoints.save import save
from qjax_models import Decoder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.interop,
    pytest.mark.one_version,
    # Warnings of the PyTorch side about itself are none of our business.
    pytest.mark.filterwarnings("ignore"),
]

GOLDEN = Path(__file__).parents[1] / "golden"
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 12))
forward = nnx.jit(Decoder.__call__)


def relative(a, b) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def in_torch(path, adapter=None) -> np.ndarray:
    """Logits by transformers in float32, with an adapter by PEFT."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )  # fmt: skip
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)).logits.numpy()


def trained(model: Decoder) -> Decoder:
    for number, adapter in enumerate(adapters(model).values()):
        shape = adapter.lora_b.get_value().shape
        adapter.lora_b.set_value(0.1 * jax.random.normal(jax.random.key(number), shape))
    return model


@pytest.mark.parametrize("family", ["gemma2", "phi3"])
def test_peft_computes_the_same_beside_a_plain_base(family, tmp_path):
    checkpoint = load(GOLDEN / family, jnp.float32)
    model = trained(add_lora(checkpoint.model, rank=4, alpha=8.0))
    save_adapter(model, tmp_path / "adapter", base=str(checkpoint.path))
    ours, theirs = (
        forward(model, jnp.asarray(TOKENS)),
        in_torch(checkpoint.path, tmp_path / "adapter"),
    )
    assert relative(theirs, ours) < 1e-5
    assert relative(in_torch(checkpoint.path), ours) > 1e-2  # the adapter does something


def test_peft_computes_the_same_beside_what_nf4_codes_stand_for(tmp_path):
    checkpoint = load(GOLDEN / "llama", jnp.float32)
    base, _ = qjax.quantize_model(checkpoint.model, "nf4-g8")
    save(base, checkpoint, tmp_path / "base", "dense")
    model = trained(
        add_lora(base, rank=4, alpha=8.0, layers=[".*/0/.*(q|v)_proj", ".*/1/mlp/down_proj"])
    )
    model = trained(
        add_lora(model, rank=2, alpha=3.0, layers=["model/layers/2/.*o_proj", "lm_head"])
    )
    save_adapter(model, tmp_path / "adapter", base="base")
    expected = forward(model, jnp.asarray(TOKENS))
    assert relative(in_torch(tmp_path / "base", tmp_path / "adapter"), expected) < 1e-5
    save(merge_lora(model), checkpoint, tmp_path / "merged", "dense")
    assert relative(in_torch(tmp_path / "merged"), expected) < 1e-5


def test_a_requantized_model_loads_in_transformers(tmp_path):
    pytest.importorskip("compressed_tensors")
    checkpoint = load(GOLDEN / "llama", jnp.float32)
    base, _ = qjax.quantize_model(checkpoint.model, "w8a16-channel")
    again, _ = requantize_lora(trained(add_lora(base, rank=4, alpha=8.0)))
    save(again, checkpoint, tmp_path / "out", "compressed-tensors")
    assert relative(in_torch(tmp_path / "out"), forward(again, jnp.asarray(TOKENS))) < 1e-5


def test_adapters_of_peft_are_read(tmp_path):
    torch.manual_seed(0)
    path = GOLDEN / "llama"
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 2},
        alpha_pattern={"layers.1.self_attn.q_proj": 3}, task_type="CAUSAL_LM",
        init_lora_weights=False,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model = peft.get_peft_model(model, config)
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        theirs = model.eval()(torch.tensor(TOKENS)).logits.numpy()
    loaded = load_adapter(load(path, jnp.float32).model, tmp_path / "adapter")
    scalings = {path: adapter.scaling for path, adapter in adapters(loaded).items()}
    assert scalings["model/layers/0/self_attn/q_proj"] == 1.5
    assert scalings["model/layers/1/self_attn/q_proj"] == 0.75
    assert scalings["model/layers/2/mlp/up_proj"] == 3.0
    assert relative(forward(loaded, jnp.asarray(TOKENS)), theirs) < 1e-5
