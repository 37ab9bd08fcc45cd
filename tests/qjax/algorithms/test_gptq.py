# SPDX-License-Identifier: Apache-2.0
"""GPTQ against the paper's own loop: one column after the other, in float64, the same codes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import device
from qjax import kernel_rounding, qtensor, statistics
from qjax.algorithms import compensated_rounding, gptq, round_nearest
from qjax.ranges import RangeSearch, find_grid
from qjax.scheme import Scheme

ORDERS = [("as-is", "original"), ("as-is", "updated"), ("by-activity", "original"), ("by-group", "original"), ("by-group", "updated")]  # fmt: skip


def inputs(k: int, rows: int = 200, seed: int = 0) -> np.ndarray:
    """Rows whose inputs hang together, some more active than others."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((rows, k)) @ (
        np.eye(k) + 0.3 * rng.standard_normal((k, k)) / k**0.5
    )
    return (mixed * rng.uniform(0.3, 2.0, k)).astype(np.float32)


def paper_order(diagonal: np.ndarray, order: str, group: int) -> list[int]:
    k = len(diagonal)
    if order == "as-is":
        return list(range(k))
    if order == "by-activity":
        return sorted(range(k), key=lambda i: -diagonal[i])
    groups = [range(first, first + group) for first in range(0, k, group)]
    groups.sort(key=lambda members: -np.mean([diagonal[i] for i in members]))
    return [i for members in groups for i in sorted(members, key=lambda i: -diagonal[i])]


def paper_loop(w, hessian, scheme: Scheme, options: gptq.Options) -> tuple[np.ndarray, np.ndarray]:
    """Algorithm 1 without its blocks: a column is rounded, and all later ones make up for it at once.

    Also how near each output came to a tie of rounding: beyond it every code may be another.
    """
    weights = scheme.weights
    k, n = w.shape
    group = weights.group_size or k
    h = np.array(hessian, np.float64)
    dead = np.diag(h) == 0
    h[dead, dead] = 1
    h += options.damping * np.mean(np.diag(h)) * np.eye(k)
    order = paper_order(np.diag(hessian) + dead, options.order, group)
    upper = np.linalg.cholesky(np.linalg.inv(h[np.ix_(order, order)])).T
    now = np.array(w, np.float64)
    codes = np.zeros((k, n), np.int64)
    step, zero = {}, {}
    margin = np.full(n, np.inf)
    for place, i in enumerate(order):
        tile = i // group
        if tile not in step:
            source = w if options.grids == "original" else now.astype(np.float32)
            members = jnp.asarray(source[tile * group : (tile + 1) * group])
            grid = find_grid(members, weights, (group, 1), RangeSearch())
            step[tile] = np.asarray(grid.step, np.float64)[0]
            zero[tile] = 0 if grid.zero is None else np.asarray(grid.zero, np.float64)[0]
        position = now[i] / step[tile] + zero[tile]
        margin = np.minimum(margin, np.abs(position - np.floor(position) - 0.5))
        codes[i] = np.round(np.clip(position, weights.format.low, weights.format.high))
        error = (now[i] - (codes[i] - zero[tile]) * step[tile]) / upper[place, place]
        for later, j in enumerate(order[place + 1 :], start=place + 1):
            now[j] -= upper[place, later] * error
    return codes, margin


def assert_same(codes: np.ndarray, loop: tuple[np.ndarray, np.ndarray]) -> None:
    expected, margin = loop
    clear = margin > 1e-3  # float32 may fall to the other side of a tie
    assert clear.mean() > 0.5
    np.testing.assert_array_equal(codes[:, clear], expected[:, clear])


@pytest.mark.one_version  # with both, blocks of every size against the same loop
@pytest.mark.parametrize(
    "bits, kind, symmetric, options",
    list(itertools.product((2, 3, 4, 8), ("g16", "channel"), (True, False), ORDERS)),
)
def test_codes_are_those_of_the_papers_loop(bits, kind, symmetric, options, codes_of):
    k, n = 48, 24
    x = inputs(k)
    w = np.random.default_rng(1).standard_normal((k, n)).astype(np.float32)
    scheme = Scheme.parse(f"w{bits}a16-{kind}" + ("" if symmetric else "-asym"))
    chosen = gptq.Options(order=options[0], grids=options[1])
    hessian = x.T @ x
    factor = gptq.factor(jnp.asarray(hessian), chosen, scheme.weights.group_size)
    q = gptq.quantize(jnp.asarray(w), scheme, factor, options=chosen)
    assert_same(codes_of(q), paper_loop(w, hessian, scheme, chosen))


@pytest.mark.parametrize("strip", [1, 8])
@pytest.mark.parametrize("k", [2, 127, 128, 129, 300])
def test_blocks_and_strips_do_not_show(k, strip, codes_of, monkeypatch):
    jax.clear_caches()  # of another strip
    monkeypatch.setattr(compensated_rounding, "_STRIPS", {"cpu": strip})
    x, w = inputs(k, 400), np.random.default_rng(2).standard_normal((k, 16)).astype(np.float32)
    scheme, options = Scheme.parse("w4a16-channel"), gptq.Options()
    factor = gptq.factor(jnp.asarray(x.T @ x), options)
    q = gptq.quantize(jnp.asarray(w), scheme, factor)
    assert_same(codes_of(q), paper_loop(w, x.T @ x, scheme, options))


@pytest.mark.parametrize(("order", "grids"), ORDERS)
@pytest.mark.parametrize(("k", "parts"), [(16, 1), (48, 3), (136, 4)])
def test_parts_of_blocks_do_not_show(k, parts, order, grids, codes_of, monkeypatch):
    jax.clear_caches()  # of other parts
    monkeypatch.setattr(gptq, "BLOCK", 8)
    monkeypatch.setattr(compensated_rounding, "_LEAST_BLOCKS", 2)
    assert len(compensated_rounding._parts(k, 8)) == parts
    x, w = inputs(k, 800), np.random.default_rng(4).standard_normal((k, 12)).astype(np.float32)
    scheme, options = Scheme.parse("w4a16-g8-asym"), gptq.Options(order=order, grids=grids)
    factor = gptq.factor(jnp.asarray(x.T @ x), options, 8)
    q = gptq.quantize(jnp.asarray(w), scheme, factor, options=options)
    assert_same(codes_of(q), paper_loop(w, x.T @ x, scheme, options))


@pytest.mark.gpu
@pytest.mark.skipif(not device.is_hopper(), reason="needs a Hopper GPU")
@pytest.mark.parametrize("scheme", ["w4a16-g128", "w3a16-g32-asym", "w8a16-channel"])
@pytest.mark.parametrize(
    ("order", "grids"), [*ORDERS, ("regrouped", "original"), ("regrouped", "updated")]
)
def test_a_kernel_gives_the_codes_of_xla(scheme, order, grids, monkeypatch):
    """But for weights at a tie, whose columns part there: float32 sums have another order."""
    k, n = 512, 300
    w = jnp.asarray(np.random.default_rng(2).standard_normal((k, n)), jnp.float32)
    x, options = jnp.asarray(inputs(k, rows=2000)), gptq.Options(order=order, grids=grids)
    size = Scheme.parse(scheme).weights.group_size
    factor = gptq.factor(jnp.matmul(x.T, x, precision="highest"), options, size)

    def quantized():
        return gptq.quantize(w, scheme, factor, options=options)

    by_kernel = quantized()
    monkeypatch.setattr(kernel_rounding, "is_there", lambda w: False)
    by_xla = quantized()
    equal = np.asarray(qtensor.unpacked(by_kernel)) == np.asarray(qtensor.unpacked(by_xla))
    assert equal.mean() > 0.99 and (equal.all(axis=0)).mean() > 0.9
    errors = [
        float(jnp.linalg.norm(x @ (qtensor.dequantize(q, jnp.float32) - w)))
        for q in (by_kernel, by_xla)
    ]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


def test_a_diagonal_hessian_rounds_to_nearest(codes_of):
    """Nothing can make up for an error when inputs do not hang together."""
    w = jnp.asarray(np.random.default_rng(3).standard_normal((64, 16)), jnp.bfloat16)
    factor = gptq.factor(jnp.diag(jnp.arange(1.0, 65.0)))
    for scheme in ("w4a16-g32", "nf4-g32", "mxfp4", "nvfp4", "fp8-a16", "w3a16-tensor"):
        plain = round_nearest.quantize(w, scheme)
        q = gptq.quantize(w, scheme, factor)
        np.testing.assert_array_equal(codes_of(q), codes_of(plain), err_msg=scheme)
        assert q.scheme == plain.scheme and q.scale.dtype == plain.scale.dtype


def test_several_contraction_axes_are_flattened(codes_of):
    x = inputs(32)
    w = np.random.default_rng(4).standard_normal((3, 4, 8)).astype(np.float32)
    factor = gptq.factor(jnp.asarray(x.T @ x))
    q = gptq.quantize(jnp.asarray(w), "w4a16-g8", factor, axis=(-2, -1))
    flat = gptq.quantize(jnp.asarray(w.reshape(3, 32).T), "w4a16-g8", factor)
    np.testing.assert_array_equal(codes_of(q).reshape(3, 32).T, codes_of(flat))
    assert q.shape == (3, 4, 8) and q.axis == (-2, -1)


def test_dead_inputs_keep_their_nearest_codes_unless_a_peer_is_matched(codes_of):
    x = inputs(32)
    x[:, 5] = 0
    w = np.random.default_rng(5).standard_normal((32, 8)).astype(np.float32)
    hessian = jnp.asarray(x.T @ x)
    factor = gptq.factor(hessian)
    assert np.flatnonzero(factor.dead).tolist() == [5]
    ours = codes_of(gptq.quantize(jnp.asarray(w), "w4a16-channel", factor))
    nearest = codes_of(round_nearest.quantize(jnp.asarray(w), "w4a16-channel"))
    np.testing.assert_array_equal(ours[5], nearest[5])
    options = gptq.Options(exact_peer=True)
    peers = gptq.quantize(jnp.asarray(w), "w4a16-channel", factor, options=options)
    assert not codes_of(peers)[5].any()


@pytest.mark.parametrize(("exact_peer", "most"), [(True, 1e-6), (False, 1e-3)])
def test_factor_is_of_float64_where_a_peer_is_matched(exact_peer, most):
    """Its error, of a Hessian whose condition number is 20,000, and that it is float32 after all."""
    k = 256
    x = inputs(k, rows=1000, seed=9) @ np.diag(np.geomspace(10, 0.1, k)).astype(np.float32)
    x += 3 * x[:, :1]
    hessian = x.T @ x
    factor = gptq.factor(jnp.asarray(hessian), gptq.Options(exact_peer=exact_peer))
    order = np.asarray(factor.order)
    h = hessian.astype(np.float64)[np.ix_(order, order)]
    h += 0.01 * np.mean(np.diag(h)) * np.eye(k)
    assert np.linalg.cond(h) > 10_000
    exact = np.linalg.cholesky(np.linalg.inv(h)).T
    error = np.abs(np.asarray(factor.upper) - exact).max() / np.abs(exact).max()
    assert error < most and (exact_peer or error > 1e-6)
    assert factor.upper.dtype == factor.damping.dtype == jnp.float32


def test_damping_is_raised_until_the_hessian_holds():
    """One direction alone, seen a hundred million times: float32 cannot factorize it with 1 %."""
    direction = np.random.default_rng(6).standard_normal(256)
    indefinite = np.outer(direction, direction) - 0.05 * np.eye(256)
    factor = gptq.factor(jnp.asarray(indefinite, jnp.float32))
    assert 0.04 < float(factor.damping) < 0.2 and bool(jnp.isfinite(factor.upper).all())


@pytest.mark.parametrize(
    "change, line",
    [
        (lambda w, h: (w.at[3, 2].set(jnp.nan), h), "layer: NaN or an infinity among the weights"),
        (
            lambda w, h: (w, h.at[0, 0].set(jnp.nan)),
            "layer: the Hessian of its inputs is not finite",
        ),
        (lambda w, h: (w, h[:16, :16]), "layer: 32 inputs, but the Hessian is of 16"),
    ],
)
def test_what_cannot_be_quantized_is_named(change, line):
    w, hessian = change(jnp.ones((32, 4)), jnp.eye(32))
    with pytest.raises(ValueError, match=line):
        gptq.quantize(w, "w4a16-channel", gptq.factor(hessian), name="layer")


@pytest.mark.parametrize(
    "damping, order, grids, line",
    [
        (0.0, "as-is", "original", "damping is a share"),
        (1.0, "as-is", "original", "damping is a share"),
        (0.01, "by-activity", "updated", "the inputs of a group to follow each other"),
    ],
)
def test_options_out_of_range(damping, order, grids, line):
    with pytest.raises(ValueError, match=line):
        gptq.Options(damping=damping, order=order, grids=grids)


@pytest.mark.parametrize("k", [64, 80, 20])
def test_groups_are_taken_by_their_mean_the_last_of_them_may_be_short(k, size=32):
    diagonal = np.random.default_rng(k).integers(1, 6, k).astype(np.float32)  # with ties
    groups = [list(range(start, min(start + size, k))) for start in range(0, k, size)]
    groups.sort(key=lambda members: -np.mean(diagonal[members]))
    expected = [i for members in groups for i in sorted(members, key=lambda i: -diagonal[i])]
    factor = gptq.factor(jnp.diag(diagonal), gptq.Options(order="by-group"), size)
    assert factor.order.tolist() == expected


@pytest.mark.parametrize("order", ["as-is", "by-activity", "by-group"])
def test_blocks_that_the_shape_does_not_fill(order):
    x = inputs(160, 1000)
    w = jnp.asarray(np.random.default_rng(1).standard_normal((160, 96)), jnp.float32)
    hessian, options = jnp.asarray(x.T @ x), gptq.Options(order=order)
    q = gptq.quantize(w, "fp8-block", gptq.factor(hessian, options, 128), options=options)
    rounded = round_nearest.quantize(w, "fp8-block")
    np.testing.assert_array_equal(q.scale, rounded.scale)
    errors = [
        float(statistics.relative_output_error(w, qtensor.dequantize(some), hessian))
        for some in (q, rounded)
    ]
    assert q.scale.shape == (2, 1) and errors[0] < errors[1]


def test_updated_grids_of_one_scale_for_all_are_refused():
    options = gptq.Options(order="as-is", grids="updated")
    for scheme in ("w4a16-tensor", "nvfp4", "fp8-block"):
        with pytest.raises(
            ValueError, match="layer: grids of updated weights need scales of groups"
        ):
            gptq.quantize(
                jnp.ones((128, 128)), scheme, gptq.factor(jnp.eye(128), options), options=options,
                name="layer",
            )  # fmt: skip


def test_less_output_error_than_rounding():
    x = inputs(64, 1000)
    w = jnp.asarray(np.random.default_rng(7).standard_normal((64, 32)), jnp.float32)
    hessian = jnp.asarray(x.T @ x)
    candidates = {
        "gptq": gptq.quantize(w, "w4a16-g32", gptq.factor(hessian)),
        "rtn": round_nearest.quantize(w, "w4a16-g32"),
    }
    outputs, error = x @ np.asarray(w), {}
    for name, q in candidates.items():
        near = qtensor.dequantize(q)
        error[name] = float(statistics.relative_output_error(w, near, hessian))
        wrong = np.linalg.norm(x @ np.asarray(near) - outputs)
        assert error[name] == pytest.approx(wrong / np.linalg.norm(outputs), rel=1e-4)
    assert error["gptq"] < error["rtn"]
