# SPDX-License-Identifier: Apache-2.0
"""AWQ's search in a decoder block is that of a plain loop over the paper's formula."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax import observation, rescaling
from qjax.algorithms import awq
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
        norm.weight[...] = jnp.asarray(np.exp(rng.normal(0, 1, 32)), jnp.float32)
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


def by_the_paper(setting: Setting, scheme: str, group: int, monkeypatch):
    """Each place in turn: all ratios and doing nothing, the least loss wins. The block, and the losses."""
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
        scales = [np.ones_like(s_x)]
        for step in range(20):
            s = np.maximum(s_x ** (step / 20) / (s_w ** (1 - step / 20) + 1e-4), 1e-4)
            scales.append(s / np.sqrt(s.max() * s.min()))
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
def test_awq_chooses_what_the_paper_s_loop_chooses(setting, scheme, monkeypatch):
    group = int(scheme.split("-g")[1].split("-")[0])
    expected, losses = by_the_paper(setting, scheme, group, monkeypatch)
    block = setting.chain.blocks[0]
    watched = copy(block.module)
    observed = observation.observe(
        watched, lambda: setting.chain.apply(watched, setting.samples, block.context), hessians=True
    )
    schemes = {
        path.replace(".", "/"): qjax.Scheme.parse(scheme) for _, f, _ in PLACES for path in f
    }
    rescaling.rescale(
        block, observed, schemes, awq.Options(), setting.samples, setting.chain.apply, None
    )
    for (path, found), wanted in zip(
        nnx.to_flat_state(nnx.state(block.module)),
        jax.tree.leaves(nnx.state(expected)),
        strict=True,
    ):
        np.testing.assert_allclose(found[...], wanted, rtol=1e-4, err_msg=str(path))
    # The losses differ by enough that another choice would show, and doing nothing is never best.
    for table in losses:
        least, next_least = sorted(table)[:2]
        assert table[0] > 1.05 * least and next_least > 1.0005 * least
