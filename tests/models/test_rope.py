# SPDX-License-Identifier: Apache-2.0
import jax.numpy as jnp
import numpy as np
import pytest

from qjax_models.rope import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rope,
    frequencies,
    rotate,
    rotation,
)


def test_a_rotated_product_depends_on_the_distance_alone():
    random = np.random.default_rng(0)
    query, key = random.standard_normal((2, 1, 1, 1, 16))

    def product(query_position, key_position):
        turned = [
            rotate(jnp.float32(x), rotation(Rope(), 16, jnp.array([[position]]), 4096))
            for x, position in ((query, query_position), (key, key_position))
        ]
        return float((turned[0] * turned[1]).sum())

    assert product(7, 3) == pytest.approx(product(1007, 1003), abs=1e-3)
    assert product(0, 0) == pytest.approx(float((query * key).sum()), abs=1e-5)


def test_pairs_turn_by_position_times_frequency():
    x = jnp.zeros((1, 1, 1, 4)).at[..., 0].set(1.0)  # the first of pair (0, 2)
    turned = rotate(x, rotation(Rope(theta=100.0), 4, jnp.array([[2]]), 8))
    np.testing.assert_allclose(turned[0, 0, 0], [np.cos(2), 0, np.sin(2), 0], atol=1e-6)


def test_only_the_given_fraction_turns():
    x = jnp.ones((1, 3, 2, 8))
    turned = rotate(x, rotation(Rope(fraction=0.5), 8, jnp.arange(3)[None], 3))
    np.testing.assert_array_equal(turned[..., 4:], x[..., 4:])
    assert not np.allclose(turned[0, 1, :, :4], 1.0)


def test_scalings_change_the_frequencies_as_published():
    plain = frequencies(Rope(), 8, 64)
    np.testing.assert_allclose(plain, 10000.0 ** -np.array([0, 0.25, 0.5, 0.75]))
    linear = frequencies(Rope(scaling=LinearScaling(factor=4.0)), 8, 64)
    np.testing.assert_allclose(linear, plain / 4)

    llama3 = Llama3Scaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_positions=100
    )
    found = frequencies(Rope(scaling=llama3), 8, 64)
    turns = 100 * plain / (2 * np.pi)  # 15.9, 1.59, 0.16, 0.016
    blend = (turns[1] - 1) / 3
    np.testing.assert_allclose(found[0], plain[0])
    np.testing.assert_allclose(found[1], blend * plain[1] + (1 - blend) * plain[1] / 8)
    np.testing.assert_allclose(found[2:], plain[2:] / 8)


def test_longrope_chooses_by_the_length_that_a_row_can_reach():
    scaling = LongRopeScaling(
        short_factor=(1.0, 2.0), long_factor=(3.0, 4.0), original_positions=16, attention_factor=1.5
    )
    rope = Rope(scaling=scaling)
    plain = frequencies(Rope(), 4, 16)
    np.testing.assert_allclose(frequencies(rope, 4, 16), plain / [1, 2])
    np.testing.assert_allclose(frequencies(rope, 4, 17), plain / [3, 4])
    assert float(rotation(rope, 4, jnp.array([[0]]), 4).cos[0, 0, 0]) == 1.5


def test_wrong_values_are_refused():
    with pytest.raises(ValueError, match="theta=0"):
        Rope(theta=0)
    with pytest.raises(ValueError, match=r"fraction=1.5 must be in \(0, 1\]"):
        Rope(fraction=1.5)
    with pytest.raises(ValueError, match="high_freq_factor=1.0 must exceed"):
        Llama3Scaling(factor=8, low_freq_factor=1.0, high_freq_factor=1.0, original_positions=9)
