# SPDX-License-Identifier: Apache-2.0
"""Mixture of experts: routing, and what calibration makes of experts that see some of the tokens."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax import nnx_layers, qtensor
from qjax.algorithms import gptq, learned_rounding
from qjax.nnx_layers import quantized_layers
from qjax_models import Decoder, DecoderConfig, blockwise
from qjax_models.config import ExpertNames, ExpertsConfig
from qjax_models.experts import Experts, route

EXPERTS = ExpertsConfig(count=4, per_token=2, mlp_size=48, normalized=True)
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "mlp_size": 48,
    "num_layers": 1,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_size": 16,
    "max_positions": 64,
    "initializer_std": 0.3,
}
TOKENS = np.random.default_rng(0).integers(0, 64, (8, 40)).astype(np.int32)
MANY_TOKENS = np.random.default_rng(0).integers(0, 64, (80, 40)).astype(np.int32)
ENOUGH = 16  # tokens for each input


def decoder(experts=EXPERTS, **changes) -> Decoder:
    return Decoder(DecoderConfig(experts=experts, **SIZES | changes), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def model() -> Decoder:
    return decoder()


def reference_routing(logits: np.ndarray, experts: ExpertsConfig) -> np.ndarray:
    """The weight of each expert for each row, as the papers have it."""
    weights = np.zeros_like(logits)
    for row, scores in zip(weights, logits, strict=True):
        chances = np.exp(scores - scores.max())
        chances /= chances.sum()
        for expert in sorted(range(len(scores)), key=lambda e: -scores[e])[: experts.per_token]:
            row[expert] = chances[expert]
        if experts.normalized:
            row /= row.sum()
    return weights


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("per_token", [1, 3, 5])
def test_routing(normalized, per_token):
    experts = ExpertsConfig(count=5, per_token=per_token, mlp_size=1, normalized=normalized)
    logits = np.random.default_rng(0).standard_normal((40, 5)).astype(np.float32)
    expected = reference_routing(logits, experts)
    routing = route(jnp.asarray(logits), experts)
    for expert in range(5):
        reached, weights = routing.share(expert)
        np.testing.assert_allclose(weights, expected[:, expert], rtol=1e-5)
        np.testing.assert_array_equal(reached, expected[:, expert] > 0)


def inputs_of_experts(model: Decoder, tokens: np.ndarray = TOKENS) -> tuple[Experts, np.ndarray]:
    """The experts of the first block, and the rows that reach it."""
    block = model.model.layers[0]
    positions = jnp.arange(tokens.shape[1])[None]
    angles, _ = model.model.rotations(positions, tokens.shape[1])
    x = model.model.embed(jnp.asarray(tokens))
    x = x + block.self_attn(block.input_layernorm(x), angles, positions)[0]
    return block.sparse, np.asarray(block.post_attention_layernorm(x)).reshape(-1, x.shape[-1])


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def kernels(expert) -> list[np.ndarray]:
    return [np.asarray(getattr(expert, name).kernel.get_value()) for name in expert.projections]


def test_each_token_goes_through_its_experts(model):
    sparse, rows = inputs_of_experts(model)
    weights = reference_routing(rows @ np.asarray(sparse.gate.kernel.get_value()), EXPERTS)
    expected = np.zeros_like(rows)
    for number, expert in enumerate(sparse.experts):
        gate, up, down = kernels(expert)
        mine = weights[:, number] > 0
        hidden = silu(rows[mine] @ gate) * (rows[mine] @ up)
        expected[mine] += weights[mine, number, None] * (hidden @ down)
    found = np.asarray(sparse(jnp.asarray(rows)[None]))[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_an_expert_may_overflow_on_tokens_of_others(model):
    sparse, rows = inputs_of_experts(nnx.clone(model))
    chosen, _ = route(jnp.asarray(rows[0]) @ sparse.gate.kernel.get_value(), EXPERTS)
    other = min({0, 1, 2, 3} - set(np.asarray(chosen).tolist()))
    sparse.experts[other].down_proj.kernel.set_value(jnp.full((48, 32), jnp.inf))
    assert np.isfinite(np.asarray(sparse(jnp.asarray(rows[:1])[None]))).all()


def same_codes(found: qtensor.QTensor, expected: qtensor.QTensor) -> bool:
    """But for one in five hundred: sums of another order may fall to the other side of a tie."""
    a, b = (np.asarray(qtensor.unpacked(q)) for q in (found, expected))
    return np.mean(a == b) > 0.998


@pytest.mark.parametrize("tokens", ["routed", "all"])
def test_gptq_of_each_expert_is_that_of_its_weight_and_its_tokens(model, tokens):
    quantized, report = qjax.quantize_sequentially(
        model, blockwise, MANY_TOKENS, "w4a16-g16", method="gptq", experts=tokens, batch_size=40
    )
    sparse, rows = inputs_of_experts(model, MANY_TOKENS)
    weights = reference_routing(rows @ np.asarray(sparse.gate.kernel.get_value()), EXPERTS)
    by_path = {layer.path: layer for layer in report.layers}
    how = qjax.Method.parse("gptq")
    for number, expert in enumerate(sparse.experts):
        gate, up, down = kernels(expert)
        mine = rows[weights[:, number] > 0] if tokens == "routed" else rows
        hidden = silu(mine @ gate) * (mine @ up)
        assert len(mine) > ENOUGH * 48
        for name, w, x in (("gate", gate, mine), ("up", up, mine), ("down", down, hidden)):
            path = f"model/layers/0/mlp/experts/{number}/{name}_proj"
            factor = gptq.factor(jnp.asarray(x.T @ x), how.rounding, 16)
            expected = gptq.quantize(
                jnp.asarray(w), "w4a16-g16", factor, options=how.rounding, search=how.search
            )
            q = quantized_layers(quantized)[path]
            assert same_codes(q, expected), path
            entry = by_path[path]
            assert (entry.method, entry.calibration_rows, entry.fallback) == ("gptq", len(mine), "")
            error = np.linalg.norm(x @ (np.asarray(qtensor.dequantize(q)) - w))
            assert entry.relative_output_error == pytest.approx(
                error / np.linalg.norm(x @ w), rel=1e-3
            )


def test_the_router_stays_as_it_is_unless_named(model):
    _, report = qjax.quantize_model(model, "w4a16-g16")
    alone = {layer.path: layer.reason for layer in report.unquantized}
    assert alone["model/layers/0/mlp/gate"] == "no rule names it"
    assert len(report.quantized) == 4 + 3 * 4
    rules = [[".*mlp/gate", "w8a16-g16"], [".*", "w4a16-g16"]]
    quantized, _ = qjax.quantize_model(model, qjax.Recipe.from_json(rules))
    assert quantized_layers(quantized)["model/layers/0/mlp/gate"].scheme.name == "w8a16-g16"


@pytest.fixture(scope="module")
def unbalanced() -> Decoder:
    """A few tokens go to the third expert, and none to the last."""
    model = decoder()
    # One channel that attention leaves alone has the same sign in every row that is routed.
    table, mixed = model.model.embed_tokens.embedding, model.model.layers[0].self_attn.o_proj.kernel
    table.set_value(table.get_value().at[:, 0].set(2.0))
    mixed.set_value(mixed.get_value().at[:, 0].set(0.0))
    sparse, rows = inputs_of_experts(model)
    kernel = np.asarray(sparse.gate.kernel.get_value()).copy()
    kernel[0, 3] = -1000.0
    for pull in np.arange(0, 10, 0.1):
        kernel[0, 2] = -pull
        if (reference_routing(rows @ kernel, EXPERTS)[:, 2] > 0).sum() < 20:
            break
    sparse.gate.kernel.set_value(jnp.asarray(kernel))
    return model


def tokens_of_experts(model: Decoder) -> np.ndarray:
    """Whether each row goes to each expert."""
    sparse, rows = inputs_of_experts(model)
    return reference_routing(rows @ np.asarray(sparse.gate.kernel.get_value()), EXPERTS) > 0


def test_experts_of_too_few_tokens_are_named_and_filled_up(unbalanced):
    quantized, report = qjax.quantize_sequentially(
        unbalanced, blockwise, TOKENS, "w4a16-g16", method="gptq"
    )
    sparse, rows = inputs_of_experts(unbalanced)
    goes = tokens_of_experts(unbalanced)
    assert 0 == goes[:, 3].sum() < goes[:, 2].sum() < 20 and goes[:, :2].sum(0).min() > 48
    how = qjax.Method.parse("gptq")
    by_path = {layer.path: layer for layer in report.layers}
    for number, expert in enumerate(sparse.experts):
        mine = goes[:, number]
        gate, up, down = kernels(expert)
        hidden = silu(rows @ gate) * (rows @ up)
        for name, w, x in (("gate", gate, rows), ("up", up, rows), ("down", down, hidden)):
            path = f"model/layers/0/mlp/experts/{number}/{name}_proj"
            missing = min(ENOUGH * len(w), len(x)) - mine.sum()
            short = mine.sum() < len(w)
            hessian = x[mine].T @ x[mine] + missing * (x.T @ x) / len(x)
            factor = gptq.factor(jnp.asarray(hessian), how.rounding, 16)
            expected = gptq.quantize(
                jnp.asarray(w), "w4a16-g16", factor, options=how.rounding, search=how.search
            )
            assert same_codes(quantized_layers(quantized)[path], expected), path
            assert by_path[path].calibration_rows == mine.sum()
            said = (
                f"{mine.sum()} calibration tokens for {len(w)} inputs: filled up with the average"
            )
            fallback = by_path[path].fallback
            assert fallback.startswith(said) if short else fallback == ""
            assert (f"{path}: {fallback}" in report.warnings()) == short


def test_calibrated_with_all_tokens_no_expert_is_short(unbalanced):
    _, report = qjax.quantize_sequentially(
        unbalanced, blockwise, TOKENS, "w4a16-g16", method="gptq", experts="all"
    )
    assert {layer.calibration_rows for layer in report.quantized} == {TOKENS.size}
    assert not any(layer.fallback for layer in report.layers)


def test_the_whole_model_at_once_rounds_such_experts_to_nearest(unbalanced):
    observed = qjax.calibrate(unbalanced, [TOKENS[:4], TOKENS[4:]])
    assert int(observed["model/layers/0/mlp/experts/3/up_proj"].rows) == 0
    _, report = qjax.quantize_model(unbalanced, "w4a16-g16", observed, method="gptq")
    by_path = {layer.path: layer for layer in report.layers}
    short = by_path["model/layers/0/mlp/experts/3/down_proj"]
    assert short.method == "rtn" and short.calibration_rows == 0
    assert short.fallback == "0 calibration tokens for 48 inputs: rounded to nearest"
    assert by_path["model/layers/0/mlp/experts/0/down_proj"].method == "gptq"
    every = qjax.calibrate(unbalanced, [TOKENS], experts="all")
    _, report = qjax.quantize_model(unbalanced, "w4a16-g16", every, method="gptq")
    assert {layer.method for layer in report.quantized} == {"gptq"}


def test_too_few_tokens_for_all_experts_are_refused(unbalanced):
    message = "self_attn/q_proj: 30 calibration tokens for 32 inputs"
    with pytest.raises(ValueError, match=message):
        qjax.quantize_sequentially(
            unbalanced, blockwise, TOKENS[:1, :30], "w4a16-g16", method="gptq"
        )
    rules = qjax.Recipe.from_json([[".*down_proj", "w4a16-g16"]])
    with pytest.raises(
        ValueError, match="experts/0/down_proj: 40 calibration tokens for 48 inputs"
    ):
        qjax.quantize_sequentially(unbalanced, blockwise, TOKENS[:1], rules, method="gptq")


def test_methods_that_change_a_block_as_a_whole(unbalanced):
    """Factors in the attention, and the experts trained together with it."""
    method = dataclasses.replace(
        qjax.Method.parse("smoothquant"), learned=learned_rounding.Options(steps=5, batch=1)
    )
    quantized, report = qjax.quantize_sequentially(
        unbalanced, blockwise, TOKENS, "w8a8", method=method
    )
    assert [layer.method for layer in report.quantized] == ["smoothquant+learned"] * 16
    exact, near = (np.asarray(m.hidden(jnp.asarray(TOKENS))) for m in (unbalanced, quantized))
    assert np.linalg.norm(near - exact) < 0.1 * np.linalg.norm(exact)


def test_names_of_a_family():
    names = ExpertNames(layer="block_sparse_moe", gate="w1", up="w3", down="w2")
    model = decoder(ExpertsConfig(count=2, per_token=1, mlp_size=48, normalized=True, names=names))
    paths = {path for path, _ in nnx_layers.quantizable_layers(model)}
    assert "model/layers/0/block_sparse_moe/experts/1/w2" in paths
    assert "model/layers/0/block_sparse_moe/gate" in paths
