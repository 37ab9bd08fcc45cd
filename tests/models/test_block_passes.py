# SPDX-License-Identifier: Apache-2.0
"""A pass through a decoder block that halts at the inputs of its layers, beside one that does not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qjax import block_passes, cpu, nnx_layers
from qjax.block_passes import BlockPass
from qjax.spilled import SpilledArrays
from qjax_models import Decoder, DecoderConfig, blockwise
from qjax_models.config import ExpertsConfig

CONFIG = DecoderConfig(
    vocab_size=64, hidden_size=32, mlp_size=96, num_layers=1, num_heads=4, num_kv_heads=2,
    head_size=8, max_positions=64,
)  # fmt: skip
DENSE = [
    ("self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj"),
    ("self_attn/o_proj",),
    ("mlp/gate_proj", "mlp/up_proj"),
    ("mlp/down_proj",),
]
BATCHES, LENGTH = 3, 16


@pytest.fixture(params=["dense", "experts"])
def passing(request) -> BlockPass:
    experts = ExpertsConfig(count=4, per_token=2, mlp_size=48, normalized=True)
    config = CONFIG if request.param == "dense" else dataclasses.replace(CONFIG, experts=experts)
    chain = blockwise(Decoder(config, rngs=nnx.Rngs(0)), LENGTH)
    keys = jax.random.split(jax.random.key(1), BATCHES)
    hidden = [jax.random.normal(key, (2, LENGTH, 32)) for key in keys]
    return BlockPass(block=chain.blocks[0], hidden=hidden, apply=chain.apply)


def wanted(passing: BlockPass) -> list[str]:
    everything = [path for path, _ in nnx_layers.quantizable_layers(passing.block.module)]
    return [path for path in everything if not path.endswith(("router", "gate"))]


def test_a_block_halts_once_for_each_input():
    chain = blockwise(Decoder(CONFIG, rngs=nnx.Rngs(0)), LENGTH)
    passing = BlockPass(
        block=chain.blocks[0], hidden=[jnp.ones((1, LENGTH, 32))], apply=chain.apply
    )
    every = [path for layers in DENSE for path in layers]
    assert [set(layers) for layers in passing.halts(every)] == [set(layers) for layers in DENSE]
    assert passing.halts(["mlp/up_proj", "self_attn/o_proj"]) == [
        ("self_attn/o_proj",), ("mlp/up_proj",)
    ]  # fmt: skip


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="is about CPUs")
@pytest.mark.parametrize("has_products", [False, True])
def test_bfloat16_is_computed_as_such_where_the_cpu_can(monkeypatch, has_products):
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: has_products)
    assert block_passes.compute_dtype(jnp.bfloat16) is (None if has_products else jnp.float32)
    assert block_passes.compute_dtype(jnp.float16) is jnp.float32
    assert block_passes.compute_dtype(jnp.float32) is jnp.float32


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="is about CPUs")
def test_passes_in_bfloat16_see_and_give_what_those_in_float32_do(monkeypatch):
    chain = blockwise(Decoder(CONFIG, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)), LENGTH)
    x = jax.random.normal(jax.random.key(1), (4, LENGTH, 32), jnp.bfloat16)
    module, found, given = chain.blocks[0].module, [], []
    for has_products in (False, True):
        monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda has=has_products: has)
        hidden = [x.astype(block_passes.compute_dtype(x.dtype) or x.dtype)]
        passing = BlockPass(block=chain.blocks[0], hidden=hidden, apply=chain.apply)
        found.append(passing.observed(module, wanted(passing), hessians=True)[0])
        passing.finish(module)
        given.append(passing.hidden[0])
    assert [g.dtype for g in given] == [jnp.float32, jnp.bfloat16]
    # A few roundings to eight bits one after the other.
    assert jnp.linalg.norm(given[1] - given[0]) <= 2**-6 * jnp.linalg.norm(given[0])
    for path in wanted(passing):
        wide, narrow = (some[path].hessian for some in found)
        assert jnp.linalg.norm(narrow - wide) <= 2**-5 * jnp.linalg.norm(wide)


@pytest.mark.parametrize("room", [0, 2, 6])
@pytest.mark.parametrize("spilled", [False, True])
def test_halts_change_nothing_that_is_seen_or_given(passing, tmp_path, monkeypatch, room, spilled):
    monkeypatch.setattr(block_passes, "_MOST_KEPT", room)
    module, paths = passing.block.module, wanted(passing)
    whole, _ = passing.observed(module, paths, hessians=True)
    hidden = SpilledArrays(tmp_path) if spilled else []
    for x in passing.hidden:
        hidden.append(x)
    halting = dataclasses.replace(passing, hidden=hidden, kept={})
    halts = halting.halts(paths)
    assert sorted(path for layers in halts for path in layers) == sorted(paths)
    for layers in halts:
        found, _ = halting.observed(module, layers, hessians=True, keep=True)
        for path in layers:
            for a, b in zip(*map(jax.tree.leaves, (found[path], whole[path])), strict=True):
                np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
    assert bool(halting.kept) == (room > 0)
    halting.finish(module)
    assert not halting.kept
    passing.finish(module)
    for ours, plain in zip(halting.hidden, passing.hidden, strict=True):
        np.testing.assert_allclose(ours, plain, rtol=2e-5, atol=2e-5)


def test_a_change_before_a_halt_is_seen_and_one_behind_it_is_not_needed(passing):
    module = passing.block.module
    weight = nnx_layers.named_variables(module)["self_attn/o_proj/kernel"]
    halts = passing.halts(wanted(passing))
    at_o, behind_it = halts[1], halts[2]
    assert at_o == ("self_attn/o_proj",)
    passing.observed(module, at_o, hessians=False, keep=True)
    before, _ = dataclasses.replace(passing, kept={}).observed(module, behind_it, hessians=True)
    weight.set_value(weight.get_value() * 1.5)
    after, _ = passing.observed(module, behind_it, hessians=True)
    expected, _ = dataclasses.replace(passing, kept={}).observed(module, behind_it, hessians=True)
    hessians = [np.asarray(seen.inputs[0].hessian) for seen in (before, after, expected)]
    np.testing.assert_allclose(hessians[1], hessians[2], rtol=2e-5, atol=2e-5)
    assert not np.allclose(hessians[0], hessians[1], rtol=1e-2)


def test_no_product_is_taken_twice_but_that_of_the_output():
    """Counted by XLA: attention, gate, up and down once, the output's product twice."""
    chain = blockwise(Decoder(CONFIG, rngs=nnx.Rngs(0)), LENGTH)
    hidden = [jax.random.normal(jax.random.key(1), (2, LENGTH, 32))]
    passing = BlockPass(block=chain.blocks[0], hidden=hidden, apply=chain.apply)
    module = passing.block.module

    def flops(program: jax.stages.Traced) -> float:
        analysis = program.lower().compile().cost_analysis()
        assert analysis is not None
        return analysis["flops"]

    whole, parts = flops(passing.traced(module)), 0.0
    for i, layers in enumerate(passing.halts([path for some in DENSE for path in some])):
        options = {"wanted": layers, "hessians": False, "keep": i > 0}
        parts += flops(passing.traced(module, **options))
        if i:
            passing.observed(module, layers, hessians=False, keep=True)
    parts += flops(passing.traced(module))
    of_output = 2 * 2 * LENGTH * 32 * 32
    assert parts < whole + 2 * of_output  # the other half is statistics; gate or up alone are three
