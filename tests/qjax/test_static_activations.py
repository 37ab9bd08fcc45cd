# SPDX-License-Identifier: Apache-2.0
"""Activations by one scale that is known beforehand: products, against the definition in plain numpy."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import qjax
from qjax import activations, formats, kernel_products, ops, qtensor
from qjax.scheme import ActivationScheme

INT8 = ActivationScheme(format=formats.INT8, static=True)
E4M3 = ActivationScheme(format=formats.E4M3, static=True)
# Both formats of activations, each with every granularity of weights.
SCHEMES = [
    "w8a8-static", "w8a8-g11-static", "w8a8-tensor-static", "w4a8-static", "w4a8-g11-static",
    "w4a4-g11-static", "w4afp8-g11-static", "w4afp8-channel-static", "fp8-static",
    "fp8-static-tensor",
]  # fmt: skip
SCALE = 2.0**-5  # a power of two divides exactly, so ties are ties


def numpy_codes(x, fmt, scale) -> np.ndarray:
    """What the codes are worth: nearest, ties to even, saturated."""
    near = np.clip(np.asarray(x, np.float32) / np.float32(scale), fmt.low, fmt.high)
    if fmt.kind == "float":
        return near.astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    return np.rint(near).astype(np.float64)


def static(w, scheme, scale=SCALE, **options):
    q = qjax.quantize(w, scheme, **options)
    return q.replaced(input_scale=jnp.full(q.shape[: q.ndim - len(q.tile)], scale, jnp.float32))


def expected(x, q, decoded) -> np.ndarray:
    near = numpy_codes(x, q.activations.format, q.input_scale) * np.float64(q.input_scale)
    return near @ decoded(q)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", SCHEMES)
def test_products_are_the_definition(rng, decoded, name, dtype):
    """Odd sizes; a twentieth of the activations lies beyond the range."""
    q = static(jnp.asarray(rng.standard_normal((33, 7)), dtype), name)
    reach = SCALE * q.activations.format.high
    x = jnp.asarray(rng.standard_normal((5, 3, 33)) * reach / 2, dtype)
    y = jax.jit(functools.partial(qjax.matmul, preferred_element_type=jnp.float32))(x, q)
    wanted = expected(x, q, decoded)
    assert (np.abs(np.asarray(x, np.float32)) > reach).mean() > 0.02
    # Float32 sums of 33 exact products; weights in groups are rounded to the activations' dtype.
    rounded = 2.0**-8 if dtype == jnp.bfloat16 and q.group_size else 2.0**-22
    size = np.abs(expected(jnp.abs(x), q, lambda q: np.abs(decoded(q))))
    assert (np.abs(y - wanted) <= rounded * size).all()
    near = activations.dequantize(activations.quantize(x, q.activations, (2,), q.input_scale))
    np.testing.assert_array_equal(
        near, numpy_codes(x, q.activations.format, SCALE).astype(np.float32) * SCALE
    )


@pytest.mark.parametrize("scheme", [INT8, E4M3])
@pytest.mark.parametrize("scale", [0.013, 3e-4])
def test_codes_of_any_scale(rng, scheme, scale):
    x = jnp.asarray(rng.standard_normal((64, 33)) * scale * scheme.format.high / 2, jnp.float32)
    quantize = jax.jit(lambda x, s: activations.quantize(x, scheme, (1,), s).codes)
    codes = formats.decode(quantize(x, jnp.float32(scale)), scheme.format)
    # XLA may multiply by a rounded reciprocal instead of dividing: next to a tie either code is right.
    below, above = (numpy_codes(x * (1 + d), scheme.format, scale) for d in (-4e-7, 4e-7))
    assert ((codes == below) | (codes == above)).all() and (below == above).mean() > 0.98


@pytest.mark.parametrize("absmax", [[0.5, 3.0, 1.0], [[0.5], [3.0]]])
def test_the_largest_input_meets_the_highest_code(absmax):
    assert activations.static_scale(jnp.asarray(absmax), INT8) == np.float32(3.0) / np.float32(127)
    assert activations.static_scale(jnp.asarray(absmax), E4M3) == np.float32(3.0) / np.float32(448)
    assert activations.static_scale(jnp.zeros(3), INT8) == 1.0


@pytest.mark.parametrize("name", ["w8a8-static", "w4afp8-g11-static", "fp8-static"])
def test_nan_is_seen_and_infinities_saturate(name):
    q = static(jnp.ones((33, 7)), name)
    x = jnp.ones((4, 33)).at[1, 5].set(jnp.nan).at[2, 0].set(jnp.inf).at[3, 0].set(-jnp.inf)
    y = qjax.matmul(x, q)
    assert np.isnan(y).all(axis=1).tolist() == [False, True, False, False]
    reach = [SCALE * q.activations.format.high, SCALE * q.activations.format.low]
    # Each one is a multiple of the scale.
    worth = float(qjax.dequantize(q)[0, 0])
    np.testing.assert_allclose(y[2:, 0], worth * (32 + np.asarray(reach)), rtol=1e-5)


@pytest.mark.parametrize("name", ["w8a8-static", "fp8-static", "w4a8-g11-static"])
def test_gradients_pass_within_the_range_alone(rng, decoded, name):
    q = static(jnp.asarray(rng.standard_normal((33, 7)), jnp.float32), name)
    fmt = q.activations.format
    x = jnp.asarray(rng.standard_normal((6, 33)) * SCALE * fmt.high / 2, jnp.float32)
    slope = jnp.asarray(rng.standard_normal((6, 7)), jnp.float32)
    found, of_weight = jax.grad(lambda x, q: jnp.sum(qjax.matmul(x, q) * slope), (0, 1), allow_int=True)(x, q)  # fmt: skip
    position = np.asarray(x, np.float64) / SCALE
    inside = (position > fmt.low) & (position < fmt.high)
    assert 0 < inside.mean() < 1
    wanted = np.where(inside, np.asarray(slope, np.float64) @ decoded(q).T, 0)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    assert np.abs(of_weight.scale).sum() > 0 and of_weight.input_scale == 0
    near = jax.grad(
        lambda x: activations.fake_quantize(x, q.activations, (1,), q.input_scale).sum()
    )
    np.testing.assert_array_equal(near(x), inside)


def test_no_scale_yet_and_one_too_many():
    q = qjax.quantize(jnp.ones((33, 7)), "w8a8-static")
    assert q.input_scale is None and q.scheme.is_static
    with pytest.raises(ValueError, match="^a static scheme has no input scale yet: .*calibrate"):
        qjax.matmul(jnp.ones((1, 33)), q)
    dynamic = static(jnp.ones((33, 7)), "w8a8")
    with pytest.raises(ValueError, match="^a static input scale does not go with a dynamic scheme"):
        qjax.matmul(jnp.ones((1, 33)), dynamic)


@pytest.mark.parametrize("name", ["w8a8-static", "fp8-static", "w4a8-g11-static"])
def test_transformations_take_it_along(rng, name):
    w = jnp.asarray(rng.standard_normal((3, 33, 7)), jnp.float32)
    one = static(w[0], name)
    leaves, tree = jax.tree.flatten(one)
    again = jax.tree.unflatten(tree, leaves)
    assert again.input_scale is one.input_scale and again.scheme == one.scheme
    assert jax.eval_shape(lambda q: q, one).input_scale.shape == ()
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(one)]
    assert ".input_scale" in names

    stack = static(w, name, stacked=1)
    stack = stack.replaced(input_scale=jnp.array([1.0, 0.5, 0.25]) / 16)
    assert stack.scheme.name == one.scheme.name
    x = jnp.asarray(rng.standard_normal((3, 4, 33)), jnp.float32)
    each = jnp.stack(
        [qjax.matmul(x[i], jax.tree.map(lambda a, i=i: a[i], stack)) for i in range(3)]
    )
    numbers = (((2,), (1,)), ((0,), (0,)))
    np.testing.assert_allclose(ops.dot_general(x, stack, numbers), each, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(qjax.matmul)(x, stack), each, rtol=1e-6)
    _, scanned = jax.lax.scan(lambda c, parts: (c, qjax.matmul(*parts)), 0, (x, stack))
    np.testing.assert_allclose(scanned, each, rtol=1e-6)
    with pytest.raises(ValueError, match="stacked weights: a product must have their leading axes"):
        ops.dot_general(x[0], stack, (((1,), (1,)), ((), ())))


def test_batch_axes_in_any_order(rng):
    w = jnp.asarray(rng.standard_normal((2, 3, 33, 7)), jnp.float32)
    q = static(w, "w8a8-static", stacked=2)
    q = q.replaced(input_scale=jnp.asarray(2.0 ** -rng.integers(3, 6, (2, 3)), jnp.float32))
    x = jnp.asarray(rng.standard_normal((3, 4, 2, 33)), jnp.float32)
    y = ops.einsum("bcad,abdh->abch", x, q)
    each = jax.vmap(jax.vmap(qjax.matmul))(jnp.transpose(x, (2, 0, 1, 3)), q)
    np.testing.assert_allclose(y, each, rtol=1e-6)


def test_the_parts_of_a_mesh_have_the_scale_of_all(rng):
    q = static(jnp.asarray(rng.standard_normal((32, 16)), jnp.float32), "w8a8-static")
    x = jnp.asarray(rng.standard_normal((4, 32)), jnp.float32)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    spec = jax.sharding.PartitionSpec
    by_outputs = q.replaced(codes=spec(None, "x"), scale=spec(None, "x"), input_scale=spec())
    multiply = jax.shard_map(
        qjax.matmul, mesh=mesh, in_specs=(spec(), by_outputs), out_specs=spec(None, "x")
    )
    np.testing.assert_array_equal(jax.jit(multiply)(x, q), qjax.matmul(x, q))


KERNEL_SCHEMES = [
    "w8a8-static", "w4a8-static", "fp8-static-tensor", "w4afp8-g128-static",
]  # fmt: skip


@pytest.mark.parametrize("name", KERNEL_SCHEMES)
def test_the_kernels_compute_the_same(hopper, rng, name):
    q = static(jnp.asarray(rng.standard_normal((256, 48)), jnp.bfloat16), name)
    arranged = qjax.prepare(q)
    assert arranged.layout is not None and arranged.scheme == q.scheme
    back = qtensor.plain(arranged)
    assert back.input_scale == q.input_scale and (back.codes == q.codes).all()
    x = jnp.asarray(rng.standard_normal((6, 256)) * 2, jnp.bfloat16).at[2, 3].set(jnp.nan)
    wide = functools.partial(qjax.matmul, preferred_element_type=jnp.float32)
    y, plain = jax.jit(functools.partial(wide, implementation="pallas"))(x, arranged), wide(x, q)
    assert hopper == [((6, 256), q.activations.format.storage)]
    if q.activations.format.kind == "integer":
        np.testing.assert_array_equal(y, plain)
    # XLA rounds weights in groups to the activations' dtype.
    np.testing.assert_allclose(y, plain, rtol=0.01, atol=0.2)
    assert np.isnan(y).all(axis=1).tolist() == [False, False, True, False, False, False]
    x, totals = x[:2], [lambda x, w=w: wide(x, w).sum() for w in (arranged, q)]
    beyond = jnp.abs(x.astype(jnp.float32)) >= SCALE * q.activations.format.high
    ours, theirs = (jax.grad(total)(x).astype(jnp.float32) for total in totals)
    np.testing.assert_allclose(ours, theirs, rtol=2.0**-8, atol=48 * 2.0**-9)
    assert (ours[beyond] == 0).all() and beyond.any() == (
        name.endswith("a8-static") or "tensor-" in name
    )


@pytest.mark.parametrize("name", ["w8a8-static", "fp8-static"])
def test_a_scan_over_arranged_layers(hopper, rng, name):
    w = jnp.asarray(rng.standard_normal((3, 128, 128)) / 8, jnp.bfloat16)
    q = static(w, name, stacked=1).replaced(input_scale=jnp.array([1.0, 0.5, 2.0]) / 16)
    x = jnp.asarray(rng.standard_normal((2, 128)), jnp.bfloat16)
    step = lambda x, w: ((y := qjax.matmul(x, w)), y)  # noqa: E731
    _, each = jax.jit(lambda xs: qjax.scan_layers(step, x, xs))(qjax.prepare(q))
    _, sliced = jax.lax.scan(step, x, q)
    assert hopper
    np.testing.assert_allclose(
        each.astype(jnp.float32), sliced.astype(jnp.float32), rtol=2.0**-7, atol=2.0**-6
    )


def test_words():
    q = static(jnp.ones((32, 16)), "w8a8-static")
    assert ops.form(q) == "xla: int8 dot, then scales, that of inputs static"
    assert q.nbytes == static(jnp.ones((32, 16)), "w8a8").replaced(input_scale=None).nbytes + 4
    assert (
        kernel_products.why_not(jnp.ones((1, 32)), jnp.ones((32, 16)), None)
        == "the weight is not quantized"
    )
