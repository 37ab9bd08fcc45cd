# SPDX-License-Identifier: Apache-2.0
"""Which layers go together, what they take, and what each alone costs, against the plain way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax import evaluation, sensitivity
from qjax.scheme import Scheme

VOCABULARY, WIDTH = 12, 16
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (3, 8)).astype(np.int32)
FEW, MANY = (Scheme.parse(name) for name in ("w3a16-g8", "w8a16-g8"))


class Model(nnx.Module):
    """Two layers of one input, one alone, two of one weight, one that is run twice, one never."""

    def __init__(self, rngs: nnx.Rngs, param_dtype=jnp.float32):
        def linear(outputs: int = WIDTH) -> nnx.Linear:
            return nnx.Linear(WIDTH, outputs, param_dtype=param_dtype, dtype=jnp.float32, rngs=rngs)

        self.embed_tokens = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.gate, self.up, self.down = linear(24), linear(24), nnx.Linear(24, WIDTH, rngs=rngs)
        self.first, self.twice, self.second, self.unused = (linear() for _ in range(4))
        self.second.kernel = self.first.kernel
        self.lm_head = linear(VOCABULARY)

    def __call__(self, tokens):
        x = self.embed_tokens(tokens)
        x = x + self.down(jax.nn.silu(self.gate(x)) * self.up(x))
        x = x + self.second(jax.nn.silu(self.twice(self.twice(self.first(x)))))
        return self.lm_head(x)


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(nnx.Rngs(0))


GROUPS = [("gate", "up"), ("down",), ("first", "second"), ("twice",), ("unused",)]


def test_layers_that_share_an_input_or_a_weight_go_together(model):
    groups = sensitivity.layer_groups(model, TOKENS, [FEW, MANY])
    assert [group.layers for group in groups] == GROUPS
    assert [group.weights for group in groups] == [2 * 16 * 24, 24 * 16, 256, 256, 256]


def test_layers_of_one_weight_bring_their_groups_together():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b, self.c, self.d = (nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(4))
            self.embed, self.c.kernel = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs), self.b.kernel

        def __call__(self, tokens):
            x = self.embed(tokens)
            y = self.a(x) * self.b(x)
            return self.c(y) + self.d(y)

    (group,) = sensitivity.layer_groups(Tied(nnx.Rngs(0)), TOKENS, [MANY])
    assert set(group.layers) == {"a", "b", "c", "d"} and group.weights == 3 * WIDTH**2


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_bytes_are_those_of_the_quantized_model(dtype):
    model = Model(nnx.Rngs(0), dtype)
    groups = sensitivity.layer_groups(model, TOKENS, [FEW, MANY])
    for scheme in (FEW, MANY):
        recipe = qjax.Recipe(rules=tuple(group.rule(scheme) for group in groups))
        _, report = qjax.quantize_model(model, recipe)
        assert len(report.quantized) == sum(len(group.layers) for group in groups) == 7
        for group in groups:
            layers = [layer for layer in report.quantized if layer.path in group.layers]
            assert group.nbytes[scheme] == sum(layer.bytes_after for layer in layers)
            assert group.nbytes[None] == sum(layer.bytes_before for layer in layers)


def test_shapes_are_enough():
    abstract = nnx.eval_shape(lambda: Model(nnx.Rngs(0)))
    assert [g.layers for g in sensitivity.layer_groups(abstract, TOKENS, [MANY])] == GROUPS


def test_a_scheme_that_does_not_divide_is_no_choice(model):
    wide = Scheme.parse("w4a16-g16")  # of the 24 inputs of down no whole number
    held = {g.layers: set(g.nbytes) for g in sensitivity.layer_groups(model, TOKENS, [wide, MANY])}
    assert held.pop(("down",)) == {MANY, None}
    assert set(map(frozenset, held.values())) == {frozenset({wide, MANY, None})}
    with pytest.raises(ValueError, match="no layer can be held .* group size 7 does not divide 16"):
        sensitivity.layer_groups(model, TOKENS, [Scheme.parse("w4a16-g7")])


def test_what_is_refused(model):
    with pytest.raises(NotImplementedError, match="^w4a8: a budget chooses .* weights alone"):
        sensitivity.layer_groups(model, TOKENS, [MANY, Scheme.parse("w4a8")])
    quantized, _ = qjax.quantize_model(model, "w8a16-g8")
    with pytest.raises(ValueError, match="^down: already quantized"):
        sensitivity.layer_groups(quantized, TOKENS, [MANY])


def test_each_is_the_divergence_of_a_model_with_only_that():
    """In one compiled program for all, against a model that holds QTensors."""

    class Once(Model):  # which calibration can watch
        def __call__(self, tokens):
            x = self.embed_tokens(tokens)
            x = x + self.down(jax.nn.silu(self.gate(x)) * self.up(x))
            return self.lm_head(x + self.second(jax.nn.silu(self.first(x))))

    model = Once(nnx.Rngs(0))
    before = jax.tree.map(np.array, nnx.state(model))
    observed = qjax.calibrate(model, [jnp.asarray(TOKENS)])
    groups = sensitivity.layer_groups(model, TOKENS, [FEW, MANY])
    baseline = evaluation.logits_of(model, TOKENS)
    programs, told = evaluation._module_logits._cache_size(), []
    losses = sensitivity.measure(
        model, TOKENS, baseline, groups, method="gptq", observed=observed, on_step=told.append
    )
    assert evaluation._module_logits._cache_size() == programs + 1
    assert len(told) == sensitivity.steps(groups) == 10
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)
    for group, kl in zip(groups[:1], losses, strict=False):
        assert list(kl) == [FEW, MANY, None] and kl[None] == 0
        for scheme in (FEW, MANY):
            recipe = qjax.Recipe(rules=(group.rule(scheme),))
            held, _ = qjax.quantize_model(model, recipe, observed, method="gptq")
            expected = qjax.evaluate(held, TOKENS, baseline=baseline).kl
            assert kl[scheme] == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert kl[FEW] > 10 * kl[MANY] >= 0


def test_rules_name_their_layers_alone():
    group = sensitivity.LayerGroup(layers=("a.b/q", "a.b/k"), weights=0, nbytes={})
    rule = group.rule(None)
    assert [rule.matches(path) for path in ("a.b/q", "a.b/k", "acb/q", "a.b/qk")] == [
        True, True, False, False,
    ]  # fmt: skip
    for layers in (("a/q", "b/k"), ("q", "k"), ("a/q",)):
        rule = sensitivity.LayerGroup(layers=layers, weights=0, nbytes={}).rule(None)
        assert all(map(rule.names, layers)) and not rule.matches("a/v")
