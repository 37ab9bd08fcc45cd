# SPDX-License-Identifier: Apache-2.0
"""Plain trees and Linen modules train with fake quantization in a user's own loop, by one added line."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState

import qjax
from qjax import activations, qtensor
from qjax.scheme import Scheme


def data():
    x = jax.random.normal(jax.random.key(1), (16, 32))
    return x, jnp.sin(x[:, :8]) + x[:, 8:16]


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(64)(x))
        heads = nn.DenseGeneral((2, 32), name="heads")(x)
        return nn.DenseGeneral(8, axis=(-2, -1))(heads)


# What a Linen kernel of more than two axes is summed over, its shape does not say.
AXES = {"heads": (0 - 3,), "DenseGeneral_0": (-3, -2)}


def trained(loss, params, steps: int = 40):
    """A user's own loop."""
    optimizer = optax.adam(1e-2)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    found = []
    for _ in range(steps):
        params, state, value = step(params, state)
        found.append(float(value))
    return params, found


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w3a16-channel-asym", "nf4-g32"])
def test_linen_by_one_line_in_the_loss(scheme: str) -> None:
    x, y = data()
    module = Net()
    params = module.init(jax.random.key(0), x)["params"]

    def loss(params):
        params = qjax.fake_quant(params, scheme, axes=AXES)  # the added line
        return jnp.mean((module.apply({"params": params}, x) - y) ** 2)

    params, found = trained(loss, params)
    assert found[-1] < 0.3 * found[0]
    held = qjax.quantized_params(params, scheme, axes=AXES)
    plain = jax.tree.map(
        lambda leaf: qtensor.dequantize(leaf) if isinstance(leaf, qjax.QTensor) else leaf,
        held, is_leaf=lambda leaf: isinstance(leaf, qjax.QTensor),
    )  # fmt: skip
    assert isinstance(held["heads"]["kernel"], qjax.QTensor) and held["heads"]["kernel"].axis == (
        -3,
    )
    worth = qjax.fake_quant(params, scheme, axes=AXES)
    jax.tree.map(np.testing.assert_array_equal, plain, worth)


def test_linen_with_quantized_activations() -> None:
    x, y = data()
    module, scheme = Net(), "w4a8"
    params = module.init(jax.random.key(0), x)["params"]
    apply = qjax.fake_quant_apply(module.apply, scheme, axes=AXES)  # the added line

    def outputs(params):
        return apply({"params": params}, x)

    params, found = trained(lambda params: jnp.mean((outputs(params) - y) ** 2), params)
    assert found[-1] < 0.3 * found[0]
    with nn.intercept_methods(qjax.fake_quant_activations(scheme)):
        in_two_lines = module.apply({"params": qjax.fake_quant(params, scheme, axes=AXES)}, x)
    np.testing.assert_array_equal(outputs(params), in_two_lines)
    # By hand, layer by layer.
    worth, eight = qjax.fake_quant(params, scheme, axes=AXES), Scheme.parse(scheme).activations

    def rounded(x, axis):
        return activations.dequantize(activations.quantize(x, eight, axis))

    h = nn.relu(rounded(x, (1,)) @ worth["Dense_0"]["kernel"] + worth["Dense_0"]["bias"])
    h = (
        jnp.einsum("bd,dhk->bhk", rounded(h, (1,)), worth["heads"]["kernel"])
        + worth["heads"]["bias"]
    )
    last = worth["DenseGeneral_0"]
    expected = jnp.einsum("bhk,hkn->bn", rounded(h, (1, 2)), last["kernel"]) + last["bias"]
    np.testing.assert_allclose(outputs(params), expected, atol=1e-4)


def test_a_linen_module_with_other_variables_and_in_a_train_state() -> None:
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))

    x, _ = data()
    module = Normed()
    variables = module.init(jax.random.key(0), x, train=False)
    state = TrainState.create(
        apply_fn=qjax.fake_quant_apply(module.apply, "w8a8"),
        params=variables["params"],
        tx=optax.sgd(0.1),
    )

    def loss(params):
        given = {"params": params, "batch_stats": variables["batch_stats"]}
        y, changed = state.apply_fn(given, x, train=True, mutable=["batch_stats"])
        return jnp.mean((y - 1) ** 2), changed

    gradients, changed = jax.grad(loss, has_aux=True)(state.params)
    assert set(changed) == {"batch_stats"}
    moved = state.apply_gradients(grads=gradients).params["Dense_0"]["kernel"]
    assert (moved != variables["params"]["Dense_0"]["kernel"]).any()


def test_a_plain_tree_with_learned_grids() -> None:
    x, y = data()
    keys = jax.random.split(jax.random.key(0))
    weights = {
        "up": jax.random.normal(keys[0], (32, 64)) / 6, "bias": jnp.zeros(64),
        "down": jax.random.normal(keys[1], (64, 8)) / 8,
    }  # fmt: skip
    scheme = "w2a16-g32-asym"
    grids = qjax.learned_grids(weights, scheme)
    assert set(grids) == {"up", "down"}

    def loss(params):
        worth = qjax.fake_quant(params["weights"], scheme, params["grids"])
        return jnp.mean((jax.nn.relu(x @ worth["up"] + worth["bias"]) @ worth["down"] - y) ** 2)

    first = {"weights": weights, "grids": grids}
    params, found = trained(loss, first)
    assert found[-1] < 0.5 * found[0]
    assert (params["grids"]["up"].scale != grids["up"].scale).any()
    held = qjax.quantized_params(params["weights"], scheme, params["grids"])
    worth = qjax.fake_quant(params["weights"], scheme, params["grids"])
    np.testing.assert_array_equal(qtensor.dequantize(held["up"]), worth["up"])
    assert held["bias"] is params["weights"]["bias"]


def test_what_is_no_weight_stays() -> None:
    flax = {
        "Embed_0": {"embedding": jnp.ones((8, 4))}, "BatchNorm_0": {"mean": jnp.ones((2, 4))},
        "Dense_0": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones((2, 2))},
    }  # fmt: skip
    held = qjax.quantized_params(flax, "w4a16-channel")
    assert isinstance(held["Dense_0"]["kernel"], qjax.QTensor)
    assert held["Embed_0"] == flax["Embed_0"] and held["BatchNorm_0"] == flax["BatchNorm_0"]
    assert held["Dense_0"]["bias"] is flax["Dense_0"]["bias"]
    named = qjax.Recipe.from_json([["Embed_0", "w4a16-channel"]])
    assert qjax.quantized_params(flax, named)["Embed_0"]["embedding"].axis == (-1,)


def test_bad_input() -> None:
    attention = {"query": {"kernel": jnp.ones((32, 4, 8))}}
    with pytest.raises(ValueError, match="query: a tree does not say which of its 3 axes"):
        qjax.fake_quant(attention, "w4a16-channel")
    tree = {"up": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}}
    with pytest.raises(ValueError, match="no rule .* quantizes a leaf; paths look like up"):
        qjax.fake_quant(tree, qjax.Recipe.from_json([["down", "w4a16"]]))
    with pytest.raises(
        ValueError, match="axes: 'upp' matches no quantized layer; paths look like up"
    ):
        qjax.fake_quant(tree, "w4a16-channel", axes={"upp": (-2,)})
    grids = qjax.learned_grids(tree, "w4a16-channel")
    with pytest.raises(ValueError, match="grids: 'upp' is no quantized layer; there are up"):
        qjax.fake_quant(tree, "w4a16-channel", {"upp": grids["up"]})
    with pytest.raises(ValueError, match="up: group size 3 does not divide 8"):
        qjax.fake_quant(tree, "w4a16-g3")
    with pytest.raises(ValueError, match="up: scales that are powers of two"):
        qjax.learned_grids({"up": {"kernel": jnp.ones((32, 4))}}, "mxfp4")


def test_a_rule_that_decides_for_nothing_is_told() -> None:
    recipe = qjax.Recipe.from_json([["u_p", "w4a16-channel"], [".*", "w8a16-channel"]])
    tree = {"up": {"kernel": jnp.ones((8, 4))}}
    module = nnx.Sequential(nnx.Linear(8, 4, rngs=nnx.Rngs(0)))
    for model in (tree, module):
        with pytest.warns(UserWarning, match="rule 'u_p' decides for no layer"):
            qjax.fake_quant(model, recipe)
