# SPDX-License-Identifier: Apache-2.0
"""FP8 training of Flax Linen layers: ``nn.Dense``, ``nn.DenseGeneral``, and attention made of them.

    nn.Dense(n, dot_general=low_precision.dot_general)                 current scaling
    nn.Dense(n, dot_general_cls=low_precision.DelayedDotGeneral)       delayed scaling

Histories lie in Flax's own collection for what a gradient overwrites, so the ``TrainState`` of
``flax.training`` carries them on without a line of the user's. A loop of one's own differentiates with
regard to all variables and puts the gradients of that collection in its place. ``nn.Einsum`` has no hook.
"""

from typing import Any

from flax import linen as nn
from flax.linen import fp8_ops
from jaxtyping import Array, Float

from qjax.low_precision import amax_history, fp8_dot_general
from qjax.low_precision.fp8_dot_general import Histories


class DelayedDotGeneral(nn.Module):
    """A product scaled by earlier steps, as ``dot_general_cls=`` of a Linen layer.

    Attributes:
      window: steps whose largest magnitude counts.
      margin: powers of two of the range that are kept free above it.

    Example:
      >>> import jax
      >>> layer = nn.Dense(2, dot_general_cls=DelayedDotGeneral)
      >>> variables = layer.init(jax.random.key(0), jax.numpy.ones((1, 4)))
      >>> sorted(variables)
      ['_overwrite_with_gradient', 'params']
    """

    window: int = 16
    margin: int = 0

    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Float[Array, "..."]:
        """The product of :func:`~qjax.low_precision.fp8_dot_general.dot_general`."""
        names = ("inputs", "kernel", "gradient")
        histories = [
            self.variable(fp8_ops.OVERWRITE_WITH_GRADIENT, name, amax_history.empty, self.window)
            for name in names
        ]
        return fp8_dot_general.dot_general(
            *args, histories=Histories(*(h.value for h in histories)), margin=self.margin, **kwargs
        )
