# SPDX-License-Identifier: Apache-2.0
"""Weights arranged for a kernel: the same weights, and the door that sends their products there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax import activations, formats, kernel_layout, kernel_products, ops, qtensor

HALF_TOKENS = [
    "w4a16-g32", "w4a16-g64-asym", "w4a16-g128", "w4a16-channel", "w4a16-channel-asym",
    "w4a16-tensor", "w8a16-g32", "w8a16-g128-asym", "w8a16-channel", "w8a16-tensor-asym", "fp8-a16",
    "fp8-a16-tensor",
]  # fmt: skip
BYTE_TOKENS = [
    "w4a8", "w8a8", "w8a8-tensor", "fp8-dynamic", "fp8-dynamic-tensor", "fp8-block", "w4afp8-g128",
    "w4afp8-channel",
]  # fmt: skip
TAKEN = HALF_TOKENS + BYTE_TOKENS
NUMBERS = (((1,), (0,)), ((), ()))


def same(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x, np.float64), np.asarray(y, np.float64))


@pytest.fixture
def weight(rng):
    return jnp.asarray(rng.standard_normal((256, 48)), jnp.bfloat16)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", TAKEN)
def test_there_and_back(weight, name, dtype):
    q = qjax.quantize(weight.astype(dtype), name)
    arranged = kernel_layout.for_kernel(q)
    assert arranged.layout is not None and arranged.codes.dtype == jnp.uint32
    assert (arranged.shape, arranged.dtype, arranged.tile) == (q.shape, q.dtype, q.tile)
    assert arranged.scheme == q.scheme
    more = 0 if q.zero is None else q.zero.size  # 16 bits each there, 8 here
    if name in BYTE_TOKENS and name != "w4afp8-g128":
        more += (4 - q.scale.dtype.itemsize) * q.scale.size  # float32 there
    elif "tensor" in name:  # once for each output there
        more = (2 * 48) * (1 if q.zero is None else 2) - (2 if q.zero is None else 3)
    assert arranged.nbytes == q.nbytes + more
    same(qtensor.plain(arranged), q)
    assert kernel_layout.for_kernel(arranged) is arranged and qtensor.plain(q) is q
    np.testing.assert_array_equal(qjax.dequantize(arranged), qjax.dequantize(q))


@pytest.mark.parametrize(
    "name", ["w4a16-g64-asym", "w8a16-g64-asym", "fp8-a16-tensor", "w8a8", "fp8-block"]
)
def test_layers_that_are_stacked(weight, name):
    q = qjax.quantize(jnp.stack([weight, weight * 2]), name, stacked=1)
    arranged = kernel_layout.for_kernel(q)
    assert arranged.layout is not None and arranged.shape == (2, 256, 48)
    same(qtensor.plain(arranged), q)
    _, each = jax.lax.scan(lambda c, q: (c, qjax.dequantize(q)), 0, arranged)
    np.testing.assert_array_equal(each, qjax.dequantize(q))


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("w3a16-g32", (256, 48), "is for int4, int8 and e4m3 weights, this is w3a16-g32"),
        ("fp8-e5m2", (256, 48), "is for int4, int8 and e4m3 weights, this is fp8-e5m2"),
        ("w4a8-g64", (256, 48), "group_size=64 must be None: a scale a channel, with int8 tokens"),
        ("w4a4-channel", (256, 48), "tokens are int4, must be bfloat16 or float16 or int8"),
        ("w8a8-g64", (256, 48), "group_size=64 must be None: a scale a channel, with int8 tokens"),
        ("w4afp8-g64", (256, 48), "group_size=64 must be one of (128,)"),
        ("mxfp8", (256, 48), "scales must be floats of 16 or 32 bits, these are float8_e8m0fnu"),
        ("w4a16-g16", (256, 48), "group_size=16 must be one of"),
        ("fp8-block", (128, 256), "per output or one for all, these are for tiles of (128, 128)"),
        ("w4a16-g64", (192, 48), "k=192 must be divisible by 128"),
        ("w4a16-g64", (256, 40), "n=40 must be divisible by 16"),
    ],
)
def test_weights_that_no_kernel_takes(name, shape, reason):
    q = qjax.quantize(jnp.ones(shape, jnp.bfloat16), name)
    assert reason in kernel_layout.why_no_kernel(q)
    assert kernel_layout.for_kernel(q) is q
    with pytest.raises(NotImplementedError, match="no Pallas kernel takes") as caught:
        qjax.matmul(jnp.ones((1, shape[0]), jnp.bfloat16), q, implementation="pallas")
    assert reason in str(caught.value)


def test_float32_scales_have_no_kernel(weight):
    q = qjax.quantize(weight.astype(jnp.float32), "w4a16-g64")
    assert "scales are float32, must be bfloat16 or float16" in kernel_layout.why_no_kernel(q)
    assert kernel_layout.why_no_kernel(qjax.quantize(weight.astype(jnp.float32), "w8a8")) is None


def test_nothing_is_arranged_without_the_gpu(weight):
    q = qjax.quantize(weight, "w4a16-g64")
    assert qjax.prepare({"a": q})["a"] is q


def test_arranged_weights_compute_everywhere(weight, rng):
    q = qjax.quantize(weight, "w4a16-g64-asym")
    arranged = kernel_layout.for_kernel(q)
    x = jnp.asarray(rng.standard_normal((3, 256)), jnp.bfloat16)
    np.testing.assert_array_equal(qjax.matmul(x, arranged), qjax.matmul(x, q))
    with pytest.raises(NotImplementedError, match="runs on Hopper GPUs, this is"):
        qjax.matmul(x, arranged, implementation="pallas")


def test_the_rule_of_the_door(hopper, weight):
    q = qjax.quantize(weight, "w4a16-g64")
    arranged = qjax.prepare(q)

    def reason(x, w, numbers=NUMBERS):
        return kernel_products.why_not(jax.ShapeDtypeStruct(*x), w, numbers)

    assert reason(((64, 256), jnp.bfloat16), arranged) is None
    assert reason(((65, 256), jnp.bfloat16), arranged) is None
    assert "4097 rows" in reason(((4097, 256), jnp.bfloat16), arranged)
    assert "0 rows" in reason(((0, 256), jnp.bfloat16), arranged)
    assert "activations are float32" in reason(((1, 256), jnp.float32), arranged)
    assert "qjax.prepare" in reason(((1, 256), jnp.bfloat16), q)
    assert "not quantized" in reason(((1, 256), jnp.bfloat16), weight)
    other = (((1,), (1,)), ((), ()))
    assert "x [..., k] . w [k, n] only" in reason(((1, 48), jnp.bfloat16), arranged, other)


@pytest.mark.parametrize("name", HALF_TOKENS)
def test_products_through_the_kernel(hopper, weight, rng, name):
    q = qjax.quantize(weight, name)
    arranged = qjax.prepare(q)
    x = jnp.asarray(rng.standard_normal((2, 3, 256)), jnp.bfloat16)
    y = jax.jit(qjax.matmul)(x, arranged)
    assert hopper == [((6, 256), "bfloat16")]
    expected = np.asarray(x, np.float64) @ np.asarray(qjax.dequantize(q, jnp.float32), np.float64)
    # Exact weights, float32 sums, one rounding to bfloat16.
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2.0**-8, atol=1e-4)
    wide = qjax.matmul(x, arranged, preferred_element_type=jnp.float32, implementation="pallas")
    np.testing.assert_allclose(wide, expected, rtol=1e-5, atol=1e-4)
    qjax.matmul(x, arranged, implementation="xla")
    qjax.matmul(jnp.ones((4097, 256), jnp.bfloat16), arranged)
    assert len(hopper) == 2


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("name", BYTE_TOKENS)
def test_quantized_activations_through_the_kernel(hopper, weight, rng, name, dtype):
    q = qjax.quantize(weight, name)
    arranged = qjax.prepare(q)
    x = jnp.asarray(rng.standard_normal((2, 3, 256)), dtype)
    wide = functools.partial(qjax.matmul, preferred_element_type=jnp.float32)
    y = jax.jit(functools.partial(wide, implementation="pallas"))(x, arranged)
    assert hopper == [((6, 256), q.activations.format.storage)]
    plain = wide(x, q)
    if q.activations.format.kind == "integer":  # whole sums, and the same factors in the same order
        np.testing.assert_array_equal(y, plain)
    near = activations.quantize(x, q.activations, (-1,))
    expected = np.asarray(activations.dequantize(near), np.float64)
    expected = expected @ np.asarray(qjax.dequantize(q, jnp.float32), np.float64)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-4)
    # XLA's block form rounds the operands to the activations' dtype.
    np.testing.assert_allclose(y, plain, rtol=0.01, atol=0.1)


@pytest.mark.parametrize("name", BYTE_TOKENS)
def test_vmap_and_gradients_with_quantized_activations(hopper, weight, rng, name):
    q = qjax.quantize(weight, name)
    arranged = qjax.prepare(q)
    x = jnp.asarray(rng.standard_normal((5, 4, 256)), jnp.bfloat16)
    y = jax.vmap(qjax.matmul, in_axes=(0, None))(x, arranged)
    assert ((20, 256), q.activations.format.storage) in hopper
    np.testing.assert_allclose(y, qjax.matmul(x, q), rtol=0.02, atol=0.1)
    many = jnp.asarray(rng.standard_normal((70, 1, 256)), jnp.bfloat16)
    batched = jax.vmap(qjax.matmul, in_axes=(0, None))(many, arranged)
    assert ((70, 256), q.activations.format.storage) in hopper
    np.testing.assert_allclose(batched, qjax.matmul(many, q), rtol=0.02, atol=0.1)

    def total(x, w):
        return qjax.matmul(x, w).astype(jnp.float32).sum()

    ours, plain = jax.grad(total)(x[0], arranged), jax.grad(total)(x[0], q)
    # Sums of 48 weights, which ours are rounded to bfloat16: to 2**-9 of at most 3.5.
    np.testing.assert_allclose(
        ours.astype(jnp.float32), plain.astype(jnp.float32), rtol=2.0**-8, atol=48 * 2.0**-9
    )


def test_activations_and_weights_must_be_cut_alike(weight):
    block = qjax.quantize(weight, "fp8-block")
    per_token = qjax.quantize(weight, "fp8-dynamic").activations
    mixed = block.replaced()
    mixed.activations = per_token
    assert "a scale for None inputs, must have one for 128" in kernel_layout.why_no_kernel(mixed)


def test_scales_of_groups_have_16_bits(weight):
    q = qjax.quantize(weight.astype(jnp.float32), "w4afp8")
    assert "scales of groups must have 16 bits, these are float32" in kernel_layout.why_no_kernel(q)


@pytest.mark.parametrize("name", ["w4a16-g64-asym", "w8a16-channel", "w8a8", "fp8-block", "w4afp8"])
def test_a_scan_hands_the_kernel_all_layers(hopper, rng, name):
    w = jnp.asarray(rng.standard_normal((3, 128, 128)) / 8, jnp.bfloat16)
    q, x = qjax.quantize(w, name, stacked=1), jnp.ones((2, 128), jnp.bfloat16)
    bias = jnp.asarray(rng.standard_normal((3, 128)), jnp.bfloat16)

    def layer(x, parts):
        return (y := qjax.matmul(x, parts["w"]) + parts["bias"]), y

    scanned = jax.jit(lambda xs: qjax.scan_layers(layer, x, xs))
    last, each = scanned({"w": qjax.prepare(q), "bias": bias})
    seen = len(hopper)
    assert seen
    expected, expected_each = jax.lax.scan(layer, x, {"w": qjax.prepare(q), "bias": bias})
    assert len(hopper) > seen
    np.testing.assert_array_equal(each, expected_each)
    np.testing.assert_array_equal(last, expected)
    # As they are, layers are sliced; backwards they come in the other order.
    sliced, _ = qjax.scan_layers(layer, x, {"w": q, "bias": bias}, reverse=True)
    again, _ = jax.lax.scan(layer, x, {"w": q, "bias": bias}, reverse=True)
    np.testing.assert_array_equal(sliced, again)
    assert qjax.scan_layers(lambda c, _: (c + 1, None), 0, None, length=4)[0] == 4


@pytest.mark.parametrize("m", [1, 40])
def test_kernels_under_shard_map(hopper, rng, m):
    q = qjax.quantize(jnp.asarray(rng.standard_normal((256, 64)), jnp.bfloat16), "w4a16-g64")
    x, arranged = jnp.asarray(rng.standard_normal((m, 256)), jnp.bfloat16), qjax.prepare(q)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    spec = jax.sharding.PartitionSpec
    by_outputs = jax.shard_map(
        qjax.matmul, mesh=mesh, in_specs=(spec(), spec("x")), out_specs=spec(None, "x"),
        check_vma=False,  # the interpreter's callback does not say how it varies
    )  # fmt: skip
    np.testing.assert_array_equal(jax.jit(by_outputs)(x, arranged), qjax.matmul(x, arranged))
    assert ((m, 256), "bfloat16") in hopper


def test_a_scan_of_what_does_not_fit_together(hopper, weight):
    def arranged(layers):
        return kernel_layout.for_kernel(
            qjax.quantize(jnp.stack([weight] * layers), "w4a16-g64", stacked=1)
        )

    def refused(message, xs, **options):
        with pytest.raises(ValueError, match=message):
            qjax.scan_layers(lambda c, _: (c, None), 0, xs, **options)

    refused("leaves must be stacked to one length", (arranged(2), jnp.ones(3)))
    refused("leaves must be stacked to one length", (jnp.ones(3), arranged(2)))
    refused("length=3", arranged(2), length=3)
    refused("leaves must be stacked to one length, their shapes are", None)
    refused("leaves must be stacked to one length", (1.0, arranged(2)))
    single = kernel_layout.for_kernel(qjax.quantize(weight, "w4a16-g64"))
    refused(r"weights must be stacked \[layers, k, n\]", single)


def test_experts_in_stacked_layers_are_sliced(hopper, rng):
    experts = jnp.asarray(rng.standard_normal((2, 3, 128, 128)) / 8, jnp.bfloat16)
    q = qjax.quantize(experts, "w4a16-g64", stacked=2)
    x = jnp.ones((3, 1, 128), jnp.bfloat16)

    def layer(x, w):
        return jax.vmap(qjax.matmul)(x, w), None

    ours, _ = qjax.scan_layers(layer, x, kernel_layout.for_kernel(q))
    plain, _ = jax.lax.scan(layer, x, q)
    np.testing.assert_allclose(ours, plain, rtol=0.02, atol=0.1)


def test_vmap_over_some_of_what_a_view_has(hopper, weight):
    q = qjax.quantize(jnp.stack([weight, weight * 2, weight * 3]), "w4a16-g64", stacked=1)
    arranged, x = qjax.prepare(q), jnp.ones((2, 256), jnp.bfloat16)
    expected = [qjax.matmul(x, arranged.replaced(layer=jnp.int32(i))) for i in range(3)]

    def of_layer(layer):
        return qjax.matmul(x, arranged.replaced(layer=layer))

    np.testing.assert_array_equal(jax.vmap(of_layer)(jnp.arange(3)), jnp.stack(expected))
    ensemble = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), arranged)
    y = jax.vmap(lambda w: qjax.matmul(x, w.replaced(layer=jnp.int32(1))))(ensemble)
    np.testing.assert_array_equal(y, jnp.stack([expected[1]] * 2))


def test_a_leaf_that_there_is_not(weight):
    with pytest.raises(TypeError, match="a QTensor has no leaf layers"):
        qjax.quantize(weight, "w4a16-g64").replaced(layers=0)


def test_a_view_of_a_layer_is_that_layer(hopper, weight):
    q = qjax.quantize(jnp.stack([weight, weight * 2]), "w4a16-g64-asym", stacked=1)
    stack = qjax.prepare(q)
    view = stack.replaced(layer=jnp.int32(1))
    alone = qjax.prepare(qjax.quantize(weight, "w4a16-g64-asym"))
    assert (view.nbytes, view.bits_per_weight) == (alone.nbytes, alone.bits_per_weight)
    assert stack.nbytes == 2 * alone.nbytes
    assert formats.device_bytes(view) == stack.nbytes + 4  # of all layers, and which one it is
    assert view.shape == weight.shape and view.scheme == q.scheme
    np.testing.assert_array_equal(qjax.dequantize(view), qjax.dequantize(q)[1])
    x = jnp.ones((3, 256), jnp.bfloat16)
    plain = qjax.matmul(x, view, implementation="xla")
    np.testing.assert_allclose(qjax.matmul(x, view), plain, rtol=0.02, atol=0.1)
    gradient = jax.grad(lambda x: qjax.matmul(x, view).astype(jnp.float32).sum())(x)
    assert np.isfinite(gradient.astype(jnp.float32)).all()


def test_vmap_joins_the_rows_and_gradients_reach_the_activations(hopper, weight, rng):
    q = qjax.quantize(weight, "w4a16-g64-asym")
    arranged = qjax.prepare(q)
    x = jnp.asarray(rng.standard_normal((5, 4, 256)), jnp.bfloat16)
    y = jax.vmap(qjax.matmul, in_axes=(0, None))(x, arranged)
    assert ((20, 256), "bfloat16") in hopper
    np.testing.assert_allclose(
        y, qjax.matmul(x, arranged, implementation="xla"), rtol=0.02, atol=0.1
    )
    many = jnp.ones((70, 1, 256), jnp.bfloat16)
    assert jax.vmap(qjax.matmul, in_axes=(0, None))(many, arranged).shape == (70, 1, 48)

    def total(x, w):
        return qjax.matmul(x, w).astype(jnp.float32).sum()

    ours, plain = jax.grad(total)(x[0], arranged), jax.grad(total)(x[0], q)
    np.testing.assert_allclose(
        ours.astype(jnp.float32), plain.astype(jnp.float32), rtol=0.02, atol=0.02
    )


@pytest.mark.parametrize("name", ["w4a16-g64", "w8a8"])
def test_weights_with_a_batch_axis_go_one_by_one(hopper, weight, name):
    q = qjax.quantize(jnp.stack([weight, weight * 2]), name, stacked=1)
    x = jnp.ones((2, 1, 256), jnp.bfloat16)
    ours = jax.vmap(qjax.matmul)(x, qjax.prepare(q))
    np.testing.assert_allclose(ours, jax.vmap(qjax.matmul)(x, q), rtol=0.02, atol=0.1)


def test_a_prepared_model_computes_the_same(hopper, rng):
    model = nnx.Linear(128, 32, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    quantized, _ = qjax.quantize_model(nnx.Sequential(model), "w4a16-g64")
    graph, state = nnx.split(quantized)
    prepared = nnx.merge(graph, qjax.prepare(state))
    x = jnp.asarray(rng.standard_normal((2, 128)), jnp.bfloat16)
    np.testing.assert_allclose(prepared(x), quantized(x), rtol=0.02, atol=0.02)
    assert hopper == [((2, 128), "bfloat16")]
    assert "pallas: few_tokens" in ops.form(prepared.layers[0].kernel[...])
