# SPDX-License-Identifier: Apache-2.0
"""Stock Flax layers that hold QTensors give what they give with the dequantized arrays."""

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import qjax
from qjax import nnx_layers
from qjax.nnx_layers import QuantizedParam, install, quantized_layers, weight_of


class Model(nnx.Module):
    """Every kind of layer that can hold a QTensor, with a tied head."""

    def __init__(self, rngs: nnx.Rngs, *, dtype=None, param_dtype=jnp.float32):
        how = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.embed = nnx.Embed(40, 16, **how)
        self.heads = nnx.LinearGeneral(16, (4, 8), **how)
        self.merge = nnx.LinearGeneral((4, 8), 16, axis=(-2, -1), use_bias=False, **how)
        self.up = nnx.Linear(16, 24, **how)
        self.down = nnx.Einsum("btf, fd -> btd", (24, 16), (16,), **how)
        self.norm = nnx.RMSNorm(16, rngs=rngs, param_dtype=param_dtype)

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = x + self.merge(jax.nn.silu(self.heads(x)))
        x = x + self.down(jax.nn.silu(self.up(x)))
        return self.embed.attend(self.norm(x).astype(x.dtype))


LAYERS = ["down", "embed", "heads", "merge", "up"]
TOKENS = np.arange(12).reshape(2, 6) * 3 % 40


def recipe(name: str) -> qjax.Recipe:
    scheme = qjax.Scheme.parse(name)
    return qjax.Recipe(
        rules=(qjax.Rule(pattern="embed", scheme=scheme), qjax.Rule(pattern=".*", scheme=scheme))
    )


def dequantized(quantized: nnx.Module, original: nnx.Module) -> nnx.Module:
    """The original with the arrays that the quantized layers stand for."""
    result = nnx.clone(original)
    layers = dict(nnx_layers.quantizable_layers(result))
    for path, q in quantized_layers(quantized).items():
        layer = layers[path]
        variable = layer.embedding if isinstance(layer, nnx.Embed) else layer.kernel
        variable.set_value(qjax.dequantize(q))
    return result


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(nnx.Rngs(0))


@pytest.fixture(scope="module")
def quantized(model) -> Model:
    return qjax.quantize_model(model, recipe("w4a16-g8"))[0]


@pytest.mark.parametrize("name", ["w4a16-g8-asym", "w8a16-channel", "nf4-g8", "fp8-e5m2-tensor"])
def test_outputs_are_those_of_the_dequantized_arrays(name, model):
    quantized, report = qjax.quantize_model(model, recipe(name))
    assert [layer.path for layer in report.quantized] == LAYERS and not report.unquantized
    assert set(quantized_layers(quantized)) == set(LAYERS)
    twin = dequantized(quantized, model)
    y, expected = nnx.jit(lambda models, tokens: [model(tokens) for model in models])(
        (quantized, twin), TOKENS
    )
    assert y.dtype == expected.dtype
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "param_dtype", "result"),
    [
        (None, jnp.bfloat16, jnp.bfloat16),
        (jnp.bfloat16, jnp.float32, jnp.bfloat16),
        (jnp.float32, jnp.bfloat16, jnp.float32),
        (jnp.float16, jnp.float32, jnp.float16),
    ],
)
def test_layers_compute_in_the_dtype_that_they_were_given(dtype, param_dtype, result):
    """Quantizing changes no dtype of any output."""
    model = Model(nnx.Rngs(0), dtype=dtype, param_dtype=param_dtype)
    quantized, _ = qjax.quantize_model(model, recipe("w8a16-channel"))
    x = jnp.ones((1, 2, 16), result)
    inputs = {
        "embed": TOKENS,
        "merge": jnp.ones((1, 2, 4, 8), result),
        "down": jnp.ones((1, 2, 24), result),
    }

    def outputs(model):
        each = {name: getattr(model, name)(inputs.get(name, x)) for name in LAYERS}
        return each | {"model": model(TOKENS)}

    ours, plain = nnx.eval_shape(outputs, quantized), nnx.eval_shape(outputs, model)
    assert ours == plain
    assert {array.dtype for array in plain.values()} == {jnp.dtype(result)}


@pytest.mark.parametrize("name", ["w8a8", "w4a8-g8", "fp8-dynamic", "mxfp8-a8"])
def test_activations_are_quantized_too(name, model, quantized_tokens, decoded):
    # With 32 to sum over, so that mx groups fit.
    layer = nnx.Linear(32, 8, rngs=nnx.Rngs(0))
    quantized, _ = qjax.quantize_model(nnx.Sequential(layer), name)
    x = np.random.default_rng(0).standard_normal((3, 32)).astype(np.float32)
    x[:, 0] = 1.01 * np.abs(x).max(1)
    (q,) = quantized_layers(quantized).values()
    assert q.activations == qjax.Scheme.parse(name).activations
    expected = quantized_tokens(x, q.activations) @ decoded(q) + np.asarray(layer.bias[...])
    np.testing.assert_allclose(quantized(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-4)


def test_split_merge_and_jit(quantized):
    graphdef, state = nnx.split(quantized)
    expected = quantized(TOKENS)

    @jax.jit
    def apply(state, tokens):
        return nnx.merge(graphdef, state)(tokens)

    np.testing.assert_allclose(apply(state, TOKENS), expected, rtol=1e-5, atol=1e-5)
    again = nnx.merge(graphdef, jax.tree.map(lambda x: x, state))
    np.testing.assert_array_equal(again(TOKENS), expected)
    # A function of tokens alone has the weights as constants.
    np.testing.assert_allclose(jax.jit(quantized.__call__)(TOKENS), expected, rtol=1e-5, atol=1e-5)


def test_abstract_models(quantized):
    """Shapes without memory: of a quantized model and of what it gives."""
    abstract = nnx.eval_shape(lambda model: model, quantized)
    for path, q in quantized_layers(quantized).items():
        planned = quantized_layers(abstract)[path]
        assert (planned.shape, planned.dtype, planned.nbytes) == (q.shape, q.dtype, q.nbytes)
        assert isinstance(planned.codes, jax.ShapeDtypeStruct)
    logits = nnx.eval_shape(
        lambda model, tokens: model(tokens), quantized, jax.ShapeDtypeStruct((2, 6), jnp.int32)
    )
    assert logits.shape == (2, 6, 40)


def test_optimizers_leave_quantized_weights_out(quantized):
    model = nnx.clone(quantized)
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    before = {path: np.asarray(q.codes) for path, q in quantized_layers(model).items()}
    bias = np.asarray(model.up.bias[...])

    @nnx.jit
    def step(model, optimizer):
        loss, gradients = nnx.value_and_grad(lambda model: (model(TOKENS) ** 2).mean())(model)
        optimizer.update(model, gradients)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(3)]
    assert losses[-1] < losses[0]
    for path, q in quantized_layers(model).items():
        np.testing.assert_array_equal(q.codes, before[path])
    assert np.abs(np.asarray(model.up.bias[...]) - bias).max() > 0
    assert set(nnx.to_flat_state(nnx.state(model, QuantizedParam)).paths) == {
        (name, "embedding" if name == "embed" else "kernel") for name in LAYERS
    }


def test_gradients_pass_through_to_inputs(model, quantized):
    twin = dequantized(quantized, model)
    x = jnp.ones((1, 3, 16))

    def gradient(model):
        return jax.grad(lambda x: (model.up(model.merge(model.heads(x))) ** 2).sum())(x)

    ours, plain = gradient(quantized), gradient(twin)
    np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-4)


def test_layers_scanned_over(decoded):
    """Layers made by nnx.vmap and run by nnx.scan, as deep models are written."""

    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key):
        return nnx.Linear(16, 16, rngs=nnx.Rngs(key))

    class Deep(nnx.Module):
        def __init__(self):
            self.layers = make(jax.random.split(jax.random.key(0), 3))

        def __call__(self, x):
            @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            def run(x, layer):
                return jax.nn.tanh(layer(x))

            return run(x, self.layers)

    model = Deep()
    for name in ("w4a16-g8-asym", "w8a8", "w8a16-tensor", "nvfp4"):
        quantized, _ = qjax.quantize_model(model, name)
        (q,) = quantized_layers(quantized).values()
        assert q.shape == (3, 16, 16) and q.nbytes < model.layers.kernel[...].nbytes / 2
        x = jnp.ones((2, 16))
        expected = dequantized(quantized, model)(x)
        np.testing.assert_allclose(quantized(x), expected, atol=0.05 if name == "w8a8" else 1e-5)


def test_weight_of_reads_what_is_there(model, quantized):
    assert weight_of(model.up) is model.up.kernel[...] or weight_of(model.up).shape == (16, 24)
    assert isinstance(weight_of(quantized.embed), qjax.QTensor)
    assert weight_of(quantized.up).shape == (16, 24)


def test_axes_that_are_summed_over(model):
    axes = {
        path: nnx_layers.contraction_axes(layer)
        for path, layer in nnx_layers.quantizable_layers(model)
    }
    assert axes == {"embed": (-1,), "heads": (-3,), "merge": (-3, -2), "up": (-2,), "down": (-2,)}


def test_batched_linear_general():
    layer = nnx.LinearGeneral(8, 5, batch_axis={0: 3}, rngs=nnx.Rngs(0))
    quantized, _ = qjax.quantize_model(nnx.Sequential(layer), "w8a16-channel")
    x = jax.random.normal(jax.random.key(0), (3, 2, 8))
    np.testing.assert_allclose(
        quantized(x), dequantized(quantized, nnx.Sequential(layer))(x), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("equation", "shape", "message"),
    [
        (None, (4, 5), "equation at each call"),
        ("bd,d...->b...", (4, 5), "an ellipsis hides axes"),
        ("bd,hk->bdhk", (4, 5), "sums over no axis"),
    ],
)
def test_einsums_that_do_not_say_what_they_sum_over(equation, shape, message):
    model = nnx.Sequential(nnx.Einsum("bd,dh->bh", shape, rngs=nnx.Rngs(0)))
    model.layers[0].einsum_str = equation
    with pytest.raises(ValueError, match=f"^layers/0: .*{message}") as caught:
        qjax.quantize_model(model, "w8a16-channel")
    assert "\n" not in str(caught.value)


def test_install_refuses_another_shape(model):
    layer = nnx.clone(model).up
    q = qjax.quantize(jnp.ones((24, 16)), "w8a16-channel")
    with pytest.raises(ValueError, match=r"\(24, 16\) does not fit .*\(16, 24\)$"):
        install(layer, q)
    install(layer, qjax.quantize(jnp.ones((16, 24)), "w8a16-channel"))
    np.testing.assert_allclose(layer(jnp.ones((1, 16))), 16, rtol=0.01)
