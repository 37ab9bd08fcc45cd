# SPDX-License-Identifier: Apache-2.0
"""SmoothQuant: outliers of activations are moved into the weights, until both round equally well.

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha),      Y = (X / s) (s W)

==============  ===========================================================================
paper           here
==============  ===========================================================================
max|X_j|        ``activations``: the largest magnitude of channel ``j`` in calibration
max|W_j|        ``weights``: of row ``j`` of every weight that multiplies it
alpha           ``strength``: 0 moves nothing of the activations' spread, 1 all of it
==============  ===========================================================================

A channel that was zero in every row, or has no weights, keeps its size. Beyond the paper values are
smoothed with o_proj and the half of the MLP without activation with down_proj, and where a scale loses
more than none does (:mod:`qjax.rescaling`), none is taken.

References:
  Xiao, Lin, Seznec, Wu, Demouth, Han, SmoothQuant: Accurate and Efficient Post-Training Quantization for
  Large Language Models, ICML 2023, https://arxiv.org/abs/2211.10438, equation 4.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

# The authors' code keeps both maxima and the scale at or above it.
_LEAST = 1e-5


@dataclass(frozen=True, kw_only=True)
class Options:
    """How SmoothQuant is run.

    Attributes:
      strength: alpha, in [0, 1]; None: of those in ``STRENGTHS`` the one with the least error of the
        products that follow, chosen for each place by itself. 0.8, which llm-compressor takes, loses half
        as much as that choice on a model without outliers, and a tenth more on one with them.
    """

    strength: float | None = 0.8

    def __post_init__(self):  # noqa: D105
        if self.strength is not None and not 0 <= self.strength <= 1:
            raise ValueError(f"SmoothQuant's strength lies in [0, 1], got {self.strength}")


# The paper takes 0.5 for most models and up to 0.9 where activations have extreme outliers.
STRENGTHS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def scale(
    activations: Float[Array, " k"], weights: Float[Array, " k"], strength: float
) -> Float[Array, " k"]:
    """What each channel of the activations is divided by.

    Args:
      activations: largest magnitude of each channel.
      weights: largest magnitude of the weights that multiply it.
      strength: alpha.

    Returns:
      Positive float32 factors.

    Example:
      >>> scale(jnp.array([16.0, 1.0]), jnp.array([1.0, 1.0]), 0.5).tolist()
      [4.0, 1.0]
    """
    x = jnp.maximum(activations.astype(jnp.float32), _LEAST)
    w = jnp.maximum(weights.astype(jnp.float32), _LEAST)
    smoothed = jnp.maximum(x**strength / w ** (1 - strength), _LEAST)
    return jnp.where((activations > 0) & (weights > 0), smoothed, 1.0)
