# SPDX-License-Identifier: Apache-2.0
"""The static scale of a layer's inputs trains as LSQ's step of activations does."""

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import qjax
from qjax import activations
from qjax.nnx_layers import quantizable_layers, quantized_layers
from qjax.qat.fake_quantizer import FixedScale, LearnedScale
from qjax.qat.linen import fake_quant_activations

SCHEMES = ["w8a8-static", "w4a8-g11-static", "fp8-static", "w4afp8-channel-static"]
K, N = 33, 7


def calibrated(scheme: str, use_bias: bool = True, dtype=jnp.float32):
    """A model, and inputs a third of which is larger than what calibration saw."""
    layer = nnx.Linear(K, N, use_bias=use_bias, param_dtype=dtype, rngs=nnx.Rngs(0))
    model = nnx.Sequential(layer)
    x = jax.random.normal(jax.random.key(1), (5, 4, K), dtype)
    observed = qjax.calibrate(model, [jnp.clip(x, -1, 1)], hessians=False)
    return qjax.quantize_model(model, scheme, observed)[0], x


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_training_begins_where_calibration_ended(scheme, use_bias, dtype):
    model, x = calibrated(scheme, use_bias, dtype)
    training = qjax.trainable(model, dtype=dtype)
    q, again = (m.layers[0].kernel[...] for m in (model, qjax.quantized(training)))
    assert jax.tree.structure(q) == jax.tree.structure(again)
    for ours, theirs in zip(jax.tree.leaves(q), jax.tree.leaves(again), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(np.asarray(ours, np.float32), np.asarray(theirs, np.float32))
    hook = training.layers[0].promote_dtype
    inputs, *_ = hook((x, training.layers[0].kernel[...], None))
    near = activations.quantize(x, q.activations, (2,), q.input_scale)
    np.testing.assert_array_equal(inputs, activations.dequantize(near).astype(dtype))
    size = np.abs(np.asarray(x, np.float32)).sum(-1).max()
    bound = {jnp.float32: 1e-6, jnp.bfloat16: 2.0**-7}[dtype]
    np.testing.assert_allclose(
        np.asarray(training(x), np.float32), np.asarray(model(x), np.float32), atol=bound * size
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_are_those_of_the_paper(scheme):
    """ds = g * sum over activations of (codes - x / s) inside, codes at the ends; g = 1 / sqrt(K Q_P)."""
    model, x = calibrated(scheme)
    training = qjax.trainable(model)
    slope = jax.random.normal(jax.random.key(2), (5, 4, N))

    def total(model, x):
        return jnp.sum(model(x) * slope)

    gradients, of_x = nnx.grad(total, argnums=(nnx.DiffState(0, LearnedScale), 1))(training, x)
    q = model.layers[0].kernel[...]
    fmt, scale = q.activations.format, q.input_scale
    w = np.asarray(qjax.dequantize(q), np.float64)
    upstream = np.asarray(slope, np.float64) @ w.T
    near = activations.quantize(x, q.activations, (2,), scale)
    codes = np.asarray(near.codes, np.float64)
    position = np.asarray(x, np.float64) / np.float64(scale)
    inside = (position > fmt.low) & (position < fmt.high)
    assert 0.2 < (~inside).mean() < 0.5
    terms = np.where(inside, codes - position, codes) * upstream
    found = gradients.layers[0].promote_dtype.input_scale[...] * np.sqrt(K * fmt.high)
    np.testing.assert_allclose(found, terms.sum(), atol=1e-5 * np.abs(terms).sum())
    np.testing.assert_allclose(of_x, np.where(inside, upstream, 0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scheme", ["w8a8-static", "fp8-static"])
def test_a_range_that_cuts_off_too_much_grows(scheme):
    model, x = calibrated(scheme)
    target = nnx.Linear(K, N, rngs=nnx.Rngs(0))(x)
    training = qjax.trainable(model)
    optimizer = nnx.Optimizer(training, optax.adam(1e-3), wrt=LearnedScale)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return jnp.mean((model(x) - target) ** 2)

        value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, LearnedScale))(model)
        optimizer.update(model, gradients)
        return value

    losses = [float(step(training, optimizer)) for _ in range(60)]
    assert losses[-1] < 0.3 * losses[0]
    result = qjax.quantized(training)
    before, after = (m.layers[0].kernel[...].input_scale for m in (model, result))
    assert after > 1.2 * before
    np.testing.assert_allclose(result(x), training(x), atol=1e-4)


class Gated(nnx.Module):
    def __init__(self):
        self.up, self.gate, self.down = (nnx.Linear(8, 8, rngs=nnx.Rngs(i)) for i in range(3))

    def __call__(self, x):
        return self.down(self.up(x) * jnp.tanh(self.gate(x)))


def test_layers_of_one_input_train_one_scale():
    x = jax.random.normal(jax.random.key(1), (64, 8))
    observed = qjax.calibrate(Gated(), [x], hessians=False)
    start, _ = qjax.quantize_model(Gated(), "w8a8-static", observed)
    model = qjax.trainable(start)
    up, gate, down = (
        layer.promote_dtype.input_scale for layer in (model.up, model.gate, model.down)
    )
    assert up is gate and up is not down
    optimizer = nnx.Optimizer(model, optax.sgd(1e-3), wrt=LearnedScale)
    loss = lambda model: jnp.mean((model(x) - x) ** 2)  # noqa: E731
    optimizer.update(model, nnx.grad(loss, argnums=nnx.DiffState(0, LearnedScale))(model))
    result = qjax.quantized(model)
    after = [layer.kernel[...].input_scale for layer in (result.up, result.gate, result.down)]
    assert after[0] == after[1] != start.up.kernel[...].input_scale and after[2] != after[0]


def test_ste_leaves_them_as_they_are():
    model, x = calibrated("w8a8-static")
    training = qjax.trainable(model, learned=False)
    hook = training.layers[0].promote_dtype
    assert isinstance(hook.input_scale, FixedScale) and not nnx.state(training, LearnedScale)
    assert qjax.quantized(training).layers[0].kernel[...].input_scale == hook.input_scale[...]
    assert np.isnan(training(x.at[0, 0, 0].set(jnp.nan))[0, 0]).all()


def test_plain_weights_have_not_been_calibrated():
    message = "w8a8-static has an input scale from calibration: qjax.quantize_model"
    plain = nnx.Sequential(nnx.Linear(K, N, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=f"^layers/0: {message}"):
        qjax.fake_quant(plain, "w8a8-static")
    with pytest.raises(ValueError, match=f"^up: {message}"):
        qjax.fake_quant({"up": {"kernel": jnp.ones((K, N))}}, "w8a8-static")
    linen = pytest.importorskip("flax.linen")
    dense = linen.Dense(N, name="up")
    variables = dense.init(jax.random.key(0), jnp.ones((1, K)))
    with (
        linen.intercept_methods(fake_quant_activations("w8a8-static")),
        pytest.raises(ValueError, match=message),
    ):
        dense.apply(variables, jnp.ones((1, K)))
    uncalibrated, _ = calibrated("w8a8-static")
    for _, layer in quantizable_layers(uncalibrated):
        layer.kernel.set_value(layer.kernel.get_value().replaced(input_scale=None))
    assert quantized_layers(uncalibrated)
    with pytest.raises(ValueError, match="^layers/0: w8a8-static has no input scale yet"):
        qjax.trainable(uncalibrated)


@pytest.mark.one_version
def test_the_page_runs(run_page):
    names = run_page("static_scales.md")
    assert names["q"].input_scale == jnp.abs(names["x"]).max() / 127 and names["loss"] > 0
    assert names["slopes"].layers[0].promote_dtype.input_scale[...] != 0
    assert names["again"].layers[0].kernel[...].input_scale == names["q"].input_scale
