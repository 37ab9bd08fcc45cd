# SPDX-License-Identifier: Apache-2.0
"""Weights whose inputs stand in an order of their own: as arrays, as pytrees, and in every kind of product."""

import copy
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import qjax
from qjax import input_order, kernel_layout, nnx_layers, ops, outliers, qtensor
from qjax.algorithms import learned_rounding
from qjax.qat.form import Form
from qjax.qtensor import QTensor

SCHEMES = ["w4a16-g32", "w4a16-g32-asym", "w3a16-g32", "w8a16-g64", "nf4", "mxfp4", "w8a8-g32", "w4a8-g32",
           "w4afp8-g32", "mxfp8-a8", "w4a4-g32", "nvfp4"]  # fmt: skip
FIRST = (((1,), (0,)), ((), ()))


def reordered(w, scheme: str, seed: int = 3, **how) -> QTensor:
    """A weight quantized with its inputs in an order drawn by lot."""
    order = np.random.default_rng(seed).permutation(w.shape[-2]).astype(np.int32)
    q = qjax.quantize(jnp.asarray(w)[..., order, :], scheme, **how)
    stacked = w.shape[:-2]
    return q.replaced(order=jnp.broadcast_to(jnp.asarray(order), (*stacked, len(order))))


@pytest.fixture
def q(rng) -> QTensor:
    return reordered(rng.standard_normal((256, 64)).astype(jnp.bfloat16), "w4a16-g64-asym")


def leaves_are_the_same(a, b) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_stands_for_what_its_leaves_say(scheme, rng, decoded):
    q = reordered(rng.standard_normal((128, 6)).astype(np.float32), scheme)
    expected = np.zeros((128, 6))
    expected[np.asarray(q.order)] = decoded(q)
    np.testing.assert_allclose(qjax.dequantize(q), expected, rtol=1e-6)
    plain = q.replaced(order=None)
    assert q.scheme == plain.scheme and q.shape == plain.shape and q.tile == plain.tile
    assert q.nbytes == plain.nbytes + 4 * 128
    assert q.bits_per_weight == pytest.approx(plain.bits_per_weight + 32 / 6)
    wide = q.astype(jnp.bfloat16)
    assert wide.dtype == jnp.bfloat16 and wide.order is q.order


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_products_are_those_of_the_weight_in_its_order(scheme, dtype, rng):
    """To the bit: with its inputs in that order it is a weight like any other."""
    q = reordered(rng.standard_normal((128, 24)).astype(np.float32), scheme)
    x = jnp.asarray(rng.standard_normal((2, 3, 128)), dtype)
    there, plain = x[..., q.order], q.replaced(order=None)
    np.testing.assert_array_equal(qjax.matmul(x, q), qjax.matmul(there, plain))
    y = qjax.einsum("abk,kn->nab", x, q)
    np.testing.assert_array_equal(y, qjax.einsum("abk,kn->nab", there, plain))
    numbers = (((0,), (0,)), ((), ()))
    turned = jnp.moveaxis(x, -1, 0)
    y = qjax.dot_general(turned, q, numbers, preferred_element_type=jnp.float32)
    expected = qjax.dot_general(turned[q.order], plain, numbers, preferred_element_type=jnp.float32)
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("scheme", ["w4a16-g32-asym", "w8a16-g64", "nf4", "mxfp4"])
def test_products_with_its_values(scheme, rng):
    q = reordered(rng.standard_normal((128, 24)).astype(np.float32), scheme)
    x = jnp.asarray(rng.standard_normal((5, 128)), jnp.float32)
    near = np.asarray(qjax.dequantize(q), np.float64)
    np.testing.assert_allclose(qjax.matmul(x, q), x @ near, rtol=1e-4, atol=1e-4)
    other = jnp.asarray(rng.standard_normal((5, 24)), jnp.float32)
    y = qjax.dot_general(other, q, (((1,), (1,)), ((), ())))  # over its outputs
    np.testing.assert_allclose(y, other @ near.T, rtol=1e-4, atol=1e-4)
    pulled = jax.vjp(lambda x: qjax.matmul(x, q), x)[1](other)[0]
    np.testing.assert_allclose(pulled, other @ near.T, rtol=1e-4, atol=1e-4)
    each = jax.jit(jax.vmap(lambda x: qjax.matmul(x, q)))(x)
    np.testing.assert_allclose(each, x @ near, rtol=1e-4, atol=1e-4)


def test_gradients_through_quantized_activations_and_of_scales(rng):
    q = reordered(rng.standard_normal((64, 8)).astype(np.float32), "w8a8-g32")
    x = jnp.asarray(rng.standard_normal((5, 64)), jnp.float32)
    gradient = jax.grad(lambda x: qjax.matmul(x, q).sum())(x)
    expected = jnp.broadcast_to(qjax.dequantize(q).sum(axis=1), (5, 64))
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)
    of_q = jax.grad(lambda q: qjax.dequantize(q).sum(), allow_int=True)(q)
    assert of_q.order.dtype == of_q.codes.dtype == jax.dtypes.float0
    np.testing.assert_allclose(of_q.scale, qtensor.centred(q).reshape(2, 32, 8).sum(1), rtol=1e-5)


def test_a_pytree_like_any_other(q):
    same = jax.jit(lambda q: jax.tree.map(lambda leaf: leaf, q))(q)
    assert leaves_are_the_same(same, q)
    outline = jax.eval_shape(lambda q: q, q)
    assert outline.shape == q.shape and outline.order.shape == (256,)
    assert outline.nbytes == q.nbytes
    names = [str(path[0]) for path, _ in jax.tree_util.tree_leaves_with_path(q)]
    assert names == [".codes", ".scale", ".zero", ".order"]
    for again in (pickle.loads(pickle.dumps(q)), copy.deepcopy(q)):
        assert leaves_are_the_same(again, q)
    assert jax.eval_shape(qjax.dequantize, q).shape == (256, 64)


def test_stacked_layers(rng):
    w = rng.standard_normal((3, 128, 128)).astype(jnp.bfloat16)
    single = [reordered(layer, "w4a16-g64", seed) for seed, layer in enumerate(w)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *single)
    assert stack.shape == (3, 128, 128) and stack.nbytes == 3 * single[0].nbytes
    dense = np.stack([qjax.dequantize(q) for q in single])
    np.testing.assert_array_equal(qjax.dequantize(stack), dense)
    np.testing.assert_array_equal(jax.vmap(qjax.dequantize)(stack), dense)
    x = jnp.asarray(rng.standard_normal((2, 128)), jnp.float32)
    expected = [qjax.matmul(x, q) for q in single]
    for scan, layers in (
        (jax.lax.scan, stack),
        (qjax.scan_layers, kernel_layout.for_kernel(stack)),
    ):
        _, scanned = scan(lambda carry, q: (carry, qjax.matmul(x, q)), None, layers)
        np.testing.assert_allclose(scanned, expected, rtol=1e-5, atol=1e-4)
    each = jax.vmap(lambda q: qjax.matmul(x, q))(stack)
    np.testing.assert_allclose(each, expected, rtol=1e-5, atol=1e-4)
    view = kernel_layout.for_kernel(stack).replaced(layer=jnp.int32(1))
    np.testing.assert_allclose(qjax.matmul(x, view), expected[1], rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(qjax.dequantize(view), dense[1])
    assert view.nbytes == single[1].nbytes
    numbers = (((2,), (1,)), ((0,), (0,)))
    with pytest.raises(ValueError, match=r"int4\[3, 128, 128\] .* alone, not in a batch"):
        qjax.dot_general(jnp.stack([x] * 3), stack, numbers)
    other = jnp.ones((3, 2, 128))  # a batch over its outputs takes the values
    y = qjax.dot_general(other, stack, (((2,), (2,)), ((0,), (0,))))
    expected = np.einsum("lbn,lkn->lbk", other, qjax.dequantize(stack, jnp.float32))
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-3)


def test_arranged_for_a_kernel_and_back(q):
    arranged = kernel_layout.for_kernel(q)
    assert arranged.layout is not None and arranged.order is q.order
    assert leaves_are_the_same(qtensor.plain(arranged), q)
    np.testing.assert_array_equal(qjax.dequantize(arranged), qjax.dequantize(q))
    assert ops.form(q) == "xla: dequantize, then dot; inputs in the order of their groups"


@pytest.mark.parametrize("scheme", ["w4a16-g64-asym", "w8a8"])
def test_products_through_the_kernel(hopper, scheme, rng):
    q = reordered(rng.standard_normal((256, 256)).astype(jnp.bfloat16), scheme)
    x = jnp.asarray(rng.standard_normal((4, 256)), jnp.bfloat16)
    ready = qjax.prepare(q)
    assert ready.layout is not None
    y = qjax.matmul(x, ready, implementation="pallas", preferred_element_type=jnp.float32)
    plain = ready.replaced(order=None)
    expected = qjax.matmul(
        x[:, q.order], plain, implementation="pallas", preferred_element_type=jnp.float32
    )
    np.testing.assert_array_equal(y, expected)
    near = qjax.matmul(x, q, implementation="xla", preferred_element_type=jnp.float32)
    np.testing.assert_allclose(y, near, rtol=2e-2, atol=0.2)
    gradient = jax.grad(lambda x: qjax.matmul(x, ready).astype(jnp.float32).sum())(x)
    dense = np.asarray(qjax.dequantize(q), np.float32).sum(axis=1)
    np.testing.assert_allclose(gradient[0].astype(np.float32), dense, rtol=2e-2, atol=0.2)


def test_a_static_input_scale(rng):
    q = reordered(rng.standard_normal((64, 8)).astype(np.float32), "w8a8-static")
    q = q.replaced(input_scale=jnp.float32(0.02))
    x = jnp.asarray(rng.standard_normal((5, 64)), jnp.float32)
    expected = qjax.matmul(x[:, q.order], q.replaced(order=None))
    np.testing.assert_array_equal(qjax.matmul(x, q), expected)


def test_beside_inputs_that_are_held_as_they_are(rng):
    """Their numbers are those of the inputs, not of their places."""
    w = rng.standard_normal((64, 8)).astype(np.float32)
    columns = jnp.array([3, 40], jnp.int32)
    rest, held = outliers.split(jnp.asarray(w), columns, (0,))
    q = reordered(rest, "w8a16-g16").replaced(columns=columns, outliers=100 * held)
    dense = qjax.dequantize(q)
    np.testing.assert_array_equal(dense[columns], 100 * held)
    np.testing.assert_allclose(np.delete(dense, columns, 0), np.delete(w, columns, 0), atol=0.03)
    x = jnp.asarray(rng.standard_normal((5, 64)), jnp.float32)
    np.testing.assert_allclose(qjax.matmul(x, q), x @ dense, rtol=1e-4, atol=1e-3)


def test_rows_of_a_table(rng):
    q = reordered(rng.standard_normal((16, 20)).astype(np.float32), "w4a16-g4")
    ids = jnp.array([[3, -1], [0, 7]])
    np.testing.assert_array_equal(qjax.take(q, ids), qjax.dequantize(q)[ids])


def test_in_a_stock_layer_with_an_adapter(rng):
    layer = nnx.Linear(64, 32, rngs=nnx.Rngs(0))
    model = nnx.Sequential(layer)
    q = reordered(np.asarray(layer.kernel.get_value()), "w4a16-g16")
    nnx_layers.install(layer, q)
    x = jnp.asarray(rng.standard_normal((5, 64)), jnp.float32)
    np.testing.assert_allclose(model(x), x @ qjax.dequantize(q), rtol=1e-4, atol=1e-4)
    adapted = qjax.add_lora(model, rank=4, layers=".*")
    np.testing.assert_allclose(adapted(x), model(x), rtol=1e-5, atol=1e-5)
    merged = qjax.merge_lora(adapted).layers[0].kernel[...]
    np.testing.assert_allclose(merged, qjax.dequantize(q), rtol=1e-6)


@pytest.fixture
def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))


@pytest.mark.parametrize("scheme", ["w4a16-g32-asym", "w3a16-g32", "w8a8-g32"])
def test_shards_of_its_outputs(scheme, mesh, rng):
    q = reordered(rng.standard_normal((64, 16)).astype(np.float32), scheme)
    x = jnp.asarray(rng.standard_normal((3, 64)), jnp.float32)
    columns = P(None, "x")
    specs = jax.tree.map(lambda leaf: columns if leaf.ndim == 2 else P(), q)

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P(), specs), out_specs=(columns, columns)
    )
    def both(x, q):
        assert q.shape == (64, 8)
        return qjax.dequantize(q), qjax.matmul(x, q)

    near, y = both(x, q)
    np.testing.assert_array_equal(near, qjax.dequantize(q))
    np.testing.assert_allclose(y, qjax.matmul(x, q), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", [P(), P("x")], ids=["whole", "cut"])
def test_shards_of_its_inputs_are_refused_by_hand_and_right_under_jit(order, mesh, rng):
    q = reordered(rng.standard_normal((64, 16)).astype(np.float32), "w8a16-g16")
    specs = jax.tree.map(lambda leaf: P("x", None) if leaf.ndim == 2 else order, q)
    x = jnp.asarray(rng.standard_normal((3, 64)), jnp.float32)
    for f, spec in ((lambda x, q: qjax.dequantize(q), P("x")), (qjax.matmul, P())):
        cut = jax.shard_map(f, mesh=mesh, in_specs=(P(None, "x"), specs), out_specs=spec)
        with pytest.raises(ValueError) as caught:
            cut(x, q)
        assert (
            "int8[64, 16] has its 64 inputs in an order of their own and can be cut along its outputs "
            f"alone; this part has 32 of the inputs, and {64 if order == P() else 32} of their order"
        ) in str(caught.value)
    sharded = jax.tree.map(
        lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), q, specs
    )
    np.testing.assert_array_equal(jax.jit(qjax.dequantize)(sharded), qjax.dequantize(q))
    y = jax.jit(qjax.matmul)(x, sharded)
    np.testing.assert_allclose(y, qjax.matmul(x, q), rtol=1e-5, atol=1e-5)


def test_what_has_no_place_for_an_order(q):
    message = "inputs stand in an order of their own cannot be trained"
    with pytest.raises(ValueError, match=message):
        learned_rounding.anchored(jnp.ones((256, 64), jnp.bfloat16), q)
    with pytest.raises(
        ValueError, match="up: inputs that stand in an order of their own cannot be"
    ):
        Form.of(q, "up")
    layer = nnx.Linear(256, 64, use_bias=False, rngs=nnx.Rngs(0))
    nnx_layers.install(layer, q)
    with pytest.raises(ValueError, match="layers/0: inputs that stand in an order of their own"):
        qjax.trainable(nnx.Sequential(layer))
    with pytest.raises(ValueError, match="was quantized for products over its axes"):
        eight = reordered(np.ones((64, 8), np.float32), "w8a8")
        qjax.dot_general(jnp.ones((1, 8)), eight, (((1,), (1,)), ((), ())))
    with pytest.raises(AssertionError):
        ops.few_rows(jnp.ones((1, 256)), q, FIRST, None)


def test_from_codes_takes_an_order_of_one_axis(q):
    def made(order, axis=(-2,)):
        return QTensor.from_codes(
            qtensor.unpacked(q), q.scale, q.zero, order=order, format=q.format, axis=axis,
            tile=q.tile, dtype=q.dtype,
        )  # fmt: skip

    assert leaves_are_the_same(made(q.order), q)
    with pytest.raises(ValueError, match=r"order has shape \(128,\); there are 256 inputs"):
        made(q.order[:128])
    with pytest.raises(ValueError, match=r"along one axis, this product sums over \(-2, -1\)"):
        made(q.order, (-2, -1))


@pytest.mark.parametrize("k, size", [(6, 2), (7, 3), (5, 5), (4, 1)])
def test_groups_and_the_order_that_they_make(k, size):
    order = np.random.default_rng(k).permutation(k)
    groups = np.empty(k, np.int32)
    groups[order] = np.arange(k) // size
    found = input_order.of_groups(groups, size)
    np.testing.assert_array_equal(groups[found], np.arange(k) // size)
    assert sorted(found) == list(range(k)) and found.dtype == np.int32
    for group in range(groups.max() + 1):  # in a group they stay as they are
        assert (np.diff(found[groups[found] == group]) > 0).all()


@pytest.mark.parametrize(
    "groups, line",
    [
        ([0, 0, 0, 1], "groups of 2 inputs must be numbered 0 to 1, the last alone may be smaller; "
                       "there are 2 numbers from 0 to 1, of 1 to 3 inputs"),
        ([0, 2, 2, 0], "2 numbers from 0 to 2, of 2 to 2 inputs"),
        ([-1, 0, 0, -1], "2 numbers from -1 to 0"),
        ([0, 1, 1], "numbered 0 to 1.*2 numbers from 0 to 1, of 1 to 2 inputs"),
    ],
)  # fmt: skip
def test_groups_of_other_sizes(groups, line):
    with pytest.raises(ValueError, match=line) as caught:
        input_order.of_groups(np.array(groups, np.int32), 2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "order", [[0, 1, 1], [0, 1, 3], [0, -1, 2], [0, 1], [[0, 1, 2]], [0.0, 1.0, 2.0]]
)
def test_an_order_that_is_none(order):
    dtype = np.float32 if 2.0 in order and isinstance(order[0], float) else np.int32
    line = r"order of inputs must be int32 \[3\] with each number below 3 once"
    with pytest.raises(ValueError, match=line):
        input_order.check(jnp.asarray(order, dtype), (3,))
    input_order.check(jnp.array([[2, 0, 1], [0, 1, 2]], jnp.int32), (2, 3))
