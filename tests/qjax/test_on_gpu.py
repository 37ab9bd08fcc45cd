# SPDX-License-Identifier: Apache-2.0
"""What XLA's compiler for GPUs does to programs, and must not do to ours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import activations, formats, low_precision
from qjax.scheme import ActivationScheme

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="asks a GPU's compiler"),
]


@pytest.mark.parametrize("scheme", ["fp8-a16", "fp8-e5m2", "mxfp8", "nvfp4", "w4a16-g32"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_codes_made_and_read_in_one_program_are_rounded(scheme, dtype, rng):
    w = jnp.asarray(rng.standard_normal((256, 64)), dtype)
    apart = qjax.dequantize(qjax.quantize(w, scheme), jnp.float32)
    together = jax.jit(lambda w: qjax.dequantize(qjax.quantize(w, scheme), jnp.float32))(w)
    np.testing.assert_array_equal(together, apart)


@pytest.mark.parametrize("fmt", [formats.E4M3, formats.E2M1, formats.INT8])
def test_activations_too(fmt, rng):
    x, scheme = (
        jnp.asarray(rng.standard_normal((8, 256)), jnp.float32),
        ActivationScheme(format=fmt),
    )
    together = jax.jit(lambda x: activations.fake_quantize(x, scheme, (-1,)))(x)
    codes = activations.quantize(x, scheme, (-1,))
    np.testing.assert_allclose(together, activations.dequantize(codes), rtol=1e-6)
    assert float(jnp.abs(together - x).max()) > 1e-3


@pytest.mark.parametrize("scheme", ["w4a16-g16", "w4a16-g32-asym", "w4a16-channel", "w4a8-g32"])
@pytest.mark.parametrize("shape", [(32, 32), (32, 48), (64, 32), (64, 96), (128, 32), (256, 384)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_with_small_int4_weights(scheme, shape, dtype, rng):
    w = qjax.quantize(jnp.asarray(rng.standard_normal(shape), jnp.float32), scheme)
    dense = np.asarray(qjax.dequantize(w), np.float64)
    product = jax.jit(lambda x, w: qjax.matmul(x, w, implementation="xla"))
    by_user = jax.jit(lambda x, w: x @ qjax.dequantize(w, x.dtype))
    for rows in ((1,), (1, 1), (2,), (5,), (40,)):
        x = jnp.asarray(rng.standard_normal((*rows, shape[0])), dtype)
        exact = np.asarray(x, np.float64) @ dense
        for found in (product(x, w), by_user(x, w)):
            assert np.abs(np.asarray(found, np.float64) - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize("second", ["blocks", "float16"])
def test_moments_in_8_bits_are_those_of_a_cpu(second, rng):
    """Many steps in one program, with the same random numbers; a few lie at the edge of a chance."""
    optimizer = low_precision.scale_by_adam_8bit(second=second)
    size = np.exp(2 * rng.standard_normal((64, 256)))
    gradients = (rng.standard_normal((200, 64, 256)) * size).astype(np.float32)

    @jax.jit
    def run(gradients):
        def step(state, gradient):
            updates, state = optimizer.update({"w": gradient}, state)
            return state, updates["w"]

        return jax.lax.scan(step, optimizer.init({"w": gradients[0]}), gradients)

    here, there = (
        run(jax.device_put(gradients, jax.devices(name)[0]))
        for name in (jax.default_backend(), "cpu")
    )
    for ours, theirs in zip(*map(jax.tree.leaves, (here[0], there[0])), strict=True):
        near = np.isclose(*(np.asarray(a, np.float64) for a in (ours, theirs)), rtol=1e-5)
        assert np.mean(near) > 0.98
    ours, theirs = (np.abs(np.asarray(updates)[-20:]) for _, updates in (here, there))
    np.testing.assert_allclose(ours.mean(), theirs.mean(), rtol=2e-3)
    np.testing.assert_allclose(np.quantile(ours, 0.99), np.quantile(theirs, 0.99), rtol=1e-2)
