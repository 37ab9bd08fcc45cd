# SPDX-License-Identifier: Apache-2.0
"""Products with quantized weights, against float64 and within a bound that the dtypes give.

With u the unit roundoff of a dtype, k the length of the sum, and S = sum |x| |w|:

    |y - exact|  <=  u(result) |y|  +  (k u(float32) + 4 u(float32) + r u(x)) S

The first term is the last rounding, the second the sum in float32 and the roundings of scales. r counts
the roundings of operands to x's dtype: 1 where the weight is dequantized to it, or is no whole number
or 8-bit float (nf4); 2 where quantized activations are dequantized too; 0 where codes are multiplied.
"""

import dataclasses
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import ops
from qjax.qtensor import QTensor
from qjax.scheme import Scheme

# scheme: r of the bound
SCHEMES = {
    "w4a16-g16": 1, "w4a16-g16-asym": 1, "w4a16-channel": 0, "w4a16-channel-asym": 0, "w4a16-tensor": 0,
    "w8a16-g32": 1, "w8a16-channel": 0, "w8a16-channel-asym": 0, "w3a16-g16": 1, "w3a16-channel": 0,
    "w2a16-g16-asym": 1, "nf4-g16": 1, "nf4-channel": 1, "w8a8": 0, "w4a8": 0, "w4a8-g16": 1,
    "w4a4-g16": 1, "w4a4-channel": 0, "w4afp8-g16": 1, "w4afp8-channel": 0,
    "fp8-dynamic": 0, "fp8-a16": 0, "fp8-block": 2, "fp8-e5m2": 0,
    "fp8-e5m2-tensor": 0, "mxfp4": 1, "mxfp4-a4": 2, "mxfp8": 1, "mxfp8-a8": 2, "nvfp4": 1,
}  # fmt: skip
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
K, N = 64, 6


def roundoff(dtype) -> float:
    return float(jnp.finfo(dtype).eps) / 2


def check(y, exact, magnitude, k, x_dtype, roundings):
    relative = (k + 4) * roundoff(jnp.float32) + roundings * roundoff(x_dtype)
    bound = roundoff(y.dtype) * (np.abs(exact) + relative * magnitude) + relative * magnitude
    of_bound = np.abs(np.asarray(y, np.float64) - exact) / bound
    assert of_bound.max() <= 1


def tokens(rng, shape, dtype=jnp.float32) -> jax.Array:
    x = rng.standard_normal(shape)
    x[..., 0] = np.abs(x).max(-1) * 1.01
    return jnp.asarray(x, dtype)


def off_ties(x, scheme, quantized_tokens) -> jax.Array:
    """Zero where the quotient by the scale lies on a tie: XLA, which multiplies by a rounded reciprocal,
    may go either way there. Short mantissas meet ties often: absmax / 2 is 63.5 steps. Powers of two
    divide exactly, and no tie is the largest of its group, so that the scales stay.
    """
    if scheme.scale_format == "e8m0":
        return x
    below, above = (quantized_tokens(np.asarray(x), scheme, nudge) for nudge in (-1e-6, 1e-6))
    return jnp.where(np.isclose(below, above, rtol=1e-5), x, 0)


def weight(rng, shape=(K, N)) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape) * 0.1 + 0.02, jnp.float32)


@pytest.mark.parametrize("name", SCHEMES)
def test_matmul(name, rng, decoded, quantized_tokens):
    q = qjax.quantize(weight(rng), name)
    xs = [tokens(rng, (2, 3, K), dtype) for dtype in DTYPES]
    if q.activations is not None:
        xs = [off_ties(x, q.activations, quantized_tokens) for x in xs]
        assert all((np.asarray(x) != 0).mean() > 0.9 for x in xs)
    w = decoded(q)
    ys = jax.jit(lambda xs: [qjax.matmul(x, q.astype(x.dtype)) for x in xs])(xs)
    for x, y in zip(xs, ys, strict=True):
        near = np.asarray(x, np.float64)
        if q.activations is not None:
            near = quantized_tokens(near, q.activations)
        assert y.shape == (2, 3, N) and y.dtype == x.dtype
        check(y, near @ w, np.abs(near) @ np.abs(w), K, x.dtype, SCHEMES[name])


# One of each row of the table in qjax/ops.py.
FORMS = [
    "w4a16-g8", "w8a16-channel-asym", "w8a8", "fp8", "w4a8-g8", "w4a16-tensor", "w4afp8-g8",
    "w4afp8-channel",
]  # fmt: skip
# subscripts, shape of x, shape of w, axes of w that are summed over; x's summed axes come last
EINSUMS = [
    ("bd,dh->bh", (3, 16), (16, 5), (-2,)),
    ("btd,dhk->bhtk", (2, 3, 16), (16, 5, 7), (-3,)),
    ("...d,hd->...h", (2, 3, 16), (5, 16), (-1,)),
    ("bthk,hkd->btd", (2, 3, 4, 8), (4, 8, 5), (-3, -2)),
    ("betd,edf->betf", (2, 3, 4, 16), (3, 16, 5), (-2,)),
    ("ebd,edf->fbe", (3, 2, 16), (3, 16, 5), (-2,)),
]


@pytest.mark.parametrize("name", FORMS)
def test_einsum(name, rng, decoded, quantized_tokens):
    cases = []
    for _, x_shape, w_shape, axes in EINSUMS:
        x = tokens(rng, x_shape)
        cases.append((x, qjax.quantize(weight(rng, w_shape), name, axis=axes)))
    ys = jax.jit(
        lambda cases: [qjax.einsum(s, *case) for (s, *_), case in zip(EINSUMS, cases, strict=True)]
    )(cases)
    for (subscripts, x_shape, w_shape, axes), (x, q), y in zip(EINSUMS, cases, ys, strict=True):
        near, w = np.asarray(x, np.float64), decoded(q)
        if q.activations is not None:
            flat = near.reshape(*x_shape[: len(x_shape) - len(axes)], -1)
            near = quantized_tokens(flat, q.activations).reshape(x_shape)
        k = int(np.prod([w_shape[a] for a in axes]))
        magnitude = np.einsum(subscripts, np.abs(near), np.abs(w))
        check(y, np.einsum(subscripts, near, w), magnitude, k, x.dtype, 1)


@pytest.mark.parametrize("k", [16, 32])
def test_activations_of_a_codebook_of_which_one_group_covers_a_token(
    k, rng, decoded, quantized_tokens
):
    """Their codes are indices, and no numbers to multiply."""
    scheme = Scheme.parse("mxfp4-a4")
    weights = dataclasses.replace(scheme.weights, group_size=16)
    q = qjax.quantize(weight(rng, (k, 5)), dataclasses.replace(scheme, weights=weights))
    x = tokens(rng, (3, k))
    near, w = quantized_tokens(np.asarray(x, np.float64), q.activations), decoded(q)
    check(qjax.matmul(x, q), near @ w, np.abs(near) @ np.abs(w), k, x.dtype, 1)


@pytest.mark.parametrize("name", FORMS)
def test_dot_general_is_that_of_lax(name, rng, decoded):
    """Batch axes first, then the free axes of x, then of w; and so for any order of axes."""
    w = weight(rng, (4, 3, 8, 5))
    numbers = (((0, 3), (2, 0)), ((2,), (1,)))  # sums over 8 and 4, batch 3
    q = qjax.quantize(w, name, axis=(0, 2))
    x = tokens(rng, (8, 6, 3, 4))
    y = jax.jit(lambda x, q: qjax.dot_general(x, q, numbers))(x, q)
    expected = jax.lax.dot_general(x, jnp.asarray(decoded(q), jnp.float32), numbers)
    assert y.shape == expected.shape == (3, 6, 5)
    coarse = {None: 1e-5, "int8": 0.02, "e4m3": 0.2}[q.activations and q.activations.format.name]
    np.testing.assert_allclose(y, expected, atol=coarse, rtol=0)


@pytest.mark.parametrize(
    "name", ["w4a16-g8", "w4a16-channel-asym", "fp8-e5m2", "w8a8", "w4a8-g8", "w4afp8-g8"]
)
def test_batch_axes_stacked_after_quantizing(name, rng):
    """Layers stacked leaf by leaf are a batch axis of the product."""
    qs = [qjax.quantize(weight(rng, (16, 5)), name) for _ in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *qs)
    x = tokens(rng, (3, 2, 16))
    y = jax.jit(lambda x, q: qjax.einsum("lbd,ldf->lbf", x, q))(x, stacked)
    np.testing.assert_allclose(
        y, np.stack([qjax.matmul(*pair) for pair in zip(x, qs, strict=True)]), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", ["w4a16-g8", "w8a16-channel", "w4a16-tensor", "nvfp4", "mxfp8"])
def test_a_weight_also_goes_the_other_way(name, rng, decoded):
    """Summed over an axis that it was not quantized along, it is dequantized."""
    q = qjax.quantize(weight(rng, (32, 16)), name)
    x = tokens(rng, (3, 16))
    y = qjax.dot_general(x, q, (((1,), (1,)), ((), ())))
    w = decoded(q).T
    check(
        y,
        np.asarray(x, np.float64) @ w,
        np.abs(np.asarray(x, np.float64)) @ np.abs(w),
        16,
        x.dtype,
        1,
    )


@pytest.mark.parametrize("name", ["w8a8", "fp8", "w4a8-g8", "w4afp8-g8", "fp8-block"])
def test_activations_cannot_go_the_other_way(name, rng):
    q = qjax.quantize(weight(rng, (32, 16)), name)
    with pytest.raises(
        ValueError, match=r"\[32, 16\] was quantized for .*axes \(-2,\).* over \(1,\)"
    ) as caught:
        qjax.dot_general(jnp.ones((3, 16)), q, (((1,), (1,)), ((), ())))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("preferred", [jnp.float32, jnp.bfloat16, np.dtype("float32"), "float16"])
@pytest.mark.parametrize("name", [None, "w4a16-g16", "w8a16-channel", "w8a8", "fp8-block"])
def test_preferred_element_type(name, preferred, rng):
    w = weight(rng).astype(jnp.bfloat16)
    w = w if name is None else qjax.quantize(w, name)
    x = tokens(rng, (2, K), jnp.bfloat16)
    y = qjax.matmul(x, w, preferred_element_type=preferred)
    assert y.dtype == jnp.dtype(preferred)
    # More than bfloat16 was kept until the last rounding.
    exact = qjax.matmul(x, w, preferred_element_type=jnp.float32)
    np.testing.assert_array_equal(y, exact.astype(preferred))
    assert qjax.matmul(x, w).dtype == jnp.bfloat16
    assert qjax.matmul(x.astype(jnp.float32), w).dtype == jnp.float32


def test_plain_weights_multiply_as_in_jax(rng):
    x, w = tokens(rng, (2, 3, K)), weight(rng)
    np.testing.assert_allclose(qjax.matmul(x, w), x @ w, rtol=1e-6, atol=1e-6)
    y = qjax.matmul(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        qjax.einsum("...d,df->f...", x, w), jnp.einsum("...d,df->f...", x, w), rtol=1e-6, atol=1e-6
    )


# What is computed, read off the jaxpr


def equations(jaxpr):
    """All equations, those of inner jaxprs too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def traced(q: QTensor, x: jax.Array):
    return list(equations(jax.make_jaxpr(qjax.matmul)(x, q).jaxpr))


@pytest.mark.parametrize("name", ["w8a8", "w4a8", "w4a4-channel"])
def test_integer_products_are_summed_in_int32(name, rng):
    q = qjax.quantize(weight(rng), name)
    (dot,) = (e for e in traced(q, jnp.ones((2, K))) if e.primitive.name == "dot_general")
    assert [v.aval.dtype for v in dot.invars] == [jnp.int8, jnp.int8]
    assert dot.outvars[0].aval.dtype == jnp.int32
    text = jax.jit(qjax.matmul).lower(jnp.ones((2, K)), q).as_text()
    (line,) = (line for line in text.splitlines() if "dot_general" in line and "call" not in line)
    assert line.count("xi8>") == 2 and "xi32>" in line.rpartition("->")[2]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["w4afp8-g16", "w4afp8-channel", "fp8"])
def test_floats_of_8_bits_are_multiplied_in_a_type_that_has_products(name, dtype, rng):
    """XLA has none of int4 and e4m3 but a scalar loop."""
    q, x = qjax.quantize(weight(rng), name), jnp.ones((2, K), dtype)
    (dot,) = (e for e in traced(q, x) if e.primitive.name == "dot_general")
    assert {v.aval.dtype for v in dot.invars} <= {jnp.dtype(dtype), jnp.dtype(jnp.bfloat16)}
    assert dot.outvars[0].aval.dtype == jnp.float32
    # And the compiler does not take the conversions into the dot.
    computations = jax.jit(qjax.matmul).lower(x, q).compile().as_text().split("\n\n")
    (computation,) = (c for c in computations if " dot(" in c)
    (operands,) = re.findall(r" dot\((%\S+), (%\S+)\)", computation)
    for operand in operands:
        assert re.search(rf"{re.escape(operand)} = (f32|bf16|f16)\[", computation)


def test_integer_products_are_exact():
    """Sums beyond 2**24 that cancel: float32 would lose the rest."""
    k = 4096
    rng = np.random.default_rng(0)
    x = np.full((1, k), 127.0)
    x[0, k // 2 :] = rng.integers(1, 127, k // 2)
    x[0, 0] = 127  # the scale is one
    w = np.full((k, 1), 127.0)
    w[k // 2 :] = -127.0
    w[0] = 127.5
    q = qjax.quantize(jnp.asarray(w, jnp.float32), "w8a8")
    w_codes, x_codes = (
        np.asarray(q.codes, np.int64),
        np.clip(np.rint(x), -128, 127).astype(np.int64),
    )
    assert (
        float(q.scale[0, 0]) == 1
        and abs(int((x_codes[:, : k // 2] @ w_codes[: k // 2])[0, 0])) > 2**24
    )
    assert float(qjax.matmul(jnp.asarray(x, jnp.float32), q)[0, 0]) == int(
        (x_codes @ w_codes)[0, 0]
    )


@pytest.mark.parametrize("name", ["w4a16-channel", "w4a16-channel-asym", "w4a16-tensor", "w8a16-channel",
                                  "w3a16-channel", "fp8-a16", "fp8-e5m2", "w8a8", "fp8",
                                  "w4afp8-channel"])  # fmt: skip
def test_whole_scales_come_after_the_dot(name, rng):
    """Nothing of the weight's size is multiplied: the codes go into the dot, scales are put on y."""
    for x in (jnp.ones((2, K)), jnp.ones((2, K), jnp.bfloat16)):
        found = traced(qjax.quantize(weight(rng), name), x)
        names = [e.primitive.name for e in found]
        assert names.count("dot_general") == 1
        assert not any(
            e.primitive.name == "mul" and e.outvars[0].aval.shape == (K, N) for e in found
        )
        after = found[names.index("dot_general") + 1 :]
        assert any(e.primitive.name == "mul" and e.outvars[0].aval.shape == (2, N) for e in after)


# Transformations


@pytest.mark.parametrize(
    "name",
    [
        "w4a16-g16-asym",
        "w8a16-channel",
        "w8a8",
        "fp8",
        "fp8-block",
        "w4a8-g16",
        "w4afp8-g16",
        "w4afp8-channel",
        "mxfp4-a4",
        "nf4-g16",
    ],
)
def test_gradients(name, rng, decoded):
    """To x those of the dequantized product, straight through its rounding; and to the scales."""
    q = qjax.quantize(weight(rng), name)
    x, c = tokens(rng, (3, K)), jnp.asarray(rng.standard_normal((3, N)), jnp.float32)

    @jax.jit
    def gradients(x, q):
        return jax.grad(lambda x, q: (qjax.matmul(x, q) * c).sum(), argnums=(0, 1), allow_int=True)(
            x, q
        )

    to_x, to_q = gradients(x, q)
    np.testing.assert_allclose(to_x, np.asarray(c, np.float64) @ decoded(q).T, rtol=1e-4, atol=1e-5)
    if q.codes.dtype in (jnp.int4, jnp.int8, jnp.uint8):
        assert to_q.codes.dtype == jax.dtypes.float0
    else:  # JAX calls 8-bit floats differentiable; codes are not
        assert to_q.codes.dtype == q.codes.dtype and not np.asarray(to_q.codes, np.float32).any()
    if q.scale.dtype != jnp.float32:
        return
    per_element = np.asarray(x, np.float64).T @ np.asarray(c) * decoded(q)
    tiles = q.scale.shape
    wanted = per_element.reshape(tiles[0], K // tiles[0], tiles[1], N // tiles[1]).sum(
        (1, 3)
    ) / np.asarray(q.scale)
    np.testing.assert_allclose(to_q.scale, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["w4a16-g16", "w8a16-channel", "w8a8", "fp8-block"])
def test_vmap_over_x_and_over_nothing_of_w(name, rng):
    q = qjax.quantize(weight(rng), name)
    x = tokens(rng, (3, 2, K))
    y = jax.jit(jax.vmap(qjax.matmul, in_axes=(0, None)))(x, q)
    np.testing.assert_allclose(y, qjax.matmul(x, q), rtol=1e-5, atol=1e-5)


# Rows of a table


@pytest.mark.parametrize("name", ["w4a16-g8", "w4a16-g8-asym", "w8a16-channel", "w4a16-tensor", "nf4-g8", "fp8",
                                  "fp8-block", "mxfp4", "nvfp4"])  # fmt: skip
def test_take(name, rng, decoded):
    table = qjax.quantize(weight(rng, (150, 32)), name, axis=-1)
    every = jnp.asarray(rng.integers(-150, 150, (2, 5)))
    rows = jax.jit(qjax.take)(table, every)
    assert rows.shape == (2, 5, 32) and rows.dtype == jnp.float32
    np.testing.assert_array_equal(rows, qjax.dequantize(table)[every])
    assert qjax.take(table, jnp.int32(7)).shape == (32,)
    assert qjax.take(table, jnp.zeros((0,), jnp.int32)).shape == (0, 32)


def test_take_of_a_plain_table(rng):
    table = weight(rng, (9, 4))
    np.testing.assert_array_equal(qjax.take(table, jnp.array([[3, 8]])), table[jnp.array([[3, 8]])])


# What is refused


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize(("x", "w"), [((2, 5), (4, 3)), ((4,), (4, 3, 2)), ((2, 4), (4,))])
def test_matmul_refuses_shapes(x, w, quantized):
    w = jnp.ones(w)
    if quantized:
        w = qjax.quantize(w, "w8a16-channel")
    with pytest.raises(ValueError, match="^matmul of .*: need .*k, n.$") as caught:
        # The annotation of a plain matrix would refuse what our own line shall.
        inspect.unwrap(ops.matmul)(jnp.ones(x), w)
    message = str(caught.value)
    assert "\n" not in message and str(x) in message and str(w.shape) in message


@pytest.mark.parametrize(
    ("subscripts", "message"),
    [
        ("bd,dh", "two operands and '->'"),
        ("bd->bd", "two operands and '->'"),
        ("bd,dh,h->b", "two operands and '->'"),
        ("bd,d...->b...", "in the first operand only"),
        ("bcd,dh->bch", "operands have 2 and 2 axes"),
        ("bd,dhk->bhk", "operands have 2 and 2 axes"),
        ("dd,dh->h", "stands twice"),
        ("bd,dh->bhh", "stands twice"),
        ("bd,dh->b", "must stand in both"),
        ("bd,dh->h", "must stand in both"),
        ("bd,dh->bhz", "must stand in both"),
    ],
)
def test_einsum_refuses(subscripts, message):
    with pytest.raises(ValueError, match=message) as caught:
        qjax.einsum(subscripts, jnp.ones((2, 4)), qjax.quantize(jnp.ones((4, 3)), "w8a16-channel"))
    assert "\n" not in str(caught.value) and repr(subscripts) in str(caught.value)


@pytest.mark.parametrize("name", ["w4a16-g4", "w8a16-channel", "w8a8"])
def test_lengths_that_differ_are_refused_in_one_line(name):
    q = qjax.quantize(jnp.ones((8, 3)), name)
    for w in (q, qjax.dequantize(q)):
        with pytest.raises(ValueError, match=r"float32\[2, 4\] and .*\[8, 3\]: .*summed") as caught:
            qjax.einsum("bd,dh->bh", jnp.ones((2, 4)), w)
        assert "\n" not in str(caught.value) and "(4,) and (8,)" in str(caught.value)
    batched = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), q)
    with pytest.raises(ValueError, match=r"of a batch have lengths \(2,\) and \(3,\)"):
        qjax.einsum("ebd,edh->ebh", jnp.ones((2, 1, 8)), batched)


@pytest.mark.parametrize("name", [None, "w4a16-g16"])
def test_a_kernel_that_is_not_there_is_refused_with_the_numbers(name, rng):
    w = weight(rng) if name is None else qjax.quantize(weight(rng), name)
    with pytest.raises(
        NotImplementedError,
        match=r"float32\[2, 64\] x (int4|float32)\[64, 6\]: .*; 'auto' and 'xla' do$",
    ):
        qjax.matmul(jnp.ones((2, K)), w, implementation="pallas")
    for implementation in ("auto", "xla"):
        assert qjax.matmul(jnp.ones((2, K)), w, implementation=implementation).shape == (2, N)


def test_form_says_which_row_of_the_table_runs(rng):
    expected = {
        "w4a16-channel": "xla: dot of codes, then scale",
        "w4a16-g16": "xla: dequantize, then dot",
        "w8a8": "xla: int8 dot, then scales",
        "fp8": "xla: e4m3 dot, then scales",
        "w4a8-g16": "xla: dot of int8 and dequantized, then scale",
        "w4afp8-g16": "xla: dot of e4m3 and dequantized, then scale",
        "w4afp8-channel": "xla: e4m3 dot, then scales",
        "mxfp4-a4": "xla: dequantize both, then dot",
    }
    for name, words in expected.items():
        assert ops.form(qjax.quantize(weight(rng), name)) == words
    assert ops.form(weight(rng)) == "xla: dot"
