# SPDX-License-Identifier: Apache-2.0
"""Dynamic quantization of activations, against numpy, token by token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import activations, formats
from qjax.scheme import ActivationScheme

SCHEMES = {
    "int8": ActivationScheme(format=formats.INT8),
    "int4": ActivationScheme(format=formats.INT4),
    "e4m3": ActivationScheme(format=formats.E4M3),
    "e4m3 in groups": ActivationScheme(format=formats.E4M3, group_size=16),
    "e2m1 mx": ActivationScheme(format=formats.E2M1, group_size=16, scale_format="e8m0"),
    "e4m3 mx": ActivationScheme(format=formats.E4M3, group_size=32, scale_format="e8m0"),
    "one group": ActivationScheme(format=formats.INT8, group_size=64),
    "a longer group": ActivationScheme(format=formats.INT8, group_size=128),
}


@functools.partial(jax.jit, static_argnums=(1, 2))
def quantized(x, scheme, axis):
    """Codes, scales and what they stand for."""
    q = activations.quantize(x, scheme, axis)
    assert q.format == scheme.format
    return q.codes, q.scale, activations.dequantize(q)


def tokens(rng, shape=(2, 3, 64)) -> np.ndarray:
    x = rng.standard_normal(shape) * np.exp(rng.standard_normal((*shape[:-1], 1)))
    x[..., ::16] = 1.01 * np.abs(x).max(-1, keepdims=True)
    return x.astype(np.float32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", SCHEMES)
def test_is_the_plain_rule(name, dtype, rng, quantized_tokens):
    scheme = SCHEMES[name]
    x = jnp.asarray(tokens(rng), dtype)
    codes, scale, near = quantized(x, scheme, (2,))
    size = min(scheme.group_size or 64, 64)
    assert scale.dtype == jnp.float32 and scale.shape == (2, 3, 64 // size)
    assert codes.dtype == scheme.format.dtype and codes.shape == x.shape
    # XLA may multiply by a rounded reciprocal instead of dividing: next to a tie either code is right.
    below, above = (
        quantized_tokens(np.asarray(x, np.float32), scheme, nudge) for nudge in (-4e-7, 4e-7)
    )
    assert (np.isclose(near, below, rtol=1e-6) | np.isclose(near, above, rtol=1e-6)).all()
    if scheme.scale_format == "e8m0":  # a power of two divides exactly, so ties are ties
        np.testing.assert_array_equal(near, quantized_tokens(np.asarray(x, np.float32), scheme))
    else:
        assert np.isclose(below, above, rtol=1e-6).mean() > 0.95


def test_one_scale_over_several_axes(rng):
    x = tokens(rng, (4, 5, 6))
    _, scale, _ = quantized(jnp.asarray(x), SCHEMES["int8"], (0, 2))
    np.testing.assert_allclose(scale, np.abs(x).max((0, 2), keepdims=True) / 127, rtol=1e-6)


def test_zeros_stay_zeros():
    for scheme in SCHEMES.values():
        _, scale, near = quantized(jnp.zeros((2, 64)), scheme, (1,))
        assert (np.asarray(scale) == 1).all() and not np.asarray(near).any()


def test_infinities_saturate_and_move_nothing_else():
    x = jnp.array([[1.0, 2.0, -jnp.inf, 0.5], [1.0, 2.0, 0.0, 0.5]])
    codes, scale, _ = quantized(x, SCHEMES["int8"], (1,))
    np.testing.assert_array_equal(scale[0], scale[1])
    assert codes[0, 2] == -128 and (codes[0, :2] == codes[1, :2]).all()


@pytest.mark.parametrize("name", SCHEMES)
def test_nan_is_not_hidden(name):
    """A token with NaN gives NaN; the others do not."""
    x = jnp.ones((2, 64)).at[0, 3].set(jnp.nan)
    near = np.asarray(quantized(x, SCHEMES[name], (1,))[2])
    assert np.isnan(near[0]).any() and np.isfinite(near[1]).all()


def test_a_group_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="groups of 16, which does not divide the 24 elements"):
        activations.quantize(jnp.ones((2, 24)), SCHEMES["e4m3 in groups"], (1,))
