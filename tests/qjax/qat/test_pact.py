# SPDX-License-Identifier: Apache-2.0
"""PACT's value and gradients are the paper's closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.qat.pact import pact


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_value_and_gradients(bits: int) -> None:
    rng = np.random.default_rng(bits)
    alpha = np.float32(1.7)
    x = np.concatenate([rng.uniform(-1, 3, 40), [0.0, alpha]]).astype(np.float32)
    cotangent = rng.standard_normal(42).astype(np.float32)
    y, pullback = jax.vjp(lambda x, a: pact(x, a, bits), jnp.asarray(x), jnp.asarray(alpha))
    levels = 2**bits - 1
    expected = np.round(np.clip(x, 0, alpha) * levels / alpha) * alpha / levels
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    d_x, d_alpha = pullback(jnp.asarray(cotangent))
    np.testing.assert_array_equal(d_x, np.where((x >= 0) & (x < alpha), cotangent, 0))
    assert float(d_alpha) == pytest.approx(cotangent[x >= alpha].sum(), rel=1e-5)


def test_a_level_that_has_come_to_zero_cuts_all_off() -> None:
    assert pact(jnp.array([-1.0, 0.0, 2.0]), jnp.array(0.0), 4).tolist() == pytest.approx([0, 0, 0])


def test_a_code_has_a_bit() -> None:
    with pytest.raises(ValueError, match="at least one bit"):
        pact(jnp.ones(2), jnp.array(1.0), 0)
