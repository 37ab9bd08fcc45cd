# SPDX-License-Identifier: Apache-2.0
"""A QTensor is an array to its reader and a pytree to JAX."""

import copy
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import qjax
from qjax import formats, qtensor
from qjax.qtensor import QTensor
from qjax.scheme import Scheme

SHAPE = (64, 6)
# scheme: bytes of codes, of scales and zeros for a float32 weight of SHAPE
BYTES = {
    "w4a16-g16": (64 * 3, 4 * 4 * 6),
    "w4a16-g16-asym": (64 * 3, 4 * 4 * 6 + 4 * 6),
    "w3a16-channel": (64 * 3, 4 * 6),  # 18 bits a row
    "w2a16-g32": (64 * 2, 4 * 2 * 6),
    "w8a16-tensor": (64 * 6, 4),
    "nf4": (64 * 3, 4 * 6),
    "w8a8": (64 * 6, 4 * 6),
    "w4a4-g16": (64 * 3, 4 * 4 * 6),
    "fp8": (64 * 6, 4 * 6),
    "fp8-e5m2-tensor": (64 * 6, 4),
    "fp8-block": (64 * 6, 4),
    "mxfp4": (64 * 3, 2 * 6),
    "mxfp8-a8": (64 * 6, 2 * 6),
    "nvfp4": (64 * 3, 4 * 6 + 4),
}


@pytest.fixture(scope="module")
def weight() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal(SHAPE), jnp.float32)


def same(a: QTensor, b: QTensor) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and np.array_equal(np.asarray(x), np.asarray(y))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.mark.parametrize("name", BYTES)
def test_describes_the_array(name, weight):
    q = qjax.quantize(weight.astype(jnp.bfloat16) if name == "w2a16-g32" else weight, name)
    dtype = jnp.bfloat16 if name == "w2a16-g32" else jnp.float32
    assert (q.shape, q.ndim, q.size, q.dtype) == (SHAPE, 2, 64 * 6, dtype)
    codes, rest = BYTES[name]
    if name == "w2a16-g32":
        rest //= 2
    # The arrays' own accounts give int4 a byte each (jax 0.10.2); the compiler's do not.
    memory = jax.jit(lambda q: q).lower(q).compile().memory_analysis()
    assert memory is not None
    assert q.nbytes == memory.argument_size_in_bytes == codes + rest
    assert q.bits_per_weight == 8 * (codes + rest) / (64 * 6)
    assert q.scheme == Scheme.parse(name) or (name, q.scheme.name) == ("nf4", "nf4-channel")
    assert (q.format.name in repr(q)) and str(SHAPE) in repr(q)
    assert q.group_size == {"w4a16-g16": 16, "w4a16-g16-asym": 16, "w2a16-g32": 32, "w4a4-g16": 16,
                            "mxfp4": 32, "mxfp8-a8": 32, "nvfp4": 16}.get(name)  # fmt: skip


@pytest.mark.parametrize("name", BYTES)
def test_stands_for_what_its_leaves_say(name, weight, decoded, codes_of):
    q = qjax.quantize(weight, name)
    expected = decoded(q)
    np.testing.assert_array_equal(np.asarray(qtensor.unpacked(q)), codes_of(q))
    # Two roundings at most: scale times tensor scale, codes times that.
    near = qjax.dequantize(q)
    assert (near.shape, near.dtype) == (SHAPE, jnp.float32)
    np.testing.assert_allclose(near, expected, rtol=2.0**-22)
    short = qjax.dequantize(q, jnp.bfloat16)
    assert short.dtype == jnp.bfloat16
    np.testing.assert_array_equal(short, near.astype(jnp.bfloat16))


@pytest.mark.parametrize("shape", [(5,), (3, 7), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("name", ["int2", "int3", "int4", "nf4", "e2m1", "int8"])
def test_from_codes_stores_codes(name, shape, rng, codes_of):
    fmt = formats.format_named(name)
    low, high = (-(2 ** (fmt.bits - 1)), 2 ** (fmt.bits - 1)) if fmt.signed else (0, 16)
    codes = rng.integers(low, high, shape).astype(np.int8)
    tile = (1,) * (len(shape) - 1) + (2,)
    scale = jnp.ones((*shape[:-1], -(-shape[-1] // 2)))
    q = QTensor.from_codes(
        jnp.asarray(codes), scale, format=fmt, axis=(len(shape) - 1,), tile=tile, dtype=jnp.float32
    )
    assert q.axis == (-1,) and q.shape == shape
    np.testing.assert_array_equal(codes_of(q), codes)
    np.testing.assert_array_equal(qtensor.unpacked(q), codes)


def test_from_codes_refuses_scales_that_are_not_one_a_tile():
    codes = jnp.zeros((6, 4), jnp.int8)
    how = {"format": formats.INT4, "axis": (-2,), "tile": (4, 1), "dtype": jnp.float32}
    with pytest.raises(
        ValueError,
        match=r"^scale has shape \(6, 4\); codes \(6, 4\) in tiles \(4, 1\) need \(2, 4\)$",
    ):
        QTensor.from_codes(codes, jnp.ones((6, 4)), **how)
    with pytest.raises(ValueError, match=r"^zero has shape \(1, 4\).* need \(2, 4\)$"):
        QTensor.from_codes(codes, jnp.ones((2, 4)), jnp.zeros((1, 4), jnp.int8), **how)


def test_flax_reads_it_whole(weight):
    q = qjax.quantize(weight, "w4a16-g16")
    assert q[...] is q
    for index in (0, slice(None), (0, 1)):
        with pytest.raises(TypeError, match="only be read whole"):
            q[index]


def test_another_logical_dtype(weight):
    q = qjax.quantize(weight, "w4a16-g16")
    short = q.astype(jnp.bfloat16)
    assert (short.dtype, q.dtype) == (jnp.bfloat16, jnp.float32)
    assert all(a is b for a, b in zip(jax.tree.leaves(q), jax.tree.leaves(short), strict=True))
    assert qjax.dequantize(short).dtype == jnp.bfloat16


# Transformations


@pytest.fixture(scope="module", params=["w4a16-g16-asym", "w3a16-channel", "w8a8", "nvfp4"])
def q(request, weight) -> QTensor:
    return qjax.quantize(weight, request.param)


@pytest.fixture(scope="module")
def stacked(q) -> QTensor:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), q, q, q)


def test_jit_takes_and_gives_it(q):
    assert same(jax.jit(lambda q: q)(q), q)
    np.testing.assert_array_equal(jax.jit(qjax.dequantize)(q), qjax.dequantize(q))


def test_equal_statics_do_not_retrace(weight):
    traces = []

    @jax.jit
    def f(q):
        traces.append(q)
        return q.scale

    for w in (weight, weight * 2):
        f(qjax.quantize(w, "w4a16-g16"))
    assert len(traces) == 1
    f(qjax.quantize(weight, "w4a16-g32"))
    f(qjax.quantize(weight, "w8a16-g32"))
    assert len(traces) == 3


def test_statics_compare_and_hash(weight):
    one, same_statics = (
        jax.tree.structure(qjax.quantize(w, "w4a16-g16")) for w in (weight, -weight)
    )
    assert one == same_statics and hash(one) == hash(same_statics)
    others = ["w4a16-g32", "w8a16-g16", "w4a16-g16-asym", "w4a4-g16", "nf4-g16"]
    for name in others:
        assert jax.tree.structure(qjax.quantize(weight, name)) != one
    assert jax.tree.structure(qjax.quantize(weight, "w4a16-g16").astype(jnp.bfloat16)) != one


def test_paths_of_leaves(q):
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(q)]
    assert names[:2] == [".codes", ".scale"]
    assert set(names) <= {".codes", ".scale", ".zero", ".tensor_scale"}


def test_tree_map_and_abstract_values(q):
    assert same(jax.tree.map(lambda x: x, q), q)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), q)
    assert (abstract.shape, abstract.dtype, abstract.nbytes) == (q.shape, q.dtype, q.nbytes)
    assert abstract.scheme == q.scheme and abstract.bits_per_weight == q.bits_per_weight
    result = jax.eval_shape(qjax.dequantize, abstract)
    assert (result.shape, result.dtype) == (SHAPE, jnp.float32)
    nothing = jax.tree.map(lambda _: None, q)
    assert nothing.codes is None


def test_pickles_and_copies(q):
    for back in (pickle.loads(pickle.dumps(q)), copy.deepcopy(q), copy.copy(q)):
        assert same(back, q)


def test_moves_between_devices(q):
    there = jax.device_put(q, jax.devices()[1])
    assert same(there, q)
    assert all(leaf.devices() == {jax.devices()[1]} for leaf in jax.tree.leaves(there))


def test_stacked_layers_are_leading_axes(q, stacked, decoded):
    assert stacked.shape == (3, *SHAPE) and stacked.ndim == 3 and stacked.size == 3 * q.size
    assert stacked.nbytes == 3 * q.nbytes and stacked.bits_per_weight == q.bits_per_weight
    np.testing.assert_allclose(qjax.dequantize(stacked), np.stack([decoded(q)] * 3), rtol=2.0**-22)


def test_scan_over_stacked_layers(q, stacked):
    x = jnp.ones((2, 64))

    def layer(total, q):
        assert q.shape == SHAPE
        return total + qjax.matmul(x, q), q

    total, back = jax.jit(lambda stacked: jax.lax.scan(layer, jnp.zeros((2, 6)), stacked))(stacked)
    np.testing.assert_allclose(total, 3 * qjax.matmul(x, q), rtol=1e-5, atol=1e-5)
    assert same(back, stacked)


def test_vmap_over_stacked_layers(q, stacked):
    x = jnp.arange(3 * 64.0).reshape(3, 1, 64) / 64
    y = jax.jit(jax.vmap(qjax.matmul))(x, stacked)
    for i in range(3):
        np.testing.assert_allclose(y[i], qjax.matmul(x[i], q), rtol=1e-5, atol=1e-4)
    assert jax.vmap(lambda x: qjax.matmul(x, q))(x).shape == (3, 1, 6)


@pytest.mark.parametrize(
    "name",
    ["w4a16-g16", "w4a16-g16-asym", "w3a16-channel", "w8a8", "w8a16-tensor", "fp8-block", "nvfp4"],
)
def test_layers_quantized_as_one_stack(name, weight):
    """A weight with a leading layer axis gives what its layers give, also to scan and vmap."""
    weights = jnp.stack([weight, weight * 3])
    together = qjax.quantize(weights, name, stacked=1)
    one_by_one = [qjax.quantize(w, name) for w in weights]
    assert together.shape == (2, *SHAPE)
    x = jnp.ones((1, 64))

    def layer(carry, q):
        assert q.shape == SHAPE and len(q.tile) == 2
        return carry, (qjax.dequantize(q), qjax.matmul(x, q))

    _, (near, y) = jax.jit(lambda q: jax.lax.scan(layer, 0, q))(together)
    for i, q in enumerate(one_by_one):
        np.testing.assert_array_equal(near[i], qjax.dequantize(q))
        np.testing.assert_allclose(y[i], qjax.matmul(x, q), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(jax.vmap(qjax.dequantize)(together), near)


@pytest.mark.parametrize("shape", [(128, 128), (256, 128), (128, 256), (256, 384), (64, 48)])
@pytest.mark.parametrize("name", ["fp8-block", "fp8-dynamic", "fp8-dynamic-tensor", "mxfp8-a8"])
def test_a_scheme_is_told_whatever_the_shape(name, shape):
    assert qjax.quantize(jnp.ones(shape), name).scheme.name == name


def test_shows_itself_whatever_its_leaves_are(weight):
    q = qjax.quantize(weight, "w3a16-g16")
    for leaf in (None, "x", jax.ShapeDtypeStruct((2,), "int8")):
        assert repr(jax.tree.map(lambda _, leaf=leaf: leaf, q)).startswith("QTensor(int3, shape=(")


def test_gradients_flow_to_scales_not_to_codes(weight):
    q = qjax.quantize(weight, "w4a16-g16-asym")
    gradient = jax.grad(lambda q: qjax.dequantize(q).sum(), allow_int=True)(q)
    assert jax.tree.structure(gradient) == jax.tree.structure(q)
    assert gradient.codes.dtype == gradient.zero.dtype == jax.dtypes.float0
    expected = qtensor.centred(q).reshape(4, 16, 6).sum(1)
    np.testing.assert_allclose(gradient.scale, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "name", ["w4a16-g16", "w4a16-g16-asym", "w8a16-channel", "w3a16-g16", "mxfp4", "w8a8"]
)
@pytest.mark.parametrize("spec", [P(None, "x"), P("x", None)], ids=["columns", "rows"])
def test_shard_map(name, spec, rng):
    """Each device sees its half of the array, where scales split as the codes do."""
    w = jnp.asarray(rng.standard_normal((64, 16)), jnp.float32)
    q = qjax.quantize(w, name)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    by_row = spec[0] == "x"
    local = (32, 16) if by_row else (64, 8)
    # One scale a channel serves all rows: it stays whole where rows are split.
    specs = jax.tree.map(lambda leaf: P() if leaf.shape[0] == 1 and by_row else spec, q)

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(specs,), out_specs=spec)
    def dequantize(q):
        assert q.shape == local
        return qjax.dequantize(q)

    np.testing.assert_array_equal(dequantize(q), qjax.dequantize(q))
    sharded = jax.tree.map(
        lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), q, specs
    )
    assert sharded.shape == (64, 16) and same(sharded, q)
    x = jnp.asarray(rng.standard_normal((3, 64)), jnp.float32)
    np.testing.assert_allclose(
        jax.jit(qjax.matmul)(x, sharded), qjax.matmul(x, q), rtol=1e-5, atol=1e-5
    )
