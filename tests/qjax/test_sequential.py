# SPDX-License-Identifier: Apache-2.0
"""Working through a model block by block: statistics, folds, and what each block sees."""

import dataclasses
import threading

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import (
    block_quantization,
    folding,
    nnx_layers,
    observation,
    qtensor,
    reconstruction,
    statistics,
)
from qjax.algorithms import gptq, learned_rounding
from qjax.blockwise import Block, Blockwise, Channels, Fold
from qjax.method import Method, names
from qjax.nnx_layers import quantized_layers

WIDTH, INNER, TOKENS = 16, 24, (6, 40)


class MLP(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.gate = nnx.Linear(WIDTH, INNER, rngs=rngs)
        self.up = nnx.Linear(WIDTH, INNER, rngs=rngs)
        self.down = nnx.Linear(INNER, WIDTH, rngs=rngs)

    def __call__(self, x):
        normed = self.norm(x)
        return x + self.down(jax.nn.silu(self.gate(normed)) * self.up(normed))


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(32, WIDTH, rngs=rngs)
        self.blocks = nnx.List([MLP(rngs) for _ in range(3)])
        self.lm_head = nnx.Linear(WIDTH, 32, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


FOLDS = (
    Fold(producer=Channels(path="norm"), consumers=("gate", "up")),
    Fold(producer=Channels(path="up"), consumers=("down",)),
)


def apply(block, x, context):
    del context
    return block(x)


def chain(model: Model, length: int) -> Blockwise:
    del length
    blocks = tuple(
        Block(path=f"blocks/{i}", module=block, context=None, folds=FOLDS)
        for i, block in enumerate(model.blocks)
    )
    return Blockwise(blocks=blocks, enter=model.embed, apply=apply)


@pytest.fixture(scope="module")
def model() -> Model:
    model = Model(nnx.Rngs(0))
    rng = np.random.default_rng(0)
    for block in model.blocks:
        block.norm.scale.set_value(jnp.asarray(rng.uniform(0.5, 4.0, WIDTH), jnp.float32))
        block.up.bias.set_value(jnp.asarray(rng.standard_normal(INNER), jnp.float32))
    return model


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 32, TOKENS).astype(np.int32)


def test_statistics_are_those_of_all_rows():
    rng = np.random.default_rng(2)
    x = rng.standard_normal((50, 7)).astype(np.float32)
    whole = statistics.merged(
        statistics.of_rows(jnp.asarray(x[:30]), hessian=True),
        statistics.of_rows(jnp.asarray(x[30:]), hessian=True),
    )
    np.testing.assert_allclose(whole.hessian, x.astype(np.float64).T @ x, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(whole.absmax, np.abs(x).max(0))
    np.testing.assert_allclose(whole.mean_magnitude, np.abs(x).mean(0), rtol=1e-5)
    assert int(whole.rows) == 50
    scale = rng.uniform(0.5, 2, 7).astype(np.float32)
    divided = statistics.of_rows(jnp.asarray(x / scale), hessian=True)
    expected = jax.tree.leaves(whole.divided_by(jnp.asarray(scale)))
    for ours, theirs in zip(jax.tree.leaves(divided), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("k", [1, 3, 4, 5, 130])
def test_a_hessian_is_whole_whatever_its_size(k):
    x = np.random.default_rng(k).standard_normal((20, k)).astype(np.float32)
    found = statistics.of_rows(jnp.asarray(x), hessian=True).hessian
    np.testing.assert_allclose(found, x.astype(np.float64).T @ x, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(found, np.asarray(found).T, rtol=1e-5, atol=1e-5)


def test_layers_that_share_an_input_share_its_statistics(model):
    x = jnp.asarray(np.random.default_rng(3).standard_normal((2, 5, WIDTH)), jnp.float32)

    @jax.jit
    def observed(graphdef, state, x):
        block = nnx.merge(graphdef, state)
        return observation.observe(block, lambda: block(x), hessians=True)

    block = model.blocks[0]
    found = observed(*nnx.split(block), x)
    assert found.layers == (("gate", "up"), ("down",))
    assert "up" in found and "norm" not in found
    normed = np.asarray(block.norm(x), np.float64).reshape(-1, WIDTH)
    np.testing.assert_allclose(found["up"].hessian, normed.T @ normed, rtol=1e-4, atol=1e-3)
    inner = np.asarray(jax.nn.silu(block.gate(block.norm(x))) * block.up(block.norm(x)))
    np.testing.assert_allclose(found["down"].high, inner.reshape(-1, INNER).max(0), rtol=1e-5)


def test_other_layers_are_flattened_as_their_weights_are():
    rngs = nnx.Rngs(0)
    x = jnp.asarray(np.random.default_rng(4).standard_normal((3, 5, 2, 4)), jnp.float32)
    general = nnx.LinearGeneral((2, 4), (6,), axis=(-2, -1), rngs=rngs)
    einsum = nnx.Einsum("...nh,nhd->...d", (2, 4, 6), rngs=rngs)
    for layer in (general, einsum):
        rows = nnx_layers.rows_of(layer, x)
        kernel = np.asarray(layer.kernel.get_value()).reshape(8, 6)
        expected = layer(x) if layer.bias is None else layer(x) - layer.bias.get_value()
        np.testing.assert_allclose((rows @ kernel).reshape(3, 5, 6), expected, rtol=1e-5, atol=1e-5)
    batched = nnx.Einsum("bnh,nhd->bnd", (2, 4, 6), rngs=rngs)
    with pytest.raises(ValueError, match="a batch of them"):
        nnx_layers.rows_of(batched, x[0])


@pytest.mark.parametrize("where", FOLDS, ids=["norm", "up"])
def test_a_fold_changes_nothing_but_the_channels(model, where):
    block = nnx.clone(model.blocks[0])
    x = jnp.asarray(np.random.default_rng(5).standard_normal((2, 5, WIDTH)), jnp.float32)
    before = block(x)
    inputs = nnx_layers.weight_of(getattr(block, where.consumers[0])).shape[0]
    scale = jnp.asarray(np.random.default_rng(6).uniform(0.2, 5, inputs), jnp.float32)
    kernel = np.asarray(getattr(block, where.consumers[0]).kernel.get_value())
    folding.fold(block, where, scale)
    np.testing.assert_allclose(block(x), before, rtol=1e-4, atol=1e-5)
    moved = getattr(block, where.consumers[0]).kernel.get_value()
    np.testing.assert_allclose(moved, kernel * np.asarray(scale)[:, None], rtol=1e-6)


def test_norms_with_an_offset_fold_with_it():
    class Norm(nnx.Module):
        def __init__(self):
            self.weight = nnx.Param(jnp.array([0.5, -0.25]))

    class Pair(nnx.Module):
        def __init__(self):
            self.norm, self.up = Norm(), nnx.Linear(2, 3, use_bias=False, rngs=nnx.Rngs(0))

    pair = Pair()
    where = Fold(producer=Channels(path="norm"), consumers=("up",), offset=1.0)
    folding.fold(pair, where, jnp.array([3.0, 0.5]))
    np.testing.assert_allclose(1 + pair.norm.weight.get_value(), [0.5, 1.5], rtol=1e-6)


def test_heads_of_values_stand_once_for_each_query_head():
    where = Fold(
        producer=Channels(path="v"), consumers=("o",), head_size=2, queries_per_head=3
    )  # fmt: skip
    scale = jnp.arange(1.0, 5.0)
    assert folding.spread(where, scale).tolist() == [1, 2, 1, 2, 1, 2, 3, 4, 3, 4, 3, 4]
    np.testing.assert_array_equal(
        folding.gathered(where, folding.spread(where, scale)), np.tile([1, 2, 3, 4], (3, 1))
    )


# What no rotation passes through; those are for decoders.
@pytest.mark.parametrize(
    ("method", "scheme"),
    [("llm-int8", "w8a8")]
    + [
        (name, scheme)
        for name in names()
        if name != "llm-int8" and "rotation" not in name
        for scheme in ("w4a16-g8", "w8a8")
    ],
)
def test_every_method_and_a_bound_on_what_it_costs(model, tokens, method, scheme):
    quantized, report = qjax.quantize_sequentially(model, chain, tokens, scheme, method=method)
    chain_of_it = Method.parse(method, recipe=qjax.Recipe.uniform(scheme)).name
    assert [layer.method for layer in report.quantized] == [chain_of_it] * 9
    assert {layer.path for layer in report.unquantized} == {"embed", "lm_head"}
    assert all(q.scheme.name == scheme for q in quantized_layers(quantized).values())
    exact, near = np.asarray(model(tokens)), np.asarray(quantized(tokens))
    assert np.linalg.norm(near - exact) < 0.25 * np.linalg.norm(exact)
    assert not quantized_layers(model)


@pytest.mark.parametrize("method", ["gptq", "awq", "smoothquant", "gptq+learned"])
def test_layers_that_do_not_fill_one_block_of_a_scheme(model, tokens, method):
    quantized, _ = qjax.quantize_sequentially(model, chain, tokens, "fp8-block", method=method)
    exact, near = np.asarray(model(tokens)), np.asarray(quantized(tokens))
    assert np.linalg.norm(near - exact) < 0.15 * np.linalg.norm(exact)


@pytest.mark.parametrize("in_turn", [False, True])
@pytest.mark.parametrize("scheme", ["w4a16-g8", "w8a8", "w8a8-static"])
def test_programs_are_compiled_beside_each_other(model, tokens, scheme, in_turn):
    """What takes long, in threads; and the calls that follow find it."""
    here, compiled = threading.current_thread(), []

    def listener(event: str, seconds: float, fun_name: str = "", **_: object) -> None:
        del seconds
        if event.endswith("backend_compile_duration"):
            compiled.append((threading.current_thread() is here, fun_name))

    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        qjax.quantize_sequentially(
            model, chain, tokens, scheme, method="gptq", true_sequential=in_turn
        )
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    for name in ("_all_finite", "factor", "_quantize", "_compared", "_run"):
        programs = [mine for mine, program in compiled if program == f"jit({name})"]
        # What quantized activations make of the block is another program, which waits for its QTensors:
        # of the whole block, or of what comes after the first of its two inputs.
        later = (1 + in_turn) * (name == "_run" and scheme != "w4a16-g8")
        assert programs and sum(programs) == later, name


def test_each_block_sees_the_quantized_ones_before_it(model, tokens):
    """Done by hand, with the Hessians of what the quantized model itself makes of the tokens."""
    quantized, report = qjax.quantize_sequentially(
        model, chain, tokens, "w4a16-g8", method="gptq", batch_size=4
    )
    by_path = {layer.path: layer for layer in report.layers}
    x = np.asarray(model.embed(tokens))
    for i, block in enumerate(model.blocks):
        rows = np.asarray(block.norm(jnp.asarray(x))).reshape(-1, WIDTH)
        w = np.asarray(block.up.kernel.get_value())
        q = quantized_layers(quantized)[f"blocks/{i}/up"]
        wrong = rows @ (np.asarray(qtensor.dequantize(q)) - w)
        expected = np.linalg.norm(wrong) / np.linalg.norm(rows @ w)
        entry = by_path[f"blocks/{i}/up"]
        assert entry.relative_output_error == pytest.approx(expected, rel=1e-3)
        assert entry.calibration_rows == tokens.size and entry.damping == pytest.approx(0.01)
        x = np.asarray(quantized.blocks[i](jnp.asarray(x)))


@pytest.mark.parametrize("scheme", ["w4a16-g8", "w8a8-static"])
def test_true_sequential_sees_the_quantized_layers_of_a_block_too(model, tokens, scheme):
    """Done by hand: a block's second input is that which its quantized first layers make."""
    quantized, report = qjax.quantize_sequentially(
        model, chain, tokens, scheme, method="gptq", batch_size=4, true_sequential=True
    )
    by_path = {layer.path: layer for layer in report.layers}
    held = quantized_layers(quantized)
    x = model.embed(tokens)
    for i, (before, after) in enumerate(zip(model.blocks, quantized.blocks, strict=True)):
        normed = before.norm(x)
        inner = jax.nn.silu(after.gate(normed)) * after.up(normed)
        for name, rows in (("gate", normed), ("up", normed), ("down", inner)):
            rows, w = rows.reshape(TOKENS[0] * TOKENS[1], -1), getattr(before, name).kernel[...]
            hessian = jnp.matmul(rows.T, rows, precision="highest")
            how = Method.parse("gptq")
            factor = gptq.factor(
                hessian, how.rounding, held[f"blocks/{i}/{name}"].scheme.weights.group_size
            )
            expected = gptq.quantize(w, scheme, factor, options=how.rounding, search=how.search)
            codes = (
                np.asarray(qtensor.unpacked(q)) for q in (held[f"blocks/{i}/{name}"], expected)
            )
            assert np.mean(np.equal(*codes)) > 0.99  # but for sums of another order
            wrong = rows @ (qtensor.dequantize(held[f"blocks/{i}/{name}"]) - w)
            error = float(jnp.linalg.norm(wrong) / jnp.linalg.norm(rows @ w))
            assert by_path[f"blocks/{i}/{name}"].relative_output_error == pytest.approx(
                error, rel=1e-3
            )
        x = after(x)


@pytest.mark.parametrize("method", ["awq+gptq", "smoothquant", "gptq+learned"])
def test_true_sequential_goes_with_every_link(model, tokens, method):
    first, second = (
        qjax.quantize_sequentially(
            model, chain, tokens, "w4a16-g8", method=method, true_sequential=in_turn
        )
        for in_turn in (False, True)
    )
    exact = np.asarray(model(tokens))
    for quantized, report in (first, second):
        assert [layer.path for layer in report.layers] == [layer.path for layer in first[1].layers]
        assert np.linalg.norm(quantized(tokens) - exact) < 0.25 * np.linalg.norm(exact)
    same = [
        (np.asarray(a.codes) == np.asarray(b.codes)).all()
        for a, b in zip(*(quantized_layers(q).values() for q, _ in (first, second)), strict=True)
    ]
    # Rounding to nearest within given ranges does not ask what else is quantized.
    assert all(same) == (method == "smoothquant")


@pytest.mark.parametrize("start", ["rtn", "awq+gptq"])
def test_blocks_learn_from_quantized_inputs_to_give_what_the_original_ones_did(
    model, tokens, start, monkeypatch
):
    """Also where factors are folded into them, and their norms are not the original ones any more."""
    seen = []

    def recorded(block, weights, inputs, targets, **options):
        result = reconstruct(block, weights, inputs, targets, **options)
        # The block itself is run on with the new weights afterwards.
        as_it_was = dataclasses.replace(block, module=nnx.clone(block.module))
        seen.append((as_it_was, weights, inputs, targets, result))
        return result

    reconstruct = reconstruction.reconstruct
    monkeypatch.setattr(reconstruction, "reconstruct", recorded)
    method = dataclasses.replace(
        Method.parse(start), learned=learned_rounding.Options(steps=10, batch=1)
    )
    quantized, report = qjax.quantize_sequentially(
        model, chain, tokens, "w3a16-g8", method=method, batch_size=4
    )
    x, y = model.embed(tokens), model.embed(tokens)
    by_path = {layer.path: layer for layer in report.layers}
    for i, (block, weights, inputs, targets, result) in enumerate(seen):
        y = model.blocks[i](y)
        np.testing.assert_allclose(np.concatenate(inputs), x, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(np.concatenate(targets), y, rtol=1e-3, atol=1e-3)
        assert weights.keys() == {"gate", "up", "down"}
        for path, q in result.weights.items():
            installed = quantized_layers(quantized)[f"blocks/{i}/{path}"]
            for one, other in zip(jax.tree.leaves(installed), jax.tree.leaves(q), strict=True):
                np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
            w = np.asarray(getattr(block.module, path).kernel.get_value())
            wrong = np.asarray(qtensor.dequantize(q)) - w
            rows = np.eye(len(w)) if start == "rtn" else np.asarray(block.module.norm(x))
            if path != "down":
                expected = np.linalg.norm(rows @ wrong) / np.linalg.norm(rows @ w)
                error = by_path[f"blocks/{i}/{path}"].relative_output_error
                assert error == pytest.approx(expected, rel=1e-3)
        x = quantized.blocks[i](x)
    assert len(seen) == 3 and any(result.after < result.before for *_, result in seen)
    assert {layer.method for layer in report.quantized} == {method.name}


def test_layers_that_share_a_weight_still_do_after_learning(tokens):
    class Tied(MLP):
        def __init__(self, rngs: nnx.Rngs):
            super().__init__(rngs)
            self.gate.kernel = self.up.kernel

    tied = Model(nnx.Rngs(1))
    tied.blocks = nnx.List([Tied(nnx.Rngs(i)) for i in range(2)])
    method = dataclasses.replace(
        Method.parse("learned"), learned=learned_rounding.Options(steps=10, batch=1)
    )
    quantized, _ = qjax.quantize_sequentially(tied, chain, tokens, "w3a16-g8", method=method)
    for block in quantized.blocks:
        assert block.gate.kernel is block.up.kernel


@pytest.mark.parametrize(
    "method", ["gptq", "awq", Method(learned=learned_rounding.Options(steps=5, batch=1))], ids=str
)
@pytest.mark.parametrize("scheme", ["w4a16-g8", "w8a8"])
def test_activations_in_a_file_change_no_bit(model, tokens, tmp_path, method, scheme):
    results = [
        qjax.quantize_sequentially(
            model, chain, tokens, scheme, method=method, batch_size=4, spill=spill
        )[0]
        for spill in (None, tmp_path)
    ]
    for a, b in zip(*map(jax.tree.leaves, map(nnx.state, results)), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sizes", [(4, 2), (8, 8, 8, 1), (3,), (1, 1)])
@pytest.mark.parametrize("most", [1, 20, 64, 10_000])
def test_samples_are_windows_at_even_distances(sizes, most):
    hidden = [jnp.arange(n * 10.0).reshape(n, 5, 2) + 1000 * i for i, n in enumerate(sizes)]
    windows = np.concatenate(hidden)
    count = max(1, most // 5)
    expected = windows[:: max(1, len(windows) // count)][:count]
    np.testing.assert_array_equal(block_quantization._samples(hidden, most), expected)


def test_batches_and_devices_do_not_show(model, tokens):
    whole, _ = qjax.quantize_sequentially(model, chain, tokens, "w4a16-g8", method="gptq")
    cut, _ = qjax.quantize_sequentially(
        model, chain, tokens, "w4a16-g8", method="gptq", batch_size=4
    )
    same = [
        np.mean(np.asarray(qtensor.unpacked(a)) == np.asarray(qtensor.unpacked(b)))
        for a, b in zip(*(quantized_layers(m).values() for m in (whole, cut)), strict=True)
    ]
    assert min(same) > 0.98  # sums of another order may fall to the other side of a tie


def test_layers_outside_the_blocks_are_rounded_to_nearest(model, tokens):
    recipe = qjax.Recipe.from_json([["lm_head", "w8a16-channel"], [".*", "w4a16-g8"]])
    quantized, report = qjax.quantize_sequentially(model, chain, tokens, recipe, method="gptq")
    (head,) = (layer for layer in report.layers if layer.path == "lm_head")
    assert head.method == "rtn" and head.scheme == "w8a16-channel"
    assert "lm_head" in quantized_layers(quantized)


def test_too_few_tokens_are_refused_before_any_rounding(model, tokens):
    with pytest.raises(ValueError, match="blocks/0/down: 20 calibration tokens for 24 inputs"):
        qjax.quantize_sequentially(model, chain, tokens[:1, :20], "w4a16-g8", method="gptq")


def test_one_window_is_not_enough_to_learn_from(model, tokens):
    with pytest.raises(ValueError, match="gptq.learned holds .* needs 2 or more, got 1"):
        qjax.quantize_sequentially(model, chain, tokens[:1], "w4a16-g8", method="gptq+learned")


def test_activations_that_are_not_finite_are_named(model, tokens):
    damaged = nnx.clone(model)
    kernel = damaged.blocks[1].up.kernel.get_value()
    damaged.blocks[1].up.kernel.set_value(kernel.at[0, 0].set(1e38))
    with pytest.raises(ValueError, match="blocks/1/down: its inputs are not finite"):
        qjax.quantize_sequentially(damaged, chain, tokens, "w4a16-g8", method="awq")


def test_the_whole_model_at_once_takes_what_it_was_shown(model, tokens):
    with pytest.raises(ValueError, match="gptq needs what the layers multiply"):
        qjax.quantize_model(model, "w4a16-g8", method="gptq")
    for method in ("awq", "learned"):
        with pytest.raises(ValueError, match=f"{method} .*sequentially takes it block by block"):
            qjax.quantize_model(model, "w4a16-g8", qjax.calibrate(model, [tokens]), method=method)
    observed = qjax.calibrate(model, [tokens[:2], tokens[2:]])
    quantized, report = qjax.quantize_model(model, "w4a16-g8", observed, method="gptq")
    assert {layer.method for layer in report.quantized} == {"gptq"}
    first = {layer.path: layer.relative_output_error for layer in report.quantized}
    by_block, expected = qjax.quantize_sequentially(model, chain, tokens, "w4a16-g8", method="gptq")
    theirs = {layer.path: layer.relative_output_error for layer in expected.quantized}
    assert first["blocks/0/up"] == pytest.approx(theirs["blocks/0/up"], rel=1e-3)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "gptqq",
        "gptq+awq",
        "awq+awq",
        "awq+",
        "rtn+gptq",
        "learned+gptq",
        "rtn+learned",
        "awq+rotation",
        "rotation+rotation",
        "rotation+rtn",
    ],
)
def test_unknown_methods_are_named(name):
    with pytest.raises(ValueError, match="unknown method"):
        Method.parse(name)


def test_the_best_method_depends_on_the_schemes():
    rules = [["0/.*", "w4a16-g8"], ["1/.*", None], [".*", "w8a8"]]
    chains = [
        Method.parse("best", recipe=qjax.Recipe.from_json(rules[:count])).name for count in (2, 3)
    ]
    assert chains == ["outlier-suppression+gptq+learned", "smoothquant+gptq+learned"]
    for scheme, turned in (("w4a4", True), ("w4a4-g8-static", True), ("w4a8", False)):
        rotated = Method.parse("best", recipe=qjax.Recipe.uniform(scheme), may_rotate=True)
        assert (rotated.rotated is not None) == turned and rotated.learned is not None
    assert Method.parse("best", recipe=qjax.Recipe.uniform("w4a4")).rotated is None
    searched = Method.parse("best", qjax.RangeSearch(method="mse"), qjax.Recipe.uniform("w4a16"))
    assert searched.search.method == "mse"
    with pytest.raises(ValueError, match="depends on the schemes: give the recipe"):
        Method.parse("best")


def test_methods_read_their_own_names():
    chains = set(names()) - {"best"}
    for name in chains:
        assert Method.parse(name).name == name
    assert len(chains) == 33 and {"learned", "rotation+smoothquant+gptq+learned"} < chains
    assert dataclasses.replace(Method.parse("gptq"), rounding=None).name == "rtn"


def test_a_rotation_needs_blocks_and_a_stream(model, tokens):
    method = Method.parse("rotation")
    assert not method.calibrated and method.by_block
    with pytest.raises(ValueError, match="rotation changes what feeds a layer"):
        qjax.quantize_model(model, "w8a16-g8", method=method)
    with pytest.raises(ValueError, match="rotation: none passes through the residual stream"):
        qjax.quantize_sequentially(model, chain, tokens, "w8a16-g8", method=method)


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    return jax.sharding.Mesh(jax.devices()[:2], ("data",))


def replicated(model: Model, mesh: jax.sharding.Mesh) -> Model:
    graphdef, state = nnx.split(model)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return nnx.merge(graphdef, jax.device_put(state, everywhere))


@pytest.mark.parametrize("method", ["gptq", "awq+gptq", "learned"])
def test_windows_are_spread_over_the_mesh_of_the_model(model, tokens, mesh, method):
    spread = []

    def watched(model: Model, length: int) -> Blockwise:
        def enter(batch):
            spread.append(batch.sharding.is_fully_replicated)
            return model.embed(batch)

        return dataclasses.replace(chain(model, length), enter=enter)

    options = {"method": method, "batch_size": 4}
    alone, _ = qjax.quantize_sequentially(model, chain, tokens[:5], "w4a16-g8", **options)
    apart, _ = qjax.quantize_sequentially(
        replicated(model, mesh), watched, tokens[:5], "w4a16-g8", **options
    )
    # Four windows go to two devices, the one that is left to both.
    assert spread == [False, True] * (2 if method == "learned" else 1)
    ours, theirs = (dict(quantized_layers(m)) for m in (apart, alone))
    assert all(len(q.codes.devices()) == 2 for q in ours.values())
    exact, *near = (np.asarray(m(tokens)) for m in (model, apart, alone))
    errors = [np.linalg.norm(y - exact) for y in near]
    assert errors[0] == pytest.approx(errors[1], rel=0.2)
    if (
        "awq" in method
    ):  # two of its factors may be as good as each other, and sums of another order choose
        return
    for path, q in theirs.items():
        same = np.asarray(ours[path].codes) == np.asarray(q.codes)
        assert same.mean() > 0.98, path  # likewise of a tie in rounding


def test_calibration_takes_sharded_batches_as_they_lie(model, tokens, mesh):
    over = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    alone = qjax.calibrate(model, [jnp.asarray(tokens[:4]), jnp.asarray(tokens[4:])])
    parts = [jax.device_put(part, over) for part in (tokens[:4], tokens[4:])]
    spread = qjax.calibrate(replicated(model, mesh), parts)
    for path in ("blocks/0/gate", "blocks/2/down", "lm_head"):
        assert int(spread[path].rows) == tokens.size
        for a, b in zip(jax.tree.leaves(spread[path]), jax.tree.leaves(alone[path]), strict=True):
            # Sums of another order, of terms as large as the largest.
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * float(jnp.abs(b).max()))
