# SPDX-License-Identifier: Apache-2.0
"""A choice keeps to its budget, is the best of all, and says what it was made from."""

import itertools
import json

import jax
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax import Choice, sensitivity
from qjax.qtensor import device_bytes

TOKENS = np.random.default_rng(0).integers(0, 12, (3, 8)).astype(np.int32)
CANDIDATES = ("w2a16-g8", "w4a16-g8", "w8a16-g8")


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed_tokens = nnx.Embed(12, 16, rngs=rngs)
        self.up, self.gate = (nnx.Linear(16, 24, rngs=rngs) for _ in range(2))
        self.down = nnx.Linear(24, 16, rngs=rngs)
        self.last = nnx.Linear(16, 16, rngs=rngs)
        self.lm_head = nnx.Linear(16, 12, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed_tokens(tokens)
        x = x + self.down(jax.nn.silu(self.gate(x)) * self.up(x))
        return self.lm_head(x + self.last(x))


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(nnx.Rngs(0))


def least_loss(choice: Choice, nbytes: float) -> float:
    """By trying everything."""
    return min(
        sum(of.kl[scheme] for of, scheme in zip(choice.groups, schemes, strict=True))
        for schemes in itertools.product(*(of.kl for of in choice.groups))
        if sum(of.group.nbytes[s] for of, s in zip(choice.groups, schemes, strict=True)) <= nbytes
    )


@pytest.mark.parametrize("bits", [6.5, 12.0])
def test_the_best_of_all_that_fit(model, bits):
    choice = qjax.choose_schemes(model, TOKENS, bits=bits, candidates=CANDIDATES)
    weights = 3 * 16 * 24 + 16 * 16
    assert sum(of.group.weights for of in choice.groups) == weights
    assert choice.sum_of_kls == pytest.approx(least_loss(choice, bits * weights / 8))

    quantized, report = qjax.quantize_model(model, choice.recipe)
    chosen_for = [layer for layer in report.layers if layer.path not in ("embed_tokens", "lm_head")]
    stored = 8 * sum(layer.bytes_after for layer in chosen_for) / weights
    assert choice.bits_per_weight == pytest.approx(stored) and stored <= bits
    together = qjax.evaluate(quantized, TOKENS, baseline=model).kl
    assert choice.kl == pytest.approx(together, rel=1e-3, abs=1e-7)
    assert qjax.choose_schemes(model, TOKENS, bits=bits, candidates=CANDIDATES) == choice


def test_a_size_is_that_of_the_whole_model(model):
    size = device_bytes(nnx.state(model)) // 2
    choice = qjax.choose_schemes(model, TOKENS, size=size, candidates=CANDIDATES)
    quantized, _ = qjax.quantize_model(model, choice.recipe)
    assert 0.9 * size < device_bytes(nnx.state(quantized)) <= size


def test_the_reasons_go_through_json(model):
    choice = qjax.choose_schemes(model, TOKENS, bits=7, candidates=CANDIDATES)
    value = json.loads(json.dumps(choice.as_json()))
    assert Choice.from_json(value) == choice and Choice.from_json(value).as_json() == value
    first = value["groups"][0]
    assert first["layers"] == ["gate", "up"] and list(first["options"]) == [*CANDIDATES, "plain"]
    saved = first["options"]["plain"]["nbytes"] - first["options"][first["chosen"]]["nbytes"]
    assert first["bits_saved"] == 8 * saved


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"bits": 5.9}, "5.9 bits a weight cannot be had: .* 6 or more, .* as they are .* 32"),
        ({"bits": 32}, "32 bits a weight cannot be had"),
        ({"size": 100}, r"100 bytes cannot be had: .* take 2,\d+ or more .* as they are"),
        ({}, "bits a weight or bytes in all, got bits=None and size=None"),
        ({"bits": 7, "size": 9000}, "got bits=7 and size=9000"),
    ],
)
def test_what_cannot_be_had_says_what_can(model, monkeypatch, budget, message):
    monkeypatch.setattr(sensitivity, "measure", None)  # before anything is measured
    with pytest.raises(ValueError, match=message) as caught:
        qjax.choose_schemes(model, TOKENS, candidates=CANDIDATES, **budget)
    assert "\n" not in str(caught.value)


def test_the_least_is_had(model):
    choice = qjax.choose_schemes(model, TOKENS, bits=6, candidates=CANDIDATES)
    assert {of.scheme.name for of in choice.groups if of.scheme} == {"w2a16-g8"}
    assert choice.bits_per_weight == 6
