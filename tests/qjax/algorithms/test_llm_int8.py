# SPDX-License-Identifier: Apache-2.0
"""LLM.int8() against equation 8 of the paper in numpy, and in models."""

import flax.nnx as nnx
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.algorithms import llm_int8
from qjax.blockwise import Block, Blockwise
from qjax.method import Method
from qjax.scheme import Scheme

W8A8 = Scheme.parse("w8a8")


def decomposed(x: np.ndarray, w: np.ndarray, threshold: float) -> tuple[np.ndarray, ...]:
    """The paper's product in float64, its set of outliers, and the codes of the weight without them.

    The divisors are those of int8 in qjax: 127 for tokens, 127.5 for weights.
    """
    found = [h for h in range(x.shape[1]) if np.abs(x[:, h]).max() >= threshold]
    rest = [h for h in range(x.shape[1]) if h not in found]
    x_scale = np.abs(x[:, rest]).max(1, keepdims=True) / 127
    w_scale = np.abs(w[rest]).max(0, keepdims=True) / 127.5
    x_codes = np.clip(np.rint(x[:, rest] / x_scale), -128, 127)
    w_codes = np.clip(np.rint(w[rest] / w_scale), -128, 127)
    y = x[:, found] @ w[found] + x_scale * w_scale * (x_codes @ w_codes)
    return y, np.array(found, np.int32), w_codes


@pytest.mark.parametrize("outlying", [[], [5], [0, 17, 63]])
@pytest.mark.parametrize("tokens", [1, 9])
def test_the_product_is_exactly_that_of_equation_8(rng, tokens, outlying):
    """Scales are powers of two, so that float32 has room for every product and every sum."""
    x = (rng.integers(-126, 127, (tokens, 64)) + 0.25) / 32
    x[:, outlying] = rng.integers(192, 400, (tokens, len(outlying))) / 32
    w = (rng.integers(-126, 127, (64, 24)) + 0.25) / 128
    w[20, :] = rng.choice([-127.5, 127.5], 24) / 128
    w[outlying] *= 4
    x[:, 6] = 127 / 32  # each token's largest but for the outliers
    expected, found, codes = decomposed(x, w, 6.0)
    absmax = jnp.asarray(np.abs(x).max(0), jnp.float32)
    # Room for three of 64.
    chosen = llm_int8.choose(absmax, llm_int8.Options(capacity=3 / 64))
    np.testing.assert_array_equal(chosen.columns, found)
    assert chosen.columns.tolist() == outlying and chosen.crowded_out == 0
    q = llm_int8.quantize(jnp.asarray(w, jnp.float32), W8A8, chosen.columns, axis=(-2,))
    np.testing.assert_array_equal(np.delete(np.asarray(q.codes), found, axis=0), codes)
    np.testing.assert_array_equal(qjax.matmul(jnp.asarray(x, jnp.float32), q), expected)


def test_the_threshold_counts_and_there_is_room_for_the_largest():
    absmax = jnp.array([5.99, 6.0, 9.0, 7.0, 0.0, 9.0, 6.0, 1.0])
    for capacity, columns in (
        (1, [1, 2, 3, 5, 6]),
        (0.5, [1, 2, 3, 5]),
        (0.25, [2, 5]),
        (0.01, [2]),
    ):
        chosen = llm_int8.choose(absmax, llm_int8.Options(capacity=capacity))
        assert chosen.columns.tolist() == columns and chosen.crowded_out == 5 - len(columns)
    none = llm_int8.choose(absmax, llm_int8.Options(threshold=10.0))
    assert none.columns.tolist() == [] and none.columns.dtype == np.int32


def test_a_layer_without_outliers_is_rounded_to_nearest(rng):
    w = jnp.asarray(rng.standard_normal((16, 4)), jnp.float32)
    q = llm_int8.quantize(w, W8A8, np.array([], np.int32), axis=(-2,))
    assert q.columns is None and q.outliers is None
    np.testing.assert_array_equal(q.codes, qjax.quantize(w, "w8a8").codes)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_kept_are_numbers(value):
    w = jnp.ones((8, 4)).at[3, 1].set(value)
    with pytest.raises(ValueError, match="layers/0/up: weights of inputs with outliers"):
        llm_int8.quantize(w, W8A8, np.array([3]), axis=(-2,), name="layers/0/up")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.0}, "the threshold of outliers is positive, got 0.0"),
        ({"threshold": float("nan")}, "positive, got nan"),
        ({"capacity": 0.0}, r"lies in \(0, 1\], got 0.0"),
        ({"capacity": 1.5}, r"lies in \(0, 1\], got 1.5"),
    ],
)
def test_options_that_there_are_not(options, message):
    with pytest.raises(ValueError, match=message):
        llm_int8.Options(**options)


class Model(nnx.Module):
    """Two blocks whose input has outliers, always in the same places."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(32, 32, rngs=rngs)
        self.norms = nnx.List([nnx.RMSNorm(32, rngs=rngs) for _ in range(2)])
        self.blocks = nnx.List(
            [nnx.Sequential(norm, nnx.Linear(32, 32, rngs=rngs)) for norm in self.norms]
        )
        for i, norm in enumerate(self.norms):
            norm.scale.set_value(jnp.ones(32).at[jnp.array([4 + i, 20])].set(60.0))
            kernel = self.blocks[i].layers[1].kernel
            kernel.set_value(kernel.get_value() / norm.scale.get_value()[:, None])

    def __call__(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block(x)
        return x


def apply(block, x, context):
    del context
    return x + block(x)


def chain(model: Model, length: int) -> Blockwise:
    del length
    blocks = tuple(
        Block(path=f"blocks/{i}", module=block, context=None)
        for i, block in enumerate(model.blocks)
    )
    return Blockwise(blocks=blocks, enter=model.embed, apply=apply)


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(nnx.Rngs(0))


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 32, (6, 16)).astype(np.int32)


def test_a_model_whose_activations_have_outliers(model, tokens):
    exact = np.asarray(model(tokens))
    errors, reports = {}, {}
    for method in ("rtn", "llm-int8"):
        near, reports[method] = qjax.quantize_sequentially(
            model, chain, tokens, "w8a8", method=method
        )
        errors[method] = np.linalg.norm(near(tokens) - exact) / np.linalg.norm(exact)
    assert errors["llm-int8"] < 0.2 * errors["rtn"]
    held = [(layer.path, layer.method, layer.outliers) for layer in reports["llm-int8"].quantized]
    assert held == [("blocks/0/layers/1", "llm-int8", 2), ("blocks/1/layers/1", "llm-int8", 2)]
    assert all(layer.bytes_after == 32 * 32 + 32 * 4 + 2 * 32 * 4 + 2 * 4 for layer in reports["llm-int8"].quantized)  # fmt: skip
    assert all(layer.outliers is None for layer in reports["rtn"].layers)


def test_a_model_at_once(model, tokens):
    observed = qjax.calibrate(model, [tokens], hessians=False)
    once, report = qjax.quantize_model(model, "w8a8", observed, method="llm-int8")
    assert [layer.outliers for layer in report.quantized] == [2, 2]
    columns = once.blocks[1].layers[1].kernel.get_value().columns
    assert columns.tolist() == [5, 20]


def test_what_it_is_not_for(model, tokens):
    recipe = qjax.Recipe.from_json([["blocks/0/.*", "w8a8-g16"], [".*", "w4a8"]])
    for scheme in ("w4a16-g8", "w8a16-channel", "w4a8", "fp8-dynamic", recipe):
        with pytest.raises(ValueError, match=r"it is for w8a8 \(with -gN or -tensor\), not for "):
            qjax.quantize_sequentially(model, chain, tokens, scheme, method="llm-int8")
    with pytest.raises(ValueError, match="not for w4a8"):
        qjax.quantize_model(model, "w4a8", qjax.calibrate(model, [tokens]), method="llm-int8")
    with pytest.raises(ValueError, match="stands by itself"):
        Method(outliers=llm_int8.Options(), rounding=Method.parse("gptq").rounding)
    for scheme in ("w8a8", "w8a8-g16", "w8a8-tensor"):
        llm_int8.check(Scheme.parse(scheme))
