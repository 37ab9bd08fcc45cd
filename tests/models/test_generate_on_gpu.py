# SPDX-License-Identifier: Apache-2.0
"""The shipped model in int4 speaks the same through kernels as through XLA."""

import pytest
from flax import nnx

import qjax
from pallas_kernels import device
from qjax_checkpoints.load import load
from qjax_checkpoints.shipped import model_path
from qjax_checkpoints.tokenizer import load_tokenizer
from qjax_models.generate import Generator

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not device.is_hopper(), reason="needs a Hopper GPU"),
]


@pytest.mark.parametrize("scheme", ["w4a16-g128", "w4a16-g32-asym"])
def test_same_tokens(scheme):
    quantized, _ = qjax.quantize_model(load(model_path()).model, scheme)
    graph, state = nnx.split(quantized)
    prepared = nnx.merge(graph, qjax.prepare(state))
    tokenizer = load_tokenizer(model_path(), vocab_size=4096)
    prompts = [
        tokenizer.encode(text) for text in ("def read_json(path):", "import os\n", "class A")
    ]
    ours, plain = (
        Generator(model, capacity=96).generate(prompts, 48).tokens
        for model in (prepared, quantized)
    )
    assert ours == plain
