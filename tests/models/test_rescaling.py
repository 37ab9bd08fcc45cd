# SPDX-License-Identifier: Apache-2.0
"""The searches of AWQ and Outlier Suppression+ in a decoder block are plain loops over the papers' formulas."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax import folding, observation, rescaling
from qjax.algorithms import awq, outlier_suppression
from qjax.blockwise import Blockwise
from qjax_models import Decoder, DecoderConfig, blockwise

HEADS, KV_HEADS, SIZE = 4, 2, 8
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
# What feeds, what it feeds, and whether the loss is that of the product alone.
PLACES = (
    ("input_layernorm", QKV, False),
    ("self_attn.v_proj", ("self_attn.o_proj",), True),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), False),
    ("mlp.up_proj", ("mlp.down_proj",), True),
)


class Setting(NamedTuple):
    chain: Blockwise
    samples: jax.Array


@pytest.fixture
def setting() -> Setting:
    """A block whose inputs and weights have channels of very different size."""
    config = DecoderConfig(
        vocab_size=64, hidden_size=32, mlp_size=48, num_layers=1, num_heads=HEADS,
        num_kv_heads=KV_HEADS, head_size=SIZE, max_positions=16,
    )  # fmt: skip
    chain = blockwise(Decoder(config, rngs=nnx.Rngs(0)), 16)
    block, rng = chain.blocks[0].module, np.random.default_rng(0)
    for _, module in nnx.iter_modules(block):
        if isinstance(module, nnx.Linear):
            sizes = np.exp(rng.normal(0, 1, module.kernel.shape[:1]))
            module.kernel[...] *= jnp.asarray(sizes, jnp.float32)[:, None]
    for norm in (block.input_layernorm, block.post_attention_layernorm):
        factors = np.exp(rng.normal(0, 1, 32))
        factors[rng.choice(32, 2, replace=False)] *= 10
        norm.weight[...] = jnp.asarray(factors, jnp.float32)
    return Setting(chain, jnp.asarray(rng.standard_normal((4, 16, 32)), jnp.float32))


def copy(module):
    graph, state = nnx.split(module)
    return nnx.merge(graph, jax.tree.map(jnp.copy, state))


def at(module, path):
    for name in path.split("."):
        module = getattr(module, name)
    return module


def inputs_of(run, monkeypatch) -> dict[int, np.ndarray]:
    """What each linear layer multiplies, by its identity."""
    seen, call = {}, nnx.Linear.__call__

    def noting(self, x, **options):
        seen[id(self)] = np.asarray(x).reshape(-1, x.shape[-1])
        return call(self, x, **options)

    with monkeypatch.context() as patch:
        patch.setattr(nnx.Linear, "__call__", noting)
        run()
    return seen


def repeated(channels: np.ndarray, feeds: str) -> np.ndarray:
    """Channels of the values, once for each query head of theirs."""
    if feeds != "self_attn.v_proj":
        return channels
    return np.repeat(channels.reshape(KV_HEADS, SIZE), HEADS // KV_HEADS, axis=0).reshape(-1)


def shared(inputs: np.ndarray, feeds: str) -> np.ndarray:
    """The mean over the query heads that share a channel of the values."""
    if feeds != "self_attn.v_proj":
        return inputs
    return inputs.reshape(KV_HEADS, HEADS // KV_HEADS, SIZE).mean(axis=1).reshape(-1)


def folded(block, feeds: str, fed, scale: np.ndarray):
    """The producer divided, the consumers multiplied."""
    producer = at(block, feeds)
    variable = producer.kernel if isinstance(producer, nnx.Linear) else producer.weight
    variable[...] = variable[...] / scale
    for path in fed:
        at(block, path).kernel[...] *= repeated(scale, feeds)[:, None]


def rounded(kernel, scheme):
    return qjax.dequantize(qjax.quantize(kernel, scheme), jnp.float32)


def awq_scales(s_x: np.ndarray, s_w: np.ndarray) -> list[np.ndarray]:
    """AWQ's formula at all of its ratios."""
    scales = []
    for step in range(20):
        s = np.maximum(s_x ** (step / 20) / (s_w ** (1 - step / 20) + 1e-4), 1e-4)
        scales.append(s / np.sqrt(s.max() * s.min()))
    return scales


def outlier_scales(s_x: np.ndarray, s_w: np.ndarray) -> list[np.ndarray]:
    """That of Outlier Suppression+ at all of its thresholds, where a channel stands out."""
    largest, median = s_x.max(), np.median(s_x)
    if largest <= 6 * median:
        return []
    thresholds = np.geomspace(largest, median, 21)[1:]
    outlying = s_x > 6 * median
    return [np.where(outlying, np.maximum(1, s_x / t), 1) for t in thresholds]


def by_the_paper(setting: Setting, scheme: str, group: int, formula: Callable, monkeypatch):
    """Each place in turn: all factors and doing nothing, the least loss wins. The block, and the losses."""
    block, tables = copy(setting.chain.blocks[0].module), []
    context = setting.chain.blocks[0].context

    def run(module):
        return setting.chain.apply(module, setting.samples, context)

    # AWQ is calibrated once a block, and what follows a fold is divided by its factors.
    inputs = inputs_of(lambda: run(block), monkeypatch)
    inputs = {path: inputs[id(at(block, path))] for _, fed, _ in PLACES for path in fed}
    for feeds, fed, alone in PLACES:
        x = inputs[fed[0]]
        w = np.abs(np.concatenate([at(block, p).kernel[...] for p in fed], axis=1))
        tiles = w.reshape(-1, group, w.shape[1])
        relative = (tiles / (tiles.max(axis=1, keepdims=True) + 1e-6)).reshape(w.shape).mean(axis=1)
        s_x, s_w = shared(np.abs(x).mean(axis=0), feeds), shared(relative, feeds)
        scales = [np.ones_like(s_x), *formula(s_x, s_w)]
        target, losses = run(block), []
        for scale in scales:
            tried = copy(block)
            folded(tried, feeds, fed, scale.astype(np.float32))
            for path in fed:
                at(tried, path).kernel[...] = rounded(at(tried, path).kernel[...], scheme)
            if alone:
                left = np.asarray(at(tried, fed[0]).kernel[...]) / repeated(scale, feeds)[:, None]
                losses.append(((x @ (left - np.asarray(at(block, fed[0]).kernel[...]))) ** 2).sum())
            else:
                losses.append(float(((run(tried) - target) ** 2).mean()))
        best = int(np.argmin(losses))
        if best:
            folded(block, feeds, fed, scales[best].astype(np.float32))
        tables.append(losses)
    return block, tables


# Symmetric ranges put the largest weight of each group halfway between two codes: a tie, which the last
# bit of a factor decides.
@pytest.mark.parametrize("scheme", ["w3a16-g16-asym", "w4a16-g8-asym"])
@pytest.mark.parametrize(
    "options, formula",
    [(awq.Options(), awq_scales), (outlier_suppression.Options(), outlier_scales)],
    ids=["awq", "outlier-suppression"],
)
def test_what_is_chosen_is_what_the_paper_s_loop_chooses(
    setting, scheme, options, formula, monkeypatch
):
    group = int(scheme.split("-g")[1].split("-")[0])
    expected, losses = by_the_paper(setting, scheme, group, formula, monkeypatch)
    block = setting.chain.blocks[0]
    watched = copy(block.module)
    observed = observation.observe(
        watched, lambda: setting.chain.apply(watched, setting.samples, block.context), hessians=True
    )
    schemes = {
        path.replace(".", "/"): qjax.Scheme.parse(scheme) for _, f, _ in PLACES for path in f
    }
    rescaling.rescale(block, observed, schemes, options, setting.samples, setting.chain.apply, None)
    for (path, found), wanted in zip(
        nnx.to_flat_state(nnx.state(block.module)),
        jax.tree.leaves(nnx.state(expected)),
        strict=True,
    ):
        np.testing.assert_allclose(found[...], wanted, rtol=1e-4, err_msg=str(path))
    # The losses differ by enough that another choice would show, and doing nothing is never best.
    searched = [table for table in losses if len(table) > 1]
    assert len(searched) >= 2
    for table in searched:
        least, next_least = sorted(table)[:2]
        assert table[0] > 1.05 * least and next_least > 1.0005 * least


def a_model(outliers: bool) -> Decoder:
    """Four of 64 channels of each norm 48 times as large and the weights behind them as much smaller, or not."""
    config = DecoderConfig(
        vocab_size=64, hidden_size=64, mlp_size=96, num_layers=2, num_heads=HEADS,
        num_kv_heads=KV_HEADS, head_size=16, max_positions=16,
    )  # fmt: skip
    model, rng = Decoder(config, rngs=nnx.Rngs(0)), np.random.default_rng(0)
    for block in blockwise(model, 16).blocks:
        for where in block.folds:
            if where.producer.path.endswith("norm") and outliers:
                scale = np.ones(64, np.float32)
                scale[rng.choice(64, 4, replace=False)] = 1 / 48
                folding.fold(block.module, where, jnp.asarray(scale))
    return model


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 64, (32, 16)).astype(np.int32)


def quantized(model: Decoder, tokens: np.ndarray, method: str) -> Decoder:
    return qjax.quantize_sequentially(model, blockwise, tokens, "w4a16-g32-asym", method=method)[0]


def test_a_model_without_outliers_is_left_alone(tokens):
    model = a_model(outliers=False)
    expected = quantized(model, tokens, "gptq")
    found = quantized(model, tokens, "outlier-suppression+gptq")
    assert all(
        (a == b).all()
        for a, b in zip(
            jax.tree.leaves(nnx.state(found)), jax.tree.leaves(nnx.state(expected)), strict=True
        )
    )


@pytest.mark.parametrize("rounding", ["rtn", "gptq"])
def test_outliers_cost_nothing_where_they_are_suppressed(tokens, rounding):
    lost = {}
    chain = "outlier-suppression" if rounding == "rtn" else f"outlier-suppression+{rounding}"
    for outliers, method in ((False, rounding), (True, rounding), (True, chain)):
        model = a_model(outliers)
        found = qjax.evaluate(quantized(model, tokens, method), tokens, baseline=model)
        lost[outliers, method] = found.kl
    assert lost[True, rounding] > 2 * lost[False, rounding]
    assert lost[True, chain] < 1.15 * lost[False, rounding]
