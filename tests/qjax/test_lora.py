# SPDX-License-Identifier: Apache-2.0
"""Adapters in a model: where they go, what trains, what merging and quantizing again give."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import qjax
from qjax import low_rank, nnx_layers
from qjax.lora import adapters, add_lora, merge_lora, requantize_lora
from qjax.nnx_layers import quantized_layers

EPSILON = float(jnp.finfo(jnp.float32).eps)


class Model(nnx.Module):
    def __init__(self, rngs=None, dtype=jnp.float32):
        rngs = nnx.Rngs(0) if rngs is None else rngs
        self.embed = nnx.Embed(20, 32, rngs=rngs, param_dtype=dtype)
        self.in_proj = nnx.Linear(32, 64, rngs=rngs, param_dtype=dtype)
        self.out_proj = nnx.Einsum("bk,kn->bn", (64, 32), (32,), rngs=rngs, param_dtype=dtype)
        self.gate = nnx_layers.Router(32, 4, rngs=rngs, param_dtype=dtype)
        self.lm_head = nnx.Linear(32, 20, use_bias=False, rngs=rngs, param_dtype=dtype)

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = x + self.out_proj(jax.nn.silu(self.in_proj(x)))
        return self.lm_head(x * self.gate(x).sum(-1, keepdims=True))


TOKENS = jnp.arange(20)


def with_random_b(model):
    """The same with corrections that are not zero."""
    for number, adapter in enumerate(adapters(model).values()):
        shape = adapter.lora_b.get_value().shape
        adapter.lora_b.set_value(0.1 * jax.random.normal(jax.random.key(number), shape))
    return model


@pytest.mark.parametrize("scheme", ["nf4-g16", "w8a8", None])
def test_an_adapted_model_begins_as_the_model_that_it_was(scheme):
    base = Model()
    if scheme:
        base, _ = qjax.quantize_model(base, scheme)
    model = add_lora(base, rank=4)
    assert list(adapters(model)) == ["in_proj", "out_proj"] and not adapters(base)
    np.testing.assert_array_equal(
        nnx.jit(Model.__call__)(model, TOKENS), nnx.jit(Model.__call__)(base, TOKENS)
    )


def test_layers_stay_at_their_paths_and_are_frozen():
    base, _ = qjax.quantize_model(Model(), "nf4-g16")
    paths = set(nnx_layers.named_variables(base))
    model = add_lora(base, rank=4, alpha=8.0, dtype=jnp.bfloat16)
    new = set(nnx_layers.named_variables(model)) - paths
    assert paths < set(nnx_layers.named_variables(model))
    assert new == {
        f"{layer}/{hook}/lora_{factor}"
        for layer, hook in (("in_proj", "dot_general"), ("out_proj", "einsum_op"))
        for factor in "ab"
    }
    factors = jax.tree.leaves(nnx.state(model, nnx.LoRAParam))
    assert {(f.shape, str(f.dtype)) for f in factors} == {
        ((32, 4), "bfloat16"), ((4, 64), "bfloat16"), ((64, 4), "bfloat16"), ((4, 32), "bfloat16"),
    }  # fmt: skip
    assert adapters(model)["in_proj"].scaling == 2.0
    plain = add_lora(Model(), rank=4)
    assert (
        type(plain.in_proj.kernel) is qjax.QuantizedParam and type(plain.gate.kernel) is nnx.Param
    )


def test_patterns_choose_layers():
    base = Model()
    assert list(adapters(add_lora(base, 2, layers=".*"))) == ["in_proj", "out_proj"]
    named = add_lora(base, 2, layers=["in_.*", "lm_head", "gate"])
    assert list(adapters(named)) == ["gate", "in_proj", "lm_head"]
    both = add_lora(add_lora(base, 2, layers="in_proj"), 3, layers="out_proj")
    assert [adapter.rank for adapter in adapters(both).values()] == [2, 3]


def test_seeds_decide_the_factors():
    def first(seed):
        return np.asarray(adapters(add_lora(Model(), 2, seed=seed))["in_proj"].lora_a[...])

    np.testing.assert_array_equal(first(0), first(0))
    assert (first(0) != first(1)).mean() > 0.9
    model = add_lora(
        nnx.Sequential(*(nnx.Linear(8, 8, rngs=nnx.Rngs(0)) for _ in range(2))), 2, layers=".*"
    )
    a, b = (np.asarray(adapter.lora_a[...]) for adapter in adapters(model).values())
    assert (a != b).mean() > 0.9


def test_a_plain_train_step_trains_the_factors_alone():
    """Flax's and optax's own means; the same as LoRA by hand, on the weights that the codes stand for."""
    base, _ = qjax.quantize_model(
        nnx.Sequential(*(nnx.Linear(32, 32, rngs=nnx.Rngs(i)) for i in range(2))), "nf4-g16"
    )
    model = add_lora(base, rank=4, alpha=8.0, layers=".*")
    before = jax.tree.map(np.asarray, nnx.state(model, nnx.Not(nnx.LoRAParam)))
    rng = np.random.default_rng(0)
    x, target = (jnp.asarray(rng.standard_normal((16, 32)), jnp.float32) for _ in range(2))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.LoRAParam)

    def loss(model):
        return jnp.mean((model(x) - target) ** 2)

    @nnx.jit
    def step(model, optimizer):
        value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, gradients)
        return value

    kernels = [qjax.dequantize(layer.kernel[...]) for layer in model.layers]
    params = [tuple(adapter.factors) for adapter in adapters(model).values()]

    def by_hand(params):
        y = x
        for (a, b), w, layer in zip(params, kernels, model.layers, strict=True):
            y = y @ (w + 2.0 * a @ b) + layer.bias[...]
        return jnp.mean((y - target) ** 2)

    tx = optax.adam(1e-2)
    state = tx.init(params)
    losses = []
    for _ in range(20):
        expected, gradients = jax.value_and_grad(by_hand)(params)
        updates, state = tx.update(gradients, state)
        params = optax.apply_updates(params, updates)
        losses.append(step(model, optimizer))
        assert abs(losses[-1] - expected) < 1e-4 * expected
    assert losses[-1] < 0.8 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model, nnx.Not(nnx.LoRAParam)))


@pytest.mark.parametrize("scheme", ["nf4-g16", None])
def test_a_merged_model_computes_the_same(scheme):
    base = Model()
    if scheme:
        base, _ = qjax.quantize_model(base, scheme)
    model = with_random_b(add_lora(base, rank=4))
    merged = merge_lora(model)
    assert not adapters(merged) and not quantized_layers(merged) and len(adapters(model)) == 2
    assert jax.tree.structure(nnx.state(merged)) == jax.tree.structure(nnx.state(Model()))
    run = nnx.jit(Model.__call__)
    ours, expected = run(merged, TOKENS), run(model, TOKENS)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=100 * EPSILON * np.abs(expected).max())
    assert np.abs(expected - run(base, TOKENS)).max() > 0.01 * np.abs(expected).max()


def test_layers_without_an_adapter_stay_quantized():
    base, _ = qjax.quantize_model(Model(), "nf4-g16")
    merged = merge_lora(add_lora(base, 2, layers="in_proj"))
    assert list(quantized_layers(merged)) == ["out_proj"]
    assert type(merged.in_proj.kernel) is nnx.Param
    np.testing.assert_array_equal(
        merged.in_proj.kernel[...], qjax.dequantize(base.in_proj.kernel[...])
    )


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_each_layer_goes_back_into_its_own_scheme():
    recipe = qjax.Recipe.from_json([["in_proj", "nf4-g16"], ["out_proj", "w4a16-g32-asym"]])
    base, _ = qjax.quantize_model(Model(dtype=jnp.bfloat16), recipe)
    model = with_random_b(add_lora(base, rank=4))
    merged = merge_lora(model)
    again, report = requantize_lora(model)
    for path, scheme in (("in_proj", "nf4-g16"), ("out_proj", "w4a16-g32-asym")):
        q = quantized_layers(again)[path]
        assert q.scheme.name == scheme
        assert_same(q, qjax.quantize(getattr(merged, path).kernel[...], scheme))
        (entry,) = (layer for layer in report.quantized if layer.path == path)
        assert entry.scheme == scheme and entry.bytes_before == entry.bytes_after == q.nbytes
        assert 0 < entry.relative_output_error < 0.2
    assert {layer.path for layer in report.unquantized} == {"embed", "gate", "lm_head"}
    assert not adapters(again)


def test_a_recipe_says_how_merged_weights_are_held():
    base, _ = qjax.quantize_model(Model(), "nf4-g16")
    model = with_random_b(add_lora(base, rank=4, layers="in_proj"))
    merged = merge_lora(model)
    same, report = requantize_lora(model, "nf4-g16")
    assert_same(same.out_proj.kernel[...], base.out_proj.kernel[...])
    assert_same(same.in_proj.kernel[...], qjax.quantize(merged.in_proj.kernel[...], "nf4-g16"))
    assert [entry.reason for entry in report.quantized] == [
        "",
        "has no adapter: its codes are as they were",
    ]
    other, _ = requantize_lora(model, "w8a16-g16")
    assert_same(
        other.out_proj.kernel[...],
        qjax.quantize(qjax.dequantize(base.out_proj.kernel[...]), "w8a16-g16"),
    )
    mixed, _ = requantize_lora(
        model, qjax.Recipe.from_json([["in_proj", None], [".*", "w8a16-g16"]])
    )
    assert_same(mixed.in_proj.kernel[...], merged.in_proj.kernel[...])
    assert list(quantized_layers(mixed)) == ["out_proj"]


def stack(quantized, rank=4):
    """Three layers in one module, made by nnx.vmap, adapted, with corrections."""

    @nnx.vmap(in_axes=0)
    def make(key):
        return nnx.Linear(32, 32, rngs=nnx.Rngs(params=key))

    layers = nnx.Sequential(make(jax.random.split(jax.random.key(0), 3)))
    if quantized:
        layers, _ = qjax.quantize_model(layers, "nf4-g16")
    return with_random_b(add_lora(layers, rank, layers=".*"))


@pytest.mark.parametrize("quantized", [True, False])
def test_stacked_layers_are_scanned(quantized):
    model = stack(quantized)
    (layer,) = model.layers
    adapter = low_rank.adapter_of(layer)
    assert adapter.factors.a.shape == (3, 32, 4) and adapter.factors.b.shape == (3, 4, 32)
    x = jax.random.normal(jax.random.key(9), (5, 32))
    w = np.asarray(merge_lora(model).layers[0].kernel[...], np.float64)
    expected = np.asarray(x, np.float64)
    for i in range(3):
        expected = np.tanh(expected @ w[i] + np.asarray(layer.bias[...][i], np.float64))

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def scanned(x, layer):
        return jnp.tanh(layer(x))

    graphdef, state = nnx.split(layer)

    def with_scan_layers(state, x):
        return qjax.scan_layers(
            lambda x, own: (jnp.tanh(nnx.merge(graphdef, own)(x)), None), x, state
        )[0]

    for ours in (scanned(x, layer), jax.jit(with_scan_layers)(state, x)):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=100 * EPSILON)
    gradients = jax.jit(
        jax.grad(
            lambda factors, rest: jnp.sum(with_scan_layers(nnx.merge_state(factors, rest), x) ** 2)
        )
    )(*nnx.split_state(state, nnx.LoRAParam, ...))
    assert all(np.abs(g).min(axis=(1, 2)).shape == (3,) for g in jax.tree.leaves(gradients))
    assert all((np.abs(g).max(axis=(1, 2)) > 0).all() for g in jax.tree.leaves(gradients))
    again, _ = requantize_lora(model, "nf4-g16")
    merged = merge_lora(model).layers[0].kernel[...]
    assert_same(again.layers[0].kernel[...], qjax.quantize(merged, "nf4-g16", stacked=1))


def without_equation():
    layer = nnx.Einsum("bk,kn->bn", (8, 8), rngs=nnx.Rngs(0))
    layer.einsum_str = None
    return nnx.Sequential(layer)


def with_a_class_of_products():
    layer = nnx.LinearGeneral(8, 8, rngs=nnx.Rngs(0))
    layer.dot_general_cls = lambda: jax.lax.dot_general
    return nnx.Sequential(layer)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: add_lora(Model(), layers=".*_projection"),
            r"'\.\*_projection' matches no layer that can be adapted; paths look like gate, in_proj, lm_head",
        ),
        (lambda: add_lora(Model(), layers=["in_proj", "embed"]), "'embed' matches no layer .*"),
        (lambda: add_lora(Model(), layers="("), r"rule '\(' is no regular expression: .*"),
        (lambda: add_lora(nnx.Sequential(jnp.tanh)), "the model has no nnx.Linear, .* or nnx.Einsum layer"),
        (lambda: add_lora(Model(), rank=0), "in_proj: .* 32 inputs and 64 outputs has .* 1 to 32, got 0"),
        (lambda: add_lora(Model(), rank=33), "in_proj: .* 1 to 32, got 33"),
        (lambda: add_lora(Model(), alpha=0.0), "in_proj: alpha must be a number above 0, got 0.0"),
        (lambda: add_lora(Model(), alpha=float("nan")), "in_proj: alpha must be .* above 0, got nan"),
        (
            lambda: add_lora(add_lora(Model()), layers="out_proj"),
            r"out_proj: has an adapter already; merge that first \(qjax.merge_lora\)",
        ),
        (
            lambda: add_lora(without_equation(), 2, layers=".*"),
            "layers/0: this nnx.Einsum gets its equation at each call; give it one",
        ),
        (lambda: add_lora(with_a_class_of_products(), 2, layers=".*"), "layers/0: an adapter needs .* does not use here"),
        (lambda: merge_lora(Model()), "the model has no adapters; qjax.add_lora makes some"),
        (lambda: requantize_lora(Model(), "nf4-g16"), "the model has no adapters; .*"),
        (lambda: requantize_lora(add_lora(Model())), "no layer is quantized, so a recipe must say .*"),
        (
            lambda: qjax.quantize_model(add_lora(Model()), "nf4-g16"),
            "in_proj: has an adapter, .*; qjax.requantize_lora takes both",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_named_in_one_line(call, message):
    with pytest.raises(ValueError, match=f"^{message}$") as caught:
        call()
    assert "\n" not in str(caught.value)


def test_outliers_need_a_recipe():
    base, _ = qjax.quantize_model(Model(), "w8a16-g16")
    q = base.in_proj.kernel[...]
    held = q.replaced(columns=jnp.zeros(1, jnp.int32), outliers=jnp.ones((1, 64)))
    base.in_proj.kernel.set_value(held)
    with pytest.raises(ValueError, match="^in_proj: holds some inputs as they are, .* recipe"):
        requantize_lora(add_lora(base))
