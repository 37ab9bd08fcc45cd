# SPDX-License-Identifier: Apache-2.0
"""The corrected product and its gradients against the formula in numpy, for every kind of layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax import low_rank
from qjax.lora import add_lora, merge_lora
from qjax.low_rank import Factors, KernelAxes

RNGS = nnx.Rngs(0)
EPSILON = float(jnp.finfo(jnp.float32).eps)

# A layer, the shape of an input, and its product as an einsum; the letters of the kernel by their use.
LAYERS = {
    "linear": (lambda: nnx.Linear(12, 8, rngs=RNGS), (3, 5, 12), "btk,kn->btn", ("", "k", "n")),
    "many inputs and outputs": (
        lambda: nnx.LinearGeneral((4, 6), (2, 5), axis=(-2, -1), rngs=RNGS),
        (3, 4, 6),
        "bij,ijmn->bmn",
        ("", "ij", "mn"),
    ),
    "batch axis": (
        lambda: nnx.LinearGeneral(6, 5, batch_axis={0: 3}, use_bias=False, rngs=RNGS),
        (3, 2, 6),
        "btk,bkn->btn",
        ("b", "k", "n"),
    ),
    "heads out": (
        lambda: nnx.Einsum("...d,dnh->...nh", (12, 2, 4), rngs=RNGS),
        (3, 5, 12),
        "btd,dnh->btnh",
        ("", "d", "nh"),
    ),
    "outputs first": (
        lambda: nnx.Einsum("btnh,ndh->btd", (2, 9, 4), rngs=RNGS),
        (3, 5, 2, 4),
        "btnh,ndh->btd",
        ("", "nh", "d"),
    ),
    "experts in the middle": (
        lambda: nnx.Einsum("etd,fed->tef", (7, 3, 12), rngs=RNGS),
        (3, 5, 12),
        "etd,fed->tef",
        ("e", "d", "f"),
    ),
}


def adapted(make, subscripts, rank=3, alpha=6.0):
    """A layer with random factors, and W and s A B as float64 arrays of its kernel's axes."""
    model = add_lora(nnx.Sequential(make()), rank, alpha, layers=".*")
    (layer,) = model.layers
    adapter = low_rank.adapter_of(layer)
    rng = np.random.default_rng(1)
    for variable in (adapter.lora_a, adapter.lora_b):
        variable.set_value(jnp.asarray(rng.standard_normal(variable.shape), jnp.float32))
    return layer, adapter, np.asarray(layer.kernel[...], np.float64)


def expected_correction(adapter, kernel_shape, letters, use):
    """s A B, whose axes go from lead, summed, free to where the kernel has them; in float64."""
    lengths = dict(zip(letters, kernel_shape, strict=True))
    lead, summed, free = use
    a = np.asarray(adapter.lora_a[...], np.float64).reshape(
        *(lengths[c] for c in lead + summed), -1
    )
    b = np.asarray(adapter.lora_b[...], np.float64)
    b = b.reshape(*(lengths[c] for c in lead), b.shape[-2], *(lengths[c] for c in free))
    return (
        adapter.alpha / adapter.rank * np.einsum(f"{lead}{summed}R,{lead}R{free}->{letters}", a, b)
    )


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_computes_what_its_merged_weight_does(kind):
    make, shape, subscripts, use = LAYERS[kind]
    layer, adapter, w = adapted(make, subscripts)
    letters = subscripts.partition("->")[0].split(",")[1]
    x = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    sum_ = w + expected_correction(adapter, w.shape, letters, use)
    bias = 0 if layer.bias is None else np.asarray(layer.bias[...], np.float64)
    expected = np.einsum(subscripts, x.astype(np.float64), sum_)
    run = nnx.jit(lambda layer, x: layer(x))
    ours = run(layer, jnp.asarray(x)) - bias
    np.testing.assert_allclose(ours, expected, rtol=0, atol=100 * EPSILON * np.abs(expected).max())
    # And the weight that it merges to is that sum, rounded once.
    merged = merge_lora(nnx.Sequential(layer)).layers[0]
    np.testing.assert_allclose(
        merged.kernel[...], sum_, rtol=0, atol=4 * EPSILON * np.abs(sum_).max()
    )
    assert low_rank.adapter_of(merged) is None and type(merged.kernel) is nnx.Param
    np.testing.assert_allclose(
        run(merged, jnp.asarray(x)) - bias,
        expected,
        rtol=0,
        atol=100 * EPSILON * np.abs(expected).max(),
    )


@pytest.mark.parametrize("scheme", ["nf4-g8", "w4a16-g8-asym", None])
def test_gradients_are_those_of_the_formula(scheme):
    r"""dA = s x^T (dy B^T),  dB = s (x A)^T dy,  dx = dy W^T + s (dy B^T) A^T."""
    model = nnx.Sequential(nnx.Linear(24, 16, rngs=RNGS))
    if scheme:
        model, _ = qjax.quantize_model(model, scheme)
    model = add_lora(model, 4, 2.0, layers=".*")
    (layer,) = model.layers
    adapter = low_rank.adapter_of(layer)
    rng = np.random.default_rng(0)
    adapter.lora_b.set_value(jnp.asarray(rng.standard_normal((4, 16)), jnp.float32))
    x, dy = (rng.standard_normal(shape).astype(np.float32) for shape in ((10, 24), (10, 16)))

    def inner(model, x):
        return jnp.sum(model(x) * dy)

    of_factors, of_x = nnx.jit(nnx.grad(inner, argnums=(nnx.DiffState(0, nnx.LoRAParam), 1)))(
        model, jnp.asarray(x)
    )
    kernel = layer.kernel[...]
    w = np.asarray(qjax.dequantize(kernel) if scheme else kernel, np.float64)
    a, b = (np.asarray(factor, np.float64) for factor in adapter.factors)
    found = of_factors.layers[0].dot_general
    assert len(jax.tree.leaves(of_factors)) == 2
    for ours, expected in (
        (found.lora_a[...], 0.5 * x.T @ (dy @ b.T)),
        (found.lora_b[...], 0.5 * (x @ a).T @ dy),
        (of_x, dy @ w.T + 0.5 * (dy @ b.T) @ a.T),
    ):
        np.testing.assert_allclose(
            ours, expected, rtol=0, atol=50 * EPSILON * np.abs(expected).max()
        )


def test_the_backward_pass_keeps_codes_and_not_weights():
    """What is kept for it are codes, scales, the factors and what flows from layer to layer."""
    model = nnx.Sequential(*(nnx.Linear(64, 64, use_bias=False, rngs=RNGS) for _ in range(3)))
    model, _ = qjax.quantize_model(model, "nf4")
    model = add_lora(model, 2, layers=".*")
    graphdef, factors, rest = nnx.split(model, nnx.LoRAParam, ...)
    x = jnp.ones((5, 64))
    _, pullback = jax.vjp(lambda factors: nnx.merge(graphdef, factors, rest)(x), factors)
    kept = {(leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(pullback)}
    assert ((64, 32), "uint8") in kept and ((64, 64), "float32") not in kept


def test_the_first_factors():
    axes = KernelAxes(lead=(0,), summed=(2,), free=(1,))
    factors = low_rank.initial(jax.random.key(0), (3, 40, 400), axes, 16, jnp.bfloat16)
    assert factors.a.shape == (3, 400, 16) and factors.b.shape == (3, 16, 40)
    assert factors.a.dtype == factors.b.dtype == jnp.bfloat16
    a = np.asarray(factors.a, np.float64)
    assert np.abs(a).max() <= 1 / 20 * (1 + 2**-8) and not np.asarray(factors.b).any()
    # 19200 draws: the variance of the square of a uniform one is 4/45 of its bound^4.
    deviation = np.sqrt(4 / 45 / a.size)
    assert abs((a**2).mean() * 400 - 1 / 3) < 4 * deviation
    assert abs(a.mean()) < 4 * np.sqrt(1 / 1200 / a.size)


def test_a_merged_weight_is_rounded_once_to_the_dtype_of_the_base():
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.standard_normal((64, 32)), jnp.bfloat16)
    q = qjax.quantize(w, "nf4")
    factors = Factors(
        *(jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((64, 4), (4, 32)))
    )
    axes = KernelAxes(lead=(), summed=(0,), free=(1,))
    ours = low_rank.merged(q, factors, 0.25, axes)
    wide = np.asarray(qjax.dequantize(q, jnp.float32), np.float64)
    exact = wide + 0.25 * np.asarray(factors.a, np.float64) @ np.asarray(factors.b, np.float64)
    assert ours.dtype == jnp.bfloat16
    # Half a unit in the last of eight places, and the rounding of the float32 sum.
    assert (
        np.abs(np.asarray(ours, np.float64) - exact) <= np.abs(exact) * (2.0**-8 + 1e-6) + 1e-6
    ).all()


@pytest.mark.parametrize("rank", [0, -1, 6])
def test_a_rank_must_fit_the_weight(rank):
    axes = KernelAxes(lead=(), summed=(0,), free=(1,))
    with pytest.raises(ValueError, match=rf"8 inputs and 5 outputs .* rank 1 to 5, got {rank}$"):
        low_rank.initial(jax.random.key(0), (8, 5), axes, rank)
