# SPDX-License-Identifier: Apache-2.0
"""Decoders whose weights are QTensors: the same code computes with them."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qjax import QTensor, Recipe, Rule, Scheme, dequantize, quantize_model
from qjax_models import Decoder, Generator

forward = nnx.jit(Decoder.__call__)


def dequantized(model: Decoder) -> Decoder:
    """The same numbers in plain arrays."""
    plain = Decoder.abstract(model.config)
    state = nnx.to_flat_state(nnx.state(plain))
    held = dict(nnx.to_flat_state(nnx.state(model)))
    values = [
        (path, leaf.replace(dequantize(w) if isinstance(w := held[path][...], QTensor) else w))
        for path, leaf in state
    ]
    nnx.update(plain, nnx.from_flat_state(values))
    return plain


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3"])
def test_logits_are_those_of_the_dequantized_weights(goldens, name):
    scheme = Scheme.parse("w4a16-channel")
    rules = (Rule(pattern="model/embed_tokens", scheme=scheme), Rule(pattern=".*", scheme=scheme))
    recipe = Recipe(rules=rules)
    quantized, _ = quantize_model(goldens[name].model(), recipe)
    assert isinstance(quantized.model.embed_tokens.embedding[...], QTensor)
    tokens = jnp.asarray(goldens[name].tokens)
    found, expected = forward(quantized, tokens), forward(dequantized(quantized), tokens)
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)
    assert np.linalg.norm(found - goldens[name].logits) > 1e-3 * np.linalg.norm(expected)


def test_a_quantized_decoder_generates_what_its_dequantized_weights_do(goldens):
    quantized, _ = quantize_model(goldens["qwen3"].model(), "w8a16-channel")
    prompts = [[5, 9, 33], [2] * 18]
    found = Generator(quantized, capacity=48).generate(prompts, 12)
    assert (
        found.tokens == Generator(dequantized(quantized), capacity=48).generate(prompts, 12).tokens
    )
