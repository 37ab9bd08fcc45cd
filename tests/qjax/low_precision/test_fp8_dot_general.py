# SPDX-License-Identifier: Apache-2.0
"""All three products are those of numpy on the same 8-bit floats, and histories those of plain Python."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.linen import fp8_ops

from qjax.low_precision import Histories, amax_history, fp8_dot_general

HIGH = {"e4m3": 448.0, "e5m2": 57344.0}
DTYPES = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
MATRICES = (((1,), (0,)), ((), ()))
# Shapes of both operands, dimension numbers.
CASES = {
    "matrices": ((6, 16), (16, 10), MATRICES),
    "tokens": ((2, 3, 16), (16, 10), (((2,), (0,)), ((), ()))),
    "two summed, crossed": ((4, 8, 6), (6, 5, 8), (((1, 2), (2, 0)), ((), ()))),
    "a batch": ((3, 4, 8), (8, 3, 5), (((2,), (0,)), ((0,), (1,)))),
    "two batches, crossed": ((2, 4, 8, 3), (3, 8, 5, 2), (((2,), (1,)), ((0, 3), (3, 0)))),
}


def numpy_quantized(x, name: str, reach: float | None = None) -> np.ndarray:
    """What an array becomes, float64: the definition, with the logarithm in float64."""
    x = np.asarray(x, np.float64)
    reach = np.abs(x).max() if reach is None else reach
    scale = 2.0 ** np.ceil(np.log2(reach / HIGH[name])) if reach else 1.0
    clipped = np.clip(x / scale, -HIGH[name], HIGH[name])
    return clipped.astype(np.float32).astype(DTYPES[name]).astype(np.float64) * scale


def numpy_product(a, b, numbers):
    return np.asarray(
        jax.lax.dot_general(jnp.asarray(a), jnp.asarray(b), numbers, precision="highest")
    )


def exact_vjp(x, w, g, numbers):
    product = functools.partial(jax.lax.dot_general, dimension_numbers=numbers, precision="highest")
    y, pull = jax.vjp(product, jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32))
    return y, *pull(jnp.asarray(g, jnp.float32))


@functools.partial(jax.jit, static_argnums=(3, 4))
def ours(x, w, g, numbers, margin=0, histories=None):
    def product(x, w, histories):
        return fp8_dot_general.dot_general(x, w, numbers, histories=histories, margin=margin)

    y, pull = jax.vjp(product, x, w, histories)
    return y, *pull(g)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_three_products(rng, case):
    """Each gradient uses the other operand as quantized forward, and g in e5m2, and nothing else is off."""
    x_shape, w_shape, numbers = case
    x, w = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in (x_shape, w_shape))
    shape = jax.eval_shape(lambda: jax.lax.dot_general(x, w, numbers)).shape
    g = jnp.asarray(1e-7 * rng.standard_normal(shape), jnp.float32)
    y, dx, dw, none = ours(x, w, g, numbers)
    assert none is None
    q_x, q_w, q_g = (
        numpy_quantized(x, "e4m3"),
        numpy_quantized(w, "e4m3"),
        numpy_quantized(g, "e5m2"),
    )
    want_y, *_ = exact_vjp(q_x, q_w, g, numbers)
    _, want_dx, want_dw = exact_vjp(q_x, q_w, q_g, numbers)
    for got, want in ((y, want_y), (dx, want_dx), (dw, want_dw)):
        # Sums of at most 80 products of float32.
        bound = 80 * 2.0**-24 * np.abs(want).max()
        np.testing.assert_allclose(got, want, rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_dtypes(rng, dtype):
    """Results in the operands' dtype, rounded once; float16 does not overflow on the way."""
    x = jnp.asarray(rng.standard_normal((8, 256)), dtype)
    w = jnp.asarray(rng.standard_normal((256, 8)), dtype)
    g = jnp.asarray(rng.standard_normal((8, 8)), dtype)
    got = ours(x, w, g, MATRICES)[:3]
    assert [a.dtype for a in got] == [jnp.dtype(dtype)] * 3
    q = numpy_quantized(x, "e4m3"), numpy_quantized(w, "e4m3"), numpy_quantized(g, "e5m2")
    for a, want in zip(got, exact_vjp(*q, MATRICES), strict=True):
        eps = float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(a.astype(jnp.float32), want, rtol=eps, atol=1e-3 * eps)


def test_mixed_dtypes_and_the_result_asked_for():
    x, w = jnp.ones((2, 4), jnp.bfloat16), jnp.ones((4, 3), jnp.float32)
    product = functools.partial(fp8_dot_general.dot_general, dimension_numbers=MATRICES)
    assert jax.eval_shape(product, x, w).dtype == jnp.float32

    def both(x, w):
        y, pull = jax.vjp(functools.partial(product, preferred_element_type=jnp.bfloat16), x, w)
        return y, *pull(y)

    dtypes = [a.dtype for a in jax.eval_shape(both, x, w)]
    assert dtypes == [jnp.bfloat16, jnp.bfloat16, jnp.float32]


def test_what_the_formats_hold_is_exact(rng):
    x, w = (jnp.asarray(rng.integers(-8, 9, s), jnp.float32) for s in ((5, 16), (16, 7)))
    g = jnp.asarray(2.0 ** rng.integers(-3, 4, (5, 7)), jnp.float32)
    for got, want in zip(ours(x, w, g, MATRICES), exact_vjp(x, w, g, MATRICES), strict=False):
        np.testing.assert_array_equal(got, want)


def test_it_errs_no_more_than_flax_does(rng):
    """Flax's own FP8 product, told the very amaxes: scales that are powers of two cost nothing."""
    x, w = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((128, 256), (256, 96)))

    def history(t):
        return jnp.full(1, jnp.abs(t).max())

    theirs = fp8_ops.fp8_scaled_dot_general(
        x, w, MATRICES, preferred_element_type=jnp.float32, lhs_scale=jnp.ones(1),
        rhs_scale=jnp.ones(1), grad_scale=jnp.ones(1), lhs_amax_history=history(x),
        rhs_amax_history=history(w), grad_amax_history=jnp.zeros(1),
    )  # fmt: skip
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    y = jax.jit(lambda: fp8_dot_general.dot_general(x, w, MATRICES))()
    assert np.linalg.norm(y - exact) < 1.02 * np.linalg.norm(theirs - exact)
    assert np.linalg.norm(y - exact) < 0.05 * np.linalg.norm(exact)


@pytest.mark.parametrize("bad", [jnp.inf, -jnp.inf, jnp.nan])
@pytest.mark.parametrize("delayed", [False, True])
def test_what_is_not_finite_shows_and_does_no_other_harm(bad, delayed):
    x, w, g = jnp.ones((3, 4)), jnp.ones((4, 2)), jnp.ones((3, 2))
    histories = Histories(*[amax_history.pushed(amax_history.empty(2), jnp.float32(1))] * 3)
    histories = histories if delayed else None
    y, *_ = ours(x.at[1, 2].set(bad), w, g, MATRICES, 0, histories)
    np.testing.assert_array_equal(jnp.isnan(y).all(1), [False, True, False])
    np.testing.assert_array_equal(y[0], [4, 4])
    _, dx, dw, new = ours(x, w, g.at[2, 0].set(bad), MATRICES, 0, histories)
    np.testing.assert_array_equal(jnp.isnan(dx).all(1), [False, False, True])
    np.testing.assert_array_equal(jnp.isnan(dw).all(0), [True, False])
    assert new is None or float(amax_history.reach(new.gradient)) == 1


def test_zeros_and_tiny_numbers():
    y, dx, dw, _ = ours(jnp.zeros((2, 4)), jnp.full((4, 2), 1e-30), jnp.ones((2, 2)), MATRICES)
    assert (y == 0).all() and (dw == 0).all()
    np.testing.assert_allclose(dx, 2e-30, rtol=2.0**-4)


class TestDelayed:
    """Scales come from the steps before, and the gradient of the histories are the next ones."""

    def test_histories_and_scales_over_steps(self, rng):
        window, margin = 3, 1
        histories = Histories(*[amax_history.empty(window)] * 3)
        seen: list[list[float]] = [[], [], []]
        for step in range(6):
            x, w, g = (
                jnp.asarray(rng.standard_normal(s) * 10.0 ** rng.uniform(-2, 2), jnp.float32)
                for s in ((5, 8), (8, 6), (5, 6))
            )
            y, dx, dw, histories = ours(x, w, g, MATRICES, margin, histories)
            reaches = [2**margin * max(s[-window:], default=0) for s in seen]
            formats = ("e4m3", "e4m3", "e5m2")
            q = [numpy_quantized(*args) for args in zip((x, w, g), formats, reaches, strict=True)]
            want = exact_vjp(*q, MATRICES)
            for got, exact in zip((y, dx, dw), want, strict=True):
                np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-5 * np.abs(exact).max())
            for amaxes, x in zip(seen, (x, w, g), strict=True):  # noqa: B020
                amaxes.append(float(jnp.abs(x).max()))
            for amaxes, history in zip(seen, histories, strict=True):
                newest_first = amaxes[::-1][:window] + [0.0] * (window - step - 1)
                np.testing.assert_allclose(history, [*newest_first, 1], rtol=1e-6)

    def test_what_has_grown_saturates(self):
        """448 is the top of a history of 448; eight times as much is 448 too, and with a margin of 3 is not."""
        old = amax_history.pushed(amax_history.empty(1), jnp.float32(448))
        histories = Histories(old, old, old)
        x, w = jnp.full((1, 1), 8 * 448.0), jnp.full((1, 1), 448.0)
        results = [ours(x, w, x, MATRICES, margin, histories)[0].item() for margin in (0, 3)]
        assert results == [448 * 448, 8 * 448 * 448]

    def test_used_twice_in_one_step(self, rng):
        """The sum of both cotangents reads as a history of the same window, not as one twice as large."""
        histories = Histories(*[amax_history.empty(4)] * 3)
        w = jnp.eye(8)

        @jax.jit
        def stepped(x, histories):
            def loss(histories):
                h = fp8_dot_general.dot_general(x, w, MATRICES, histories=histories)
                return jnp.sum(fp8_dot_general.dot_general(h, w, MATRICES, histories=histories))

            return jax.grad(loss)(histories)

        for size in (64.0, 1.0, 1.0, 1.0):
            histories = stepped(jnp.full((2, 8), size), histories)
            assert float(amax_history.reach(histories.lhs)) == 128
        histories = stepped(jnp.full((2, 8), 1.0), histories)
        assert float(amax_history.reach(histories.lhs)) == 2


def test_under_vmap_and_remat(rng):
    """vmap scales each array by itself; rematerialization changes nothing."""
    x, w = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((3, 4, 8), (3, 8, 5)))
    product = functools.partial(fp8_dot_general.dot_general, dimension_numbers=MATRICES)
    got, one = jax.jit(jax.vmap(product))(x, w), jax.jit(product)
    for i in range(3):
        np.testing.assert_allclose(got[i], one(x[i], w[i]), rtol=1e-6)

    def squares(w):
        return jnp.sum(jnp.square(product(x[0], w)))

    plain, again = (jax.jit(jax.grad(f))(w[0]) for f in (squares, jax.checkpoint(squares)))
    np.testing.assert_allclose(plain, again, rtol=1e-6)


@pytest.mark.parametrize(
    ("subscripts", "shapes"),
    [
        ("...d,dhk->...hk", ((2, 3, 8), (8, 4, 5))),
        ("bthk,hkd->btd", ((2, 3, 4, 5), (4, 5, 6))),
        ("td,edf->tef", ((3, 8), (2, 8, 5))),
        ("etd,edf->tfe", ((2, 3, 8), (2, 8, 5))),
    ],
)
def test_einsum(rng, subscripts, shapes):
    x, w = (jnp.asarray(rng.integers(-8, 9, s), jnp.float32) for s in shapes)
    got = jax.jit(fp8_dot_general.einsum, static_argnums=0)(subscripts, x, w)
    np.testing.assert_array_equal(got, np.einsum(subscripts, x, w))


def test_bad_arguments():
    x, w = jnp.ones((2, 4)), jnp.ones((4, 3))
    with pytest.raises(ValueError, match="0 or more, got margin=-1"):
        fp8_dot_general.dot_general(x, w, MATRICES, margin=-1)
    with pytest.raises(NotImplementedError, match="constrain the result instead"):
        fp8_dot_general.dot_general(x, w, MATRICES, out_sharding=jax.sharding.PartitionSpec())
    with pytest.raises(ValueError, match="need two operands"):
        fp8_dot_general.einsum("ab", x, w)
