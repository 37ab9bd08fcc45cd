# SPDX-License-Identifier: Apache-2.0
"""Quantizing a model: which layers, how, and what is said about it."""

import json

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.nnx_layers import quantized_layers


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(16, 24, rngs=rngs)
        self.down = nnx.Linear(24, 16, rngs=rngs)


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed_tokens = nnx.Embed(12, 16, rngs=rngs)
        self.layers = nnx.List([Block(rngs), Block(rngs)])
        self.norm = nnx.RMSNorm(16, rngs=rngs)
        self.lm_head = nnx.Linear(16, 12, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed_tokens(tokens)
        for block in self.layers:
            x = x + block.down(jax.nn.silu(block.up(x)))
        return self.lm_head(self.norm(x))


INNER = ["layers/0/up", "layers/0/down", "layers/1/up", "layers/1/down"]


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(nnx.Rngs(0))


def rules(*lines: tuple[str, str | None]) -> qjax.Recipe:
    return qjax.Recipe(
        rules=tuple(
            qjax.Rule(pattern=p, scheme=qjax.Scheme.parse(s) if s else None) for p, s in lines
        )
    )


def test_one_scheme_for_all_but_embedding_and_head(model):
    quantized, report = qjax.quantize_model(model, "w4a16-g8")
    assert sorted(quantized_layers(quantized)) == sorted(INNER)
    assert {layer.path for layer in report.quantized} == set(INNER)
    assert {layer.path for layer in report.unquantized} == {"embed_tokens", "lm_head"}
    assert all(layer.reason == "no rule names it" for layer in report.unquantized)
    assert report.unmatched_rules == ()
    assert any("lm_head" in line for line in report.warnings())


def test_the_numbers_of_the_report(model):
    quantized, report = qjax.quantize_model(model, "w4a16-g8-asym")
    for layer in report.quantized:
        _, block, name = layer.path.split("/")
        w = np.asarray(getattr(model.layers[int(block)], name).kernel[...], np.float64)
        q = quantized_layers(quantized)[layer.path]
        near = np.asarray(qjax.dequantize(q), np.float64)
        np.testing.assert_allclose(
            layer.relative_output_error, np.linalg.norm(near - w) / np.linalg.norm(w), rtol=1e-4
        )
        assert (layer.bytes_before, layer.bytes_after) == (w.size * 4, q.nbytes)
        assert (layer.scheme, layer.method, layer.shape) == ("w4a16-g8-asym", "rtn", w.shape)
        assert layer.seconds > 0
    totals = json.loads(report.dumps())["totals"]
    assert totals["quantized"] == 4 and totals["layers"] == 6
    assert totals["bytes_after"] == sum(layer.bytes_after for layer in report.layers)


def test_the_error_is_the_expected_output_error(model):
    """|x w - x w'| / |x w| over white inputs."""
    quantized, report = qjax.quantize_model(model, "w4a16-g8")
    x = np.random.default_rng(0).standard_normal((20000, 16))
    w = np.asarray(model.layers[0].up.kernel[...], np.float64)
    near = np.asarray(qjax.dequantize(quantized_layers(quantized)["layers/0/up"]), np.float64)
    measured = np.linalg.norm(x @ (near - w)) / np.linalg.norm(x @ w)
    assert report.layers[
        [r.path for r in report.layers].index("layers/0/up")
    ].relative_output_error == pytest.approx(measured, rel=0.02)


def test_the_original_is_untouched(model):
    before = jax.tree.map(np.array, nnx.state(model))
    graphdef = nnx.graphdef(model)
    quantized, _ = qjax.quantize_model(model, "w8a8")
    assert not quantized_layers(model) and quantized_layers(quantized)
    assert nnx.graphdef(model) == graphdef
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)
    assert all(layer.kernel.__class__ is nnx.Param for layer in (model.layers[0].up, model.lm_head))


def test_the_search_reaches_the_layers(model):
    search = qjax.RangeSearch(method="mse", steps=10)
    searched, plain = (
        qjax.quantize_model(model, "w2a16-g8", search=s)[1] for s in (search, qjax.RangeSearch())
    )
    total = [
        sum(layer.relative_output_error for layer in report.quantized)
        for report in (searched, plain)
    ]
    assert total[0] < total[1]


def test_rules_decide_layer_by_layer(model):
    recipe = rules(
        ("layers/0/.*", None),
        (".*down", "w8a16-g8"),
        ("nothing/.*", "w8a8"),
        (".*", "w4a16-g8"),
        ("lm_head", "fp8"),
    )
    quantized, report = qjax.quantize_model(model, recipe)
    held = {path: q.scheme.name for path, q in quantized_layers(quantized).items()}
    assert held == {
        "layers/1/down": "w8a16-g8",
        "layers/1/up": "w4a16-g8",
        "lm_head": "fp8-dynamic",
    }
    reasons = {layer.path: layer.reason for layer in report.unquantized}
    assert set(reasons) == {"layers/0/up", "layers/0/down", "embed_tokens"}
    assert "layers/0/.*" in reasons["layers/0/up"] and reasons["embed_tokens"] == "no rule names it"
    assert report.unmatched_rules == ("nothing/.*",)
    assert "rule 'nothing/.*' decided for no layer" in report.warnings()


def test_embedding_and_head_when_named(model):
    quantized, _ = qjax.quantize_model(model, rules(("(embed_tokens|lm_head)", "w8a16-g8")))
    assert sorted(quantized_layers(quantized)) == ["embed_tokens", "lm_head"]
    tokens = jnp.array([[1, 2, 3]])
    np.testing.assert_allclose(quantized(tokens), model(tokens), atol=0.1)


def test_progress_is_told(model):
    told = []
    qjax.quantize_model(model, "w4a16-g8", on_layer=told.append)
    assert sorted(told) == sorted(INNER)


def test_a_layer_alone_is_a_model():
    layer = nnx.Linear(16, 8, rngs=nnx.Rngs(0))
    quantized, report = qjax.quantize_model(layer, "w8a16-channel")
    assert [layer.path for layer in report.quantized] == ["Linear"]
    np.testing.assert_allclose(quantized(jnp.ones((1, 16))), layer(jnp.ones((1, 16))), atol=0.02)
    refused(layer, "w4a16-g12", "^Linear: group size 12 does not divide 16")


def test_a_shared_layer_is_quantized_once():
    class Twice(nnx.Module):
        def __init__(self):
            self.first = nnx.Linear(16, 16, rngs=nnx.Rngs(0))
            self.second = self.first

    quantized, report = qjax.quantize_model(Twice(), "w8a16-channel")
    assert len(report.quantized) == 1 and quantized.first is quantized.second


class Tied(nnx.Module):
    """Two layers around one weight variable."""

    def __init__(self):
        self.first = nnx.Linear(16, 16, rngs=nnx.Rngs(0))
        self.second = nnx.Linear(16, 16, rngs=nnx.Rngs(1))
        self.second.kernel = self.first.kernel

    def __call__(self, x):
        return self.second(self.first(x))


def test_a_shared_weight_stays_shared():
    model = Tied()
    quantized, report = qjax.quantize_model(model, "w8a16-channel")
    assert quantized.first.kernel is quantized.second.kernel
    assert [layer.reason for layer in report.layers] == ["", "shares the weight of first"]
    assert report.as_json()["totals"]["bytes_before"] == 16 * 16 * 4
    np.testing.assert_allclose(
        quantized(jnp.ones((1, 16))), model(jnp.ones((1, 16))), atol=0.02, rtol=0.02
    )
    reloaded = nnx.merge(*nnx.split(quantized))
    assert reloaded.first.kernel is reloaded.second.kernel


def test_a_shared_weight_is_held_in_one_way():
    refused(
        Tied(),
        rules(("first", "w8a16-channel"), ("second", "w4a16-g8")),
        "^second: is to be w4a16-g8, but it shares its weight with first, .* w8a16-channel",
    )
    refused(Tied(), rules(("second", "w4a16-g8")), "shares its weight with first, .* plain")


def refused(model, recipe, message, **choices) -> str:
    with pytest.raises(ValueError, match=message) as caught:
        qjax.quantize_model(model, recipe, **choices)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_quantizing_twice_is_refused(model):
    quantized, _ = qjax.quantize_model(model, rules((".*/up", "w8a8")))
    refused(quantized, "w8a8", "^layers/0/up: already quantized to int8")
    # The rest of it may still be quantized.
    more, _ = qjax.quantize_model(quantized, rules((".*/down", "w4a16-g8")))
    assert sorted(quantized_layers(more)) == sorted(INNER)


@pytest.mark.parametrize("name", ["w4a16-g8", "w8a8", "fp8", "nf4-g8"])
def test_nan_is_refused_with_the_path(model, name):
    damaged = nnx.clone(model)
    damaged.layers[1].down.kernel[...] = damaged.layers[1].down.kernel[...].at[3, 3].set(jnp.nan)
    refused(damaged, name, "^layers/1/down: NaN among the weights")


def test_a_group_that_does_not_divide_names_the_layer(model):
    refused(
        model, "w4a16-g16", "^layers/0/down: group size 16 does not divide 24, .*12 or 24 would"
    )


def test_a_recipe_that_reaches_nothing_is_refused(model):
    message = refused(
        model,
        rules(("mlp/.*", "w8a8"), (".*", None)),
        r"^no rule \('mlp/\.\*', '\.\*'\) quantizes a layer",
    )
    assert "layers/0" in message or "embed_tokens" in message


def test_a_model_without_layers_is_refused():
    refused(
        nnx.Sequential(nnx.RMSNorm(4, rngs=nnx.Rngs(0))), "w8a8", "^the model has no nnx.Linear, "
    )


def test_infinite_weights_saturate_and_the_report_stays_json(model):
    damaged = nnx.clone(model)
    damaged.layers[1].down.kernel[...] = damaged.layers[1].down.kernel[...].at[3, 3].set(jnp.inf)
    quantized, report = qjax.quantize_model(damaged, "w8a16-g8")
    assert np.isfinite(qjax.dequantize(quantized_layers(quantized)["layers/1/down"])).all()
    assert {layer.path: layer.saturated for layer in report.layers if layer.saturated} == {
        "layers/1/down": 1
    }
    assert any("layers/1/down: infinite weights saturated" in line for line in report.warnings())
    json.loads(report.dumps(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def test_training_the_result_leaves_the_original_alone():
    model = nnx.Sequential(
        nnx.Linear(16, 16, rngs=nnx.Rngs(0)), nnx.Conv(16, 16, (3,), rngs=nnx.Rngs(1))
    )
    before = [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model))]
    quantized, _ = qjax.quantize_model(model, "w8a16-channel")
    for variable in jax.tree.leaves(
        nnx.state(quantized, nnx.Param), is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    ):
        variable.set_value(variable.get_value() + 1)
    nnx.update(quantized, jax.tree.map(lambda leaf: leaf + 1, nnx.state(quantized, nnx.Param)))
    after = [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model))]
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)


def test_embeddings_are_left_alone_whatever_they_are_called():
    class Reader(nnx.Module):
        def __init__(self, rngs):
            self.words = nnx.Embed(8, 16, rngs=rngs)
            self.out = nnx.Linear(16, 16, rngs=rngs)

    _, report = qjax.quantize_model(Reader(nnx.Rngs(0)), "w8a16-channel")
    assert [layer.path for layer in report.unquantized] == ["words"]
