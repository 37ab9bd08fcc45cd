# SPDX-License-Identifier: Apache-2.0
"""Weights that hold some inputs as they are: as arrays, as pytrees, and in every kind of product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax import kernel_layout, nnx_layers, ops, outliers, qtensor
from qjax.algorithms import learned_rounding, llm_int8
from qjax.qtensor import QTensor
from qjax.scheme import Scheme

W8A8 = Scheme.parse("w8a8")


def halved(w, columns, axis=(-2,), scheme=W8A8) -> QTensor:
    return llm_int8.quantize(
        jnp.asarray(w), scheme, np.asarray(columns, np.int32), axis=tuple(axis)
    )


@pytest.fixture
def q(rng) -> QTensor:
    return halved(rng.standard_normal((256, 48)).astype(jnp.bfloat16), [3, 130, 255])


@pytest.mark.parametrize(
    ("shape", "axes"),
    [((5, 7), (-1,)), ((7, 5), (0,)), ((2, 7, 3, 4), (1, 2)), ((3, 2, 7), (2, 0)), ((21,), (0,))],
)
def test_parts_are_the_inputs_and_all_others(rng, shape, axes):
    x = rng.standard_normal(shape).astype(np.float32)
    columns = np.array([1, 4, 6]) if len(axes) == 1 else np.array([0, 5, 11, 20])
    rest, held = outliers.split(jnp.asarray(x), jnp.asarray(columns), axes)
    flat = np.moveaxis(x, axes, range(len(axes)))
    kept, lengths = flat.shape[len(axes) :], flat.shape[: len(axes)]
    flat = flat.reshape(-1, *kept).copy()
    np.testing.assert_array_equal(held, flat[columns])
    flat[columns] = 0
    expected = np.moveaxis(flat.reshape(*lengths, *kept), range(len(axes)), axes)
    np.testing.assert_array_equal(rest, expected)
    again = outliers.joined(rest, jnp.asarray(columns), held, axes)
    np.testing.assert_array_equal(again, x)


def test_the_weights_of_outliers_are_the_bits_that_they_were(rng):
    w = rng.standard_normal((64, 12)).astype(jnp.bfloat16)
    q = halved(w, [0, 9])
    dense, rounded = np.asarray(qjax.dequantize(q)), np.asarray(qjax.dequantize(halved(w, [])))
    np.testing.assert_array_equal(dense[[0, 9]], w[[0, 9]])
    assert dense.dtype == w.dtype and (rounded[[0, 9]] != w[[0, 9]]).any()
    assert q.nbytes == 64 * 12 + 12 * 2 + 2 * 12 * 2 + 2 * 4
    assert q.bits_per_weight == 8 * q.nbytes / (64 * 12)
    assert q.scheme == W8A8 and q.shape == (64, 12)
    wide = qjax.dequantize(q, jnp.float32)
    np.testing.assert_array_equal(wide[jnp.array([0, 9])], w[[0, 9]].astype(np.float32))


def test_scales_do_not_see_the_weights_of_outliers(rng):
    w = rng.standard_normal((64, 12)).astype(np.float32)
    w[7] *= 1000
    without = np.delete(w, 7, axis=0)
    q, alone = halved(w, [7]), halved(without, [])
    np.testing.assert_array_equal(q.scale, alone.scale)
    np.testing.assert_array_equal(np.delete(np.asarray(q.codes), 7, axis=0), alone.codes)


def test_a_pytree_like_any_other(q):
    same = jax.jit(lambda q: jax.tree.map(lambda leaf: leaf, q))(q)
    assert jax.tree.structure(same) == jax.tree.structure(q)
    for ours, theirs in zip(jax.tree.leaves(same), jax.tree.leaves(q), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    outline = jax.eval_shape(lambda q: q, q)
    assert outline.shape == q.shape and outline.outliers.shape == (3, 48)
    assert outline.nbytes == q.nbytes
    names = [str(path[0]) for path, _ in jax.tree_util.tree_leaves_with_path(q)]
    assert names == [".codes", ".scale", ".columns", ".outliers"]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rows", [1, 5])
def test_a_product_is_that_of_both_parts(rng, q, dtype, rows):
    x = rng.standard_normal((rows, 256)).astype(np.float32)
    x[:, [3, 130, 255]] *= 100
    x = jnp.asarray(x, dtype)
    rest, few = outliers.split(x, q.columns, (-1,))
    found = qjax.matmul(x, q, preferred_element_type=jnp.float32)
    ordinary = qjax.matmul(rest, q.replaced(columns=None, outliers=None), preferred_element_type=jnp.float32)  # fmt: skip
    expected = ordinary + np.asarray(few, np.float32).T @ np.asarray(q.outliers, np.float32)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
    dense = np.asarray(x, np.float32) @ np.asarray(qjax.dequantize(q, jnp.float32))
    error = np.linalg.norm(found - dense) / np.linalg.norm(dense)
    assert error < 1e-3  # of the codes of ordinary inputs, beside products a hundred times as large
    assert qjax.matmul(x, q).dtype == jnp.promote_types(dtype, jnp.bfloat16)


def test_layers_that_sum_over_several_axes(rng):
    """With outliers only, the product is exact: their numbers count through both axes."""
    rngs = nnx.Rngs(0)
    x = jnp.asarray(rng.integers(-8, 9, (3, 5, 2, 4)), jnp.float32)
    kept = np.array([1, 6])
    x = jnp.where((jnp.arange(8) == kept[:, None]).any(0).reshape(2, 4), x, 0)
    general = nnx.LinearGeneral((2, 4), (6, 2), axis=(-2, -1), use_bias=False, rngs=rngs)
    einsum = nnx.Einsum("...nh,dnh->...d", (6, 2, 4), rngs=rngs)
    for layer in (general, einsum):
        w = jnp.round(8 * layer.kernel.get_value())
        layer.kernel.set_value(w)
        expected = layer(x)
        nnx_layers.install(layer, halved(w, kept, nnx_layers.contraction_axes(layer)))
        np.testing.assert_array_equal(layer(x), expected)
        assert np.linalg.norm(expected) > 0


def test_gradients_are_those_of_the_dequantized_weight(rng, q):
    x = jnp.asarray(rng.standard_normal((4, 256)), jnp.float32)
    cotangent = jnp.asarray(rng.standard_normal((4, 48)), jnp.float32)
    _, pullback = jax.vjp(lambda x: qjax.matmul(x, q), x)
    expected = cotangent @ qjax.dequantize(q, jnp.float32).T
    np.testing.assert_allclose(pullback(cotangent)[0], expected, rtol=1e-4, atol=1e-4)


def test_stacked_layers(rng):
    w = rng.standard_normal((3, 128, 128)).astype(jnp.bfloat16)
    single = [halved(layer, [i, 100]) for i, layer in enumerate(w)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *single)
    np.testing.assert_array_equal(
        qjax.dequantize(stack), np.stack([qjax.dequantize(q) for q in single])
    )
    x = jnp.asarray(rng.standard_normal((2, 128)), jnp.bfloat16)
    expected = [qjax.matmul(x, q) for q in single]
    _, scanned = jax.lax.scan(lambda carry, q: (carry, qjax.matmul(x, q)), None, stack)
    np.testing.assert_array_equal(scanned, expected)
    np.testing.assert_array_equal(jax.vmap(lambda q: qjax.matmul(x, q))(stack), expected)
    view = kernel_layout.for_kernel(stack).replaced(layer=jnp.int32(1))
    np.testing.assert_array_equal(qjax.matmul(x, view), expected[1])
    np.testing.assert_array_equal(qjax.dequantize(view), qjax.dequantize(single[1]))
    numbers = (((2,), (1,)), ((0,), (0,)))
    with pytest.raises(ValueError, match="alone, not in a batch"):
        qjax.dot_general(jnp.stack([x] * 3), stack, numbers)


def test_arranged_for_a_kernel_and_back(q):
    arranged = kernel_layout.for_kernel(q)
    assert arranged.layout is not None
    again = qtensor.plain(arranged)
    for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(q), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert ops.form(q) == "xla: int8 dot, then scales; 3 inputs in bfloat16"


def test_what_has_no_place_for_outliers(rng, q):
    with pytest.raises(ValueError, match="beside the codes, cannot be trained"):
        learned_rounding.anchored(jnp.ones((256, 48)), q)
    with pytest.raises(NotImplementedError, match="out_sharding with a QTensor"):
        qjax.dot_general(jnp.ones((1, 256)), q, (((1,), (0,)), ((), ())), out_sharding=object())
    with pytest.raises(ValueError, match="was quantized for products over its axes"):
        qjax.dot_general(jnp.ones((1, 48)), q, (((1,), (1,)), ((), ())))


def test_rows_of_a_table(rng):
    table = halved(rng.standard_normal((20, 16)).astype(np.float32), [2, 5], axis=(-1,))
    ids = jnp.array([[3, -1], [0, 7]])
    np.testing.assert_array_equal(qjax.take(table, ids), qjax.dequantize(table)[ids])


@pytest.mark.parametrize(
    ("columns", "held", "message"),
    [
        (np.array([1, 2]), (3, 48), r"outliers have shapes \(2,\) and \(3, 48\)"),
        (np.array([[1]]), (1, 1, 48), "outliers have shapes"),
        (np.array([2, 1]), (2, 48), r"ascending and below 256, got int32 \[2, 1\]"),
        (np.array([1, 1]), (2, 48), "ascending and below 256"),
        (np.array([1, 256]), (2, 48), "ascending and below 256"),
        (np.array([-1, 2]), (2, 48), "ascending and below 256"),
        (np.array([1.0, 2.0]), (2, 48), "must be int32"),
    ],
)
def test_outliers_that_do_not_belong_to_an_array(columns, held, message):
    columns = columns.astype(np.float32 if columns.dtype.kind == "f" else np.int32)
    with pytest.raises(ValueError, match=message):
        outliers.check((256, 48), jnp.asarray(columns), jnp.zeros(held), (-2,))
