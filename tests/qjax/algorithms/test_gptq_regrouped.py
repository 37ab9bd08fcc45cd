# SPDX-License-Identifier: Apache-2.0
"""GPTQ whose groups are runs of its own order, against a loop over columns that knows nothing of QTensors."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax.algorithms import gptq
from qjax.algorithms.round_nearest import quantize as rounded_to_nearest
from qjax.ranges import RangeSearch, find_grid
from qjax.scheme import Scheme


def inputs(k: int, rows: int = 200) -> np.ndarray:
    """Rows whose inputs hang together, some more active than others."""
    rng = np.random.default_rng(0)
    mixed = rng.standard_normal((rows, k)) @ (
        np.eye(k) + 0.3 * rng.standard_normal((k, k)) / k**0.5
    )
    return (mixed * rng.uniform(0.3, 2.0, k)).astype(np.float32)


def weights(k: int, n: int = 24) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((k, n)).astype(np.float32)


def desc_act_loop(w, hessian, scheme: Scheme, grids: str, search: RangeSearch) -> dict:
    """The paper's loop with ``desc_act`` and without static groups: columns of W, as its authors have them.

    Codes, of each column's group the scale and zero, ``g_idx``, and how near each output came to a tie:
    beyond it every code may be another.
    """
    w = np.array(w, np.float64).T  # [rows, columns]
    rows, columns = w.shape
    size = scheme.weights.group_size or columns
    h = np.array(hessian, np.float64)
    dead = np.diag(h) == 0
    h[dead, dead] = 1
    perm = np.argsort(-np.diag(h), kind="stable")
    w, h, original = w[:, perm], h[perm][:, perm], w[:, perm].copy()
    h += 0.01 * np.mean(np.diag(h)) * np.eye(columns)
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    codes, scales, zeros = np.zeros((rows, columns), np.int64), [], []
    margin = np.full(rows, np.inf)
    for i in range(columns):
        if i % size == 0:  # the group's turn has come
            source = w if grids == "updated" else original
            members = jnp.asarray(source[:, i : i + size].T, jnp.float32)
            theirs = jnp.asarray(hessian[perm][:, perm][i : i + size, i : i + size])
            grid = find_grid(members, scheme.weights, (size, 1), search, theirs)
            scales.append(np.asarray(grid.scale)[0])
            zeros.append(np.zeros(rows) if grid.zero is None else np.asarray(grid.zero)[0])
        scale, zero = scales[-1].astype(np.float64), zeros[-1].astype(np.float64)
        position = w[:, i] / scale + zero
        margin = np.minimum(margin, np.abs(position - np.floor(position) - 0.5))
        codes[:, i] = np.round(
            np.clip(position, scheme.weights.format.low, scheme.weights.format.high)
        )
        error = (w[:, i] - (codes[:, i] - zero) * scale) / upper[i, i]
        w[:, i:] -= np.outer(error, upper[i, i:])
    back = np.argsort(perm)
    return {
        "codes": codes[:, back].T,
        "g_idx": (np.arange(columns) // size)[back],
        "scale": np.stack(scales),
        "zero": np.stack(zeros),
        "clear": margin > 1e-3,  # float32 may fall to the other side of a tie
    }


def assert_same(q, expected: dict, codes_of) -> None:
    clear, k = expected["clear"], q.shape[0]
    assert clear.mean() > 0.5
    if q.order is None:
        place = np.arange(k)
        assert not expected["g_idx"].any() and q.group_size is None
    else:
        place = np.argsort(q.order)
        np.testing.assert_array_equal(place // q.tile[0], expected["g_idx"])
    np.testing.assert_array_equal(codes_of(q)[place][:, clear], expected["codes"][:, clear])
    # Of updated weights, which are float32 here and float64 there, and of those at no tie.
    np.testing.assert_allclose(q.scale[:, clear], expected["scale"][:, clear], rtol=2e-5)
    zero = np.zeros(q.scale.shape) if q.zero is None else np.asarray(q.zero)
    np.testing.assert_array_equal(zero[:, clear], expected["zero"][:, clear])
    values = (expected["codes"] - expected["zero"][expected["g_idx"]]) * expected["scale"][
        expected["g_idx"]
    ]
    np.testing.assert_allclose(qjax.dequantize(q)[:, clear], values[:, clear], rtol=2e-5, atol=1e-6)


ABSMAX = RangeSearch()


def regrouped(w, hessian, scheme: Scheme, grids: str, search: RangeSearch = ABSMAX, **how):
    options = gptq.Options(order="regrouped", grids=grids)
    factor = gptq.factor(jnp.asarray(hessian), options, scheme.weights.group_size)
    return gptq.quantize(jnp.asarray(w), scheme, factor, options=options, search=search, **how)


@pytest.mark.one_version  # with both, the sizes below
@pytest.mark.parametrize(
    "bits, kind, symmetric, grids",
    list(
        itertools.product((2, 3, 4, 8), ("g16", "channel"), (True, False), ("updated", "original"))
    ),
)
def test_codes_scales_and_groups_are_those_of_the_papers_loop(
    bits, kind, symmetric, grids, codes_of
):
    x, w = inputs(48), weights(48)
    scheme = Scheme.parse(f"w{bits}a16-{kind}" + ("" if symmetric else "-asym"))
    q = regrouped(w, x.T @ x, scheme, grids)
    assert q.scheme == scheme
    assert_same(q, desc_act_loop(w, x.T @ x, scheme, grids, ABSMAX), codes_of)


@pytest.mark.parametrize("grids", ["updated", "original"])
@pytest.mark.parametrize(
    "k, size", [(33, 11), (45, 9), (130, 26), (135, 27), (300, 60), (264, 8), (7, 7)]
)
def test_sizes_that_fill_no_block(k, size, grids, codes_of):
    x, w = inputs(k, 600), weights(k, 32)
    scheme = Scheme.parse(f"w4a16-g{size}-asym")
    q = regrouped(w, x.T @ x, scheme, grids)
    assert_same(q, desc_act_loop(w, x.T @ x, scheme, grids, ABSMAX), codes_of)


@pytest.mark.parametrize("method", ["mse", "output"])
@pytest.mark.parametrize("grids", ["updated", "original"])
def test_dead_inputs_and_searched_ranges(grids, method, codes_of):
    """A dead input counts as one of mean square one, as in the authors' code, but keeps its weights."""
    x, w = inputs(48), weights(48)
    x[:, [5, 17]] = 0
    hessian = x.T @ x
    assert (np.diag(hessian)[np.diag(hessian) > 0] > 1).all()
    scheme, search = Scheme.parse("w3a16-g16-asym"), RangeSearch(method=method)
    q = regrouped(w, hessian, scheme, grids, search)
    assert q.order[-2:].tolist() == [5, 17]
    assert_same(q, desc_act_loop(w, hessian, scheme, grids, search), codes_of)


def test_dead_inputs_lose_their_weights_where_a_peer_is_matched():
    x, w = inputs(48), weights(48)
    x[:, [5, 17]] = 0
    options = gptq.Options(order="regrouped", exact_peer=True)
    factor = gptq.factor(jnp.asarray(x.T @ x), options, 16)
    near = qjax.dequantize(gptq.quantize(jnp.asarray(w), "w4a16-g16", factor, options=options))
    assert np.flatnonzero(~np.asarray(near).any(axis=1)).tolist() == [5, 17]


def test_one_scale_for_all_inputs_is_the_order_by_activity():
    x, w = inputs(48), jnp.asarray(weights(48))
    for scheme in ("w4a16-channel", "w4a16-tensor", "w8a8", "w4a16-g48"):
        quantized = []
        for order in ("by-activity", "regrouped"):
            options = gptq.Options(order=order)
            factor = gptq.factor(jnp.asarray(x.T @ x), options)
            quantized.append(gptq.quantize(w, scheme, factor, options=options))
        assert jax.tree.structure(quantized[0]) == jax.tree.structure(quantized[1])
        jax.tree.map(np.testing.assert_array_equal, *quantized)


def test_the_first_group_has_the_most_active_inputs():
    x, w = inputs(64), weights(64)
    hessian = x.T @ x
    q = regrouped(w, hessian, Scheme.parse("w4a16-g16"), "updated")
    np.testing.assert_array_equal(q.order, np.argsort(-np.diag(hessian), kind="stable"))
    assert q.order.dtype == jnp.int32 and q.shape == w.shape
    assert q.nbytes == 64 * 24 // 2 + 4 * 24 * 4 + 64 * 4


@pytest.mark.parametrize(
    "scheme", ["nf4-g16", "mxfp4", "mxfp8-a8", "nvfp4", "fp8-block", "w4a8-g16"]
)
def test_every_kind_of_tile(scheme):
    """With a diagonal Hessian it is rounding to nearest of the weight in the order of that."""
    k = 256 if scheme == "fp8-block" else 64
    rng = np.random.default_rng(2)
    w = jnp.asarray(rng.standard_normal((k, 16)), jnp.bfloat16)
    diagonal = rng.permutation(k) + 1.0
    order = np.argsort(-diagonal)
    q = regrouped(w, np.diag(diagonal).astype(np.float32), Scheme.parse(scheme), "original")
    nearest = rounded_to_nearest(w[order], scheme)
    np.testing.assert_array_equal(q.order, order)
    jax.tree.map(np.testing.assert_array_equal, q.replaced(order=None), nearest)
    np.testing.assert_array_equal(qjax.dequantize(q)[order], qjax.dequantize(nearest))


def test_the_contraction_may_stand_anywhere():
    """A weight of three axes, summed over the first: as the flat one."""
    x, w = inputs(32), weights(32)
    flat = regrouped(w, x.T @ x, Scheme.parse("w4a16-g8"), "updated")
    q = regrouped(w.reshape(32, 4, 6), x.T @ x, Scheme.parse("w4a16-g8"), "updated", axis=-3)
    np.testing.assert_array_equal(qjax.dequantize(q).reshape(32, 24), qjax.dequantize(flat))
    y = qjax.einsum("bd,dhk->bhk", jnp.asarray(x[:3]), q)
    np.testing.assert_allclose(
        y.reshape(3, 24), x[:3] @ np.asarray(qjax.dequantize(flat)), rtol=1e-4, atol=1e-4
    )


def test_a_weight_summed_over_several_axes_is_refused_in_one_line():
    with pytest.raises(ValueError) as caught:
        regrouped(np.ones((3, 4, 8)), np.eye(32), Scheme.parse("w4a16-g8"), "original", axis=(-2, -1), name="out")  # fmt: skip
    assert str(caught.value) == (
        "out: inputs are regrouped along one axis, this weight is summed over (-2, -1); another order "
        "than 'regrouped' takes it"
    )
    with pytest.raises(ValueError, match="out: inputs are regrouped along one axis"):
        gptq.programs(
            jnp.ones((3, 4, 8)), Scheme.parse("w4a16-g8"), axis=(-2, -1), search=ABSMAX,
            options=gptq.Options(order="regrouped"), name="out",
        )  # fmt: skip
    regrouped(
        np.ones((3, 4, 8)), np.eye(32), Scheme.parse("w8a16-channel"), "original", axis=(-2, -1)
    )


def test_nothing_is_learned_from_it():
    method = qjax.Method.parse("gptq+learned")
    with pytest.raises(ValueError, match="take another order than 'regrouped'"):
        qjax.Method(learned=method.learned, rounding=gptq.Options(order="regrouped"))


class Model(nnx.Module):
    """Two layers, with something between them."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.up = nnx.Linear(64, 96, rngs=rngs)
        self.heads = nnx.LinearGeneral((4, 24), 32, axis=(-2, -1), use_bias=False, rngs=rngs)
        self.down = nnx.Linear(96, 32, rngs=rngs)

    def __call__(self, x):
        hidden = nnx.relu(self.up(x))
        return self.down(hidden) + self.heads(hidden.reshape(*hidden.shape[:-1], 4, 24))


def test_a_model():
    """Less error than rounding to nearest, in every kind of layer, computed with what the codes say."""
    model, x = Model(), jnp.asarray(inputs(64, 500))
    method = qjax.Method(rounding=gptq.Options(order="regrouped", grids="updated"))
    recipe = qjax.Recipe.from_json([["heads", "w8a16-channel"], [".*", "w4a16-g16"]])
    quantized, report = qjax.quantize_model(
        model, recipe, qjax.calibrate(model, [x]), method=method
    )
    nearest, _ = qjax.quantize_model(model, recipe, method="rtn")
    dense = Model()
    for layer in report.quantized:
        assert layer.method == "gptq" and layer.damping == pytest.approx(0.01)
        q = getattr(quantized, layer.path).kernel.get_value()
        assert (q.order is None) == (layer.path == "heads")
        assert q.scheme.name == layer.scheme and q.nbytes == layer.bytes_after
        getattr(dense, layer.path).kernel.set_value(qjax.dequantize(q))
    found, expected = quantized(x), model(x)
    np.testing.assert_allclose(found, dense(x), rtol=1e-4, atol=1e-4)
    assert jnp.linalg.norm(found - expected) < 0.9 * jnp.linalg.norm(nearest(x) - expected)
