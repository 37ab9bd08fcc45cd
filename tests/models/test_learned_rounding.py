# SPDX-License-Identifier: Apache-2.0
"""Learned rounding of a whole decoder, block by block, at the end of a chain of methods."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax import nnx_layers, reconstruction
from qjax.algorithms import learned_rounding
from qjax_models import Decoder, DecoderConfig, blockwise

CONFIG = DecoderConfig(
    vocab_size=64, hidden_size=32, mlp_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_size=8,
    max_positions=128,
)  # fmt: skip
LEARNED = learned_rounding.Options(steps=30, rounding_reach=0.1, range_reach=0.01)


@pytest.mark.parametrize(
    ("start", "scheme", "dtype"),
    [("rtn", "w3a16-g16", jnp.float32), ("awq+gptq", "w3a16-g16-asym", jnp.bfloat16)],
)
def test_a_decoder_comes_nearer_to_the_unquantized_one(start, scheme, dtype):
    model = Decoder(CONFIG, dtype=dtype, rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(0, 64, (16, 24), dtype=np.int32)
    expected = np.asarray(model(jnp.asarray(tokens)), np.float32)
    reconstruction._step.clear_cache()
    errors = []
    for learned in (None, LEARNED):
        method = dataclasses.replace(qjax.Method.parse(start), learned=learned)
        result, report = qjax.quantize_sequentially(model, blockwise, tokens, scheme, method=method)
        got = np.asarray(result(jnp.asarray(tokens)), np.float32)
        errors.append(np.mean((got - expected) ** 2))
        assert {layer.method for layer in report.quantized} == {method.name}
        assert len(nnx_layers.quantized_layers(result)) == len(report.quantized) == 14
        assert all(layer.relative_output_error < 0.5 for layer in report.quantized)
    assert errors[1] < errors[0]
    assert reconstruction._step._cache_size() == 1
