# SPDX-License-Identifier: Apache-2.0
"""What trains and what is stored are the same numbers, in every scheme."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import Scheme, qtensor, quantize
from qjax.qat import form
from qjax.qat.form import Form

SCHEMES = [
    "w4a16-g32", "w3a16-g16-asym", "w2a16-channel", "w8a16-tensor-asym", "nf4-g32", "fp8-a16",
    "fp8-e5m2-tensor", "fp8-block", "mxfp4", "mxfp8", "nvfp4", "w8a8", "w4a8", "w4a4-g32",
]  # fmt: skip


def form_of(scheme: str, shape=(64, 6), dtype: str = "bfloat16") -> Form:
    return Form(
        scheme=Scheme.parse(scheme),
        axis=(-2,),
        shape=shape,
        dtype=dtype,
        scale_dtype=dtype,
        name="w",
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_follows_the_weight(scheme: str) -> None:
    w = jax.random.normal(jax.random.key(0), (64, 6))
    wanted = form_of(scheme)
    value, pullback = jax.vjp(lambda w: form.fake_quantize(w, wanted), w)
    q = form.quantize(w, wanted)
    np.testing.assert_array_equal(value, qtensor.dequantize(q, jnp.float32))
    assert q.scheme == quantize(w.astype(jnp.bfloat16), scheme).scheme and q.dtype == jnp.bfloat16
    cotangent = jax.random.normal(jax.random.key(1), w.shape)
    np.testing.assert_array_equal(pullback(cotangent)[0], cotangent)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_learned_grid_begins_with_the_codes_that_it_is_given(scheme: str) -> None:
    w = jax.random.normal(jax.random.key(0), (64, 6))
    q = quantize(w.astype(jnp.bfloat16), scheme)
    if scheme.startswith("mx"):
        with pytest.raises(ValueError, match="layer: scales that are powers of two"):
            form.starting_grid(q, "layer")
        return
    grid, wanted = form.starting_grid(q), Form.of(q)
    again = form.quantize(qtensor.dequantize(q, jnp.float32), wanted, grid)
    np.testing.assert_array_equal(qtensor.unpacked(again), qtensor.unpacked(q))
    np.testing.assert_array_equal(again.scale, q.scale)
    moved = grid._replace(scale=grid.scale * 1.1)
    value = form.fake_quantize(w, wanted, moved)
    stored = form.quantize(w, wanted, moved)
    np.testing.assert_array_equal(value, qtensor.dequantize(stored, jnp.float32))
    assert stored.scheme == q.scheme


def test_stacked_weights_are_held_one_by_one() -> None:
    w = jax.random.normal(jax.random.key(0), (3, 64, 6))
    wanted = form_of("w4a16-g32")
    together = form.fake_quantize(w, wanted)
    for one, alone in zip(together, w, strict=True):
        np.testing.assert_array_equal(one, form.fake_quantize(alone, wanted))
    grid = form.starting_grid(form.quantize(w, wanted))
    np.testing.assert_array_equal(form.fake_quantize(w, wanted, grid), together)


def test_bad_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"w: a weight of shape \(64, 6\) is meant, got \(6, 64\)"):
        form.fake_quantize(jnp.ones((6, 64)), form_of("w4a16-g32"))
    with pytest.raises(ValueError, match="w: group size 7 does not divide 64"):
        form.fake_quantize(jnp.ones((64, 6)), form_of("w4a16-g7"))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("learned", [False, True])
def test_a_nan_stays_where_training_would_look_healthy_without_it(scheme, learned) -> None:
    w = jax.random.normal(jax.random.key(0), (64, 6))
    wanted = form_of(scheme)
    grid = None
    if learned and "mx" not in scheme:
        grid = form.starting_grid(form.quantize(w, wanted))
    value = jax.jit(lambda w: form.fake_quantize(w, wanted, grid))(w.at[5, 2].set(jnp.nan))
    assert jnp.isnan(value[5, 2])
