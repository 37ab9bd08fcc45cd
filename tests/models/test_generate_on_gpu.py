# SPDX-License-Identifier: Apache-2.0
"""The shipped model in int4 speaks the same through kernels as through XLA."""

import argparse
from pathlib import Path

import numpy as np
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
def test_speaks_the_same(scheme):
    """Token by token on a text of 64 rows, which all products of the prepared model take to the kernel.

    Free greedy answers part at the first near tie, for either rounds its sums in an order of its own.
    """
    quantized, _ = qjax.quantize_model(load(model_path()).model, scheme)
    graph, state = nnx.split(quantized)
    prepared = nnx.merge(graph, qjax.prepare(state))
    tokenizer = load_tokenizer(model_path(), vocab_size=4096)
    tokens = np.asarray([tokenizer.encode(Path(argparse.__file__).read_text())[1000:1064]])
    forward = nnx.jit(lambda model, tokens: model(tokens))
    ours, plain = (np.asarray(forward(m, tokens), np.float64)[0] for m in (prepared, quantized))
    assert not np.array_equal(ours, plain)  # the kernel has been used
    assert np.linalg.norm(ours - plain) < 0.02 * np.linalg.norm(plain)
    assert np.mean(ours.argmax(-1) == plain.argmax(-1)) >= 0.95
    answer = Generator(prepared, capacity=64).generate([tokens[0, :32].tolist()], 24)
    assert len(answer.tokens[0]) == 24
