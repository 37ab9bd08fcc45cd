# SPDX-License-Identifier: Apache-2.0
"""AWQ: channels that activations make important are enlarged before their weights are rounded.

    minimize over r in [0, 1]    | block(Q(s W), x / s) - block(W, x) |^2,    s = x^r / (w^(1 - r) + eps)

==============  ===========================================================================
paper, code     here
==============  ===========================================================================
s_X             ``activations``: mean magnitude of each channel in calibration
s_W             ``weights``: mean over outputs of ``|W|`` relative to its group's largest
alpha           ``ratio``, one of ``RATIOS``
s               ``scale``, divided by ``sqrt(max s * min s)``
Q               rounding to nearest in the scheme of the layer
==============  ===========================================================================

The scale by weights ("duo scaling") is that of AutoAWQ and llm-compressor; the paper's own is by
activations alone, which is what a weight of equal magnitudes gives. Afterwards ranges are clipped to
what costs the product least: :class:`qjax.RangeSearch`, method ``"output"``.

The authors' loss is that of the module that the enlarged channels feed: of attention as a whole, of the
gated MLP, of a single product where one layer alone is fed. Here it is the block's output, and for a
single layer with activations as they are the product's own, from its Hessian, which needs no pass.

References:
  Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan, Han, AWQ: Activation-aware Weight Quantization for
  LLM Compression and Acceleration, MLSys 2024, https://arxiv.org/abs/2306.00978, section 3.2 and
  equation 4; the clamps are those of the authors' code, https://github.com/mit-han-lab/llm-awq.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

RATIOS = tuple(i / 20 for i in range(20))

_LEAST = 1e-4


@dataclass(frozen=True, kw_only=True)
class Options:
    """How AWQ is run: there is nothing to choose."""


def scale(
    activations: Float[Array, " k"], weights: Float[Array, " k"], ratio: float | Float[Array, ""]
) -> Float[Array, " k"]:
    """What the weights of each channel are multiplied by.

    Args:
      activations: mean magnitude of each channel.
      weights: relative magnitude of the weights that multiply it; ones: of no interest.
      ratio: 0 enlarges by weights alone, 1 by activations alone.

    Returns:
      Positive float32 factors, the largest of them the reciprocal of the least.

    Example:
      >>> scale(jnp.array([4.0, 1.0]), jnp.ones(2), 1.0).round(3).tolist()
      [2.0, 0.5]
    """
    raw = activations.astype(jnp.float32) ** ratio / (weights ** (1 - ratio) + _LEAST)
    raw = jnp.maximum(raw, _LEAST)
    return raw / jnp.sqrt(jnp.max(raw) * jnp.min(raw))


def relative_magnitude(
    weights: Sequence[Float[Array, "k _"]], group_size: int | None
) -> Float[Array, " k"]:
    """The mean over all outputs of ``|w|`` relative to the largest of its group.

    Args:
      weights: all that multiply the same input.
      group_size: inputs that share a scale; None: all.
    """
    w = jnp.abs(jnp.concatenate([w.astype(jnp.float32) for w in weights], axis=1))
    size = group_size or len(w)
    # The last of a block's may be a shorter one.
    groups = jnp.pad(w, ((0, -len(w) % size), (0, 0))).reshape(-1, size, w.shape[1])
    relative = groups / (jnp.max(groups, axis=1, keepdims=True) + 1e-6)
    return jnp.mean(relative.reshape(-1, w.shape[1])[: len(w)], axis=1)
