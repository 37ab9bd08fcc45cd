# SPDX-License-Identifier: Apache-2.0
"""Stock NNX layers train with fake quantization in a user's own loop, by one added line."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import qjax
from qjax import qtensor
from qjax.qat.fake_quantizer import FakeQuantizer, LearnedScale


class Net(nnx.Module):
    """One layer of each kind, and parts with a state of their own."""

    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(32, 64, rngs=rngs)
        self.norm = nnx.BatchNorm(64, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.einsum = nnx.Einsum("btd,dhk->bthk", (64, 2, 32), rngs=rngs)
        self.general = nnx.LinearGeneral((2, 32), 8, axis=(-2, -1), rngs=rngs)

    def __call__(self, x):
        return self.general(self.einsum(self.dropout(self.norm(nnx.relu(self.linear(x))))))


def data():
    x = jax.random.normal(jax.random.key(1), (8, 3, 32))
    return x, jnp.sin(x[..., :8]) + x[..., 8:16]


def losses(model: nnx.Module, steps: int, loss_of=lambda model, x: model(x)) -> list[float]:
    """A user's own train step; nothing here knows of quantization."""
    x, y = data()
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return jnp.mean((loss_of(model, x) - y) ** 2)

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    return [float(step(model, optimizer)) for _ in range(steps)]


@pytest.mark.parametrize(
    "scheme", ["w4a16-g32", "w4a8-channel", "w4afp8-g32", "w3a16-channel-asym"]
)
def test_one_line_before_the_optimizer(scheme: str) -> None:
    model = qjax.fake_quant(Net(nnx.Rngs(0)), scheme)  # the added line
    found = losses(model, 30)
    assert found[-1] < 0.5 * found[0]
    model.eval()
    result = qjax.quantized(model)
    x, _ = data()
    held = qjax.nnx_layers.quantized_layers(result)
    assert set(held) == {"linear", "einsum", "general"}
    for path, layer in qjax.nnx_layers.quantizable_layers(model):
        worth = layer.promote_dtype((jnp.zeros((1,) * 4), layer.kernel[...], None))[1]
        np.testing.assert_array_equal(worth, qtensor.dequantize(held[path]))
    # int8 products round elsewhere than products of dequantized values.
    np.testing.assert_allclose(result(x), model(x), atol=1e-4)
    jitted = nnx.jit(lambda model, x: model(x))(result, x)
    np.testing.assert_allclose(jitted, result(x), atol=1e-4)


def test_one_line_in_the_loss() -> None:
    plain, quantizing = Net(nnx.Rngs(0)), Net(nnx.Rngs(0))
    found = losses(quantizing, 5, lambda model, x: qjax.fake_quant(model, "w4a16-g32")(x))
    hooked = losses(qjax.fake_quant(plain, "w4a16-g32"), 5)
    np.testing.assert_allclose(found, hooked, rtol=1e-5)
    # What else a model keeps moves on: statistics of norms, streams of random numbers.
    assert float(jnp.abs(quantizing.norm.mean[...]).sum()) > 0
    np.testing.assert_allclose(quantizing.norm.mean[...], plain.norm.mean[...], rtol=1e-5)
    assert not isinstance(quantizing.linear.promote_dtype, FakeQuantizer)


@pytest.mark.parametrize("learned", [True, False])
def test_training_goes_on_from_a_quantized_model(learned: bool) -> None:
    start, _ = qjax.quantize_model(Net(nnx.Rngs(0)), "w2a16-g32")
    model = qjax.trainable(start, learned=learned)
    for path, q in qjax.nnx_layers.quantized_layers(qjax.quantized(model)).items():
        np.testing.assert_array_equal(
            qtensor.unpacked(q), qtensor.unpacked(qjax.nnx_layers.quantized_layers(start)[path])
        )
    before = jax.tree.map(jnp.copy, nnx.state(model, LearnedScale))
    found = losses(model, 40)
    assert found[-1] < 0.5 * found[0]
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, nnx.state(model, LearnedScale))
    assert bool(jax.tree.leaves(moved)) == learned and all(jax.tree.leaves(moved))
    x, _ = data()
    model.eval()
    np.testing.assert_allclose(qjax.quantized(model)(x), model(x), atol=1e-5)
    shared = {id(a) for a in jax.tree.leaves(nnx.state(start))} & {
        id(a) for a in jax.tree.leaves(nnx.state(qjax.trainable(start), nnx.Param))
    }
    assert not shared  # training may give its buffers up


def test_scales_have_a_rate_of_their_own() -> None:
    start, _ = qjax.quantize_model(Net(nnx.Rngs(0)), "w4a16-g32")
    model = qjax.trainable(start)
    weights = jax.tree.map(jnp.copy, nnx.state(model, nnx.All(nnx.Param, nnx.Not(LearnedScale))))
    x, y = data()
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=LearnedScale)
    gradients = nnx.grad(
        lambda m: jnp.mean((m(x) - y) ** 2), argnums=nnx.DiffState(0, LearnedScale)
    )(model)
    before = jax.tree.map(jnp.copy, nnx.state(model, LearnedScale))
    optimizer.update(model, gradients)
    same = jax.tree.map(
        lambda a, b: bool((a == b).all()),
        weights, nnx.state(model, nnx.All(nnx.Param, nnx.Not(LearnedScale))),
    )  # fmt: skip
    assert all(jax.tree.leaves(same))
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, nnx.state(model, LearnedScale))
    assert all(jax.tree.leaves(moved))


class Tied(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first, self.second = nnx.Linear(32, 32, rngs=rngs), nnx.Linear(32, 32, rngs=rngs)
        self.second.kernel = self.first.kernel

    def __call__(self, x):
        return self.second(self.first(x))


def test_layers_that_share_a_weight_share_it_afterwards() -> None:
    x = jax.random.normal(jax.random.key(0), (2, 32))
    model = qjax.fake_quant(Tied(nnx.Rngs(0)), "w4a16-g32")
    result = qjax.quantized(model)
    assert result.first.kernel is result.second.kernel
    np.testing.assert_allclose(result(x), model(x), atol=1e-5)
    again = qjax.trainable(result)
    assert again.first.kernel is again.second.kernel
    np.testing.assert_allclose(again(x), model(x), atol=1e-5)


def test_layers_that_are_scanned() -> None:
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs):
        return nnx.Linear(32, 32, rngs=rngs)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def run(x, layer):
        return layer(x)

    class Stacked(nnx.Module):
        def __init__(self):
            self.layers = stack(nnx.Rngs(0))

        def __call__(self, x):
            return run(x, self.layers)

    x = jax.random.normal(jax.random.key(0), (4, 32))
    model = qjax.fake_quant(Stacked(), "w4a8")
    alone = x
    for kernel in model.layers.kernel[...]:
        layer = nnx.Linear(32, 32, use_bias=False, rngs=nnx.Rngs(0))
        layer.kernel.set_value(kernel)
        alone = qjax.fake_quant(nnx.Sequential(layer), "w4a8")(alone)
    np.testing.assert_allclose(model(x), alone, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(qjax.trainable(qjax.quantized(model))(x), model(x), atol=1e-4)


def test_bad_input() -> None:
    net = Net(nnx.Rngs(0))
    with pytest.raises(ValueError, match="no rule .* quantizes a layer"):
        qjax.fake_quant(net, qjax.Recipe.from_json([["nothing", "w4a16"]]))
    with pytest.raises(ValueError, match="einsum: group size 48 does not divide 64"):
        qjax.fake_quant(net, "w4a16-g48")
    done, _ = qjax.quantize_model(net, "w4a16-g32")
    with pytest.raises(ValueError, match="einsum: already quantized to int4; qjax.trainable"):
        qjax.fake_quant(done, "w4a16-g32")
    with pytest.raises(ValueError, match="einsum: trains with fake quantization already"):
        qjax.fake_quant(qjax.trainable(done), "w4a16-g32")
    with pytest.raises(ValueError, match="no layer of the model is quantized"):
        qjax.trainable(net)
    with pytest.raises(ValueError, match="no layer of the model trains with fake quantization"):
        qjax.quantized(net)
    with pytest.raises(ValueError, match="einsum: scales that are powers of two cannot be learned"):
        qjax.trainable(qjax.quantize_model(net, "mxfp4")[0])
    table = nnx.Sequential(nnx.Embed(8, 32, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="layers/0: a table of embeddings"):
        qjax.fake_quant(table, qjax.Recipe.from_json([["layers/0", "w4a16-g32"]]))
    with pytest.raises(ValueError, match="a module knows its axes"):
        qjax.fake_quant(net, "w4a16-g32", axes={".*": (0,)})
