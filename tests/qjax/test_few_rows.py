# SPDX-License-Identifier: Apache-2.0
"""The GPU's decode product is one of arrays, so any machine can check what it computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import ops

SCHEMES = [
    "w4a16-g32",
    "w4a16-g32-asym",
    "w4a16-channel",
    "w8a16-channel-asym",
    "w8a16-tensor",
    "fp8-a16",
]


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_is_the_product_with_the_dequantized_weight(name, dtype, rng, decoded):
    weight = jnp.asarray(rng.standard_normal((128, 24)) * 0.1 + 0.02, jnp.float32)
    q = qjax.quantize(weight, name)
    for shape in [(128,), (1, 128), (3, 2, 128), (20, 128)]:
        x = jnp.asarray(rng.standard_normal(shape), dtype)
        numbers = (((len(shape) - 1,), (0,)), ((), ()))
        y = jax.jit(ops.few_rows, static_argnums=(2, 3))(x, q, numbers, None)
        exact = np.asarray(x, np.float64) @ decoded(q)
        magnitude = np.abs(np.asarray(x, np.float64)) @ np.abs(decoded(q))
        assert y.dtype == jnp.float32
        # Codes and activations are exact in their dtype; what is left are float32 sums of 128, and with
        # a zero the difference of two of them.
        assert (np.abs(y - exact) <= 8 * 128 * 2.0**-24 * (magnitude + 1)).all()


def test_any_axes_in_any_place(rng, decoded):
    weight = jnp.asarray(rng.standard_normal((3, 5, 64)), jnp.float32)
    q = qjax.quantize(weight, "w4a16-g16", axis=-1)
    x = jnp.asarray(rng.standard_normal((2, 64, 4)), jnp.float32)
    y = ops.few_rows(x, q, (((1,), (2,)), ((), ())), None)
    np.testing.assert_allclose(y, np.einsum("akb,hdk->abhd", x, decoded(q)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "rows", "taken"),
    [
        ("w4a16-g128", 1, True),
        ("w4a16-g128", 32, True),
        ("w4a16-g128", 33, False),  # the partial results outgrow half a bfloat16 weight
        ("w4a16-g32", 1, False),
        ("w4a16-channel", 64, True),
        ("nf4", 1, False),  # no type that XLA multiplies
        ("w3a16", 1, False),
    ],
)
def test_rule(name, rows, taken):
    q = qjax.quantize(jnp.ones((256, 8)), name)
    assert ops._is_few_rows(jnp.ones((rows, 256)), q, (((1,), (0,)), ((), ()))) is taken
