# SPDX-License-Identifier: Apache-2.0
"""Muon for the matrices of the layers, Adam for the rest, under one schedule.

The matrices of one kind are held stacked over the layers, so that Muon's Newton-Schulz iteration
runs as a few batched products instead of hundreds of small ones.

References:
    Keller Jordan and others, "Muon: An optimizer for hidden layers in neural networks", 2024,
    https://kellerjordan.github.io/posts/muon/.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from optax.contrib import MuonDimensionNumbers, muon

from shipped_model_training.settings import TrainingSettings

Parameters = dict[str, Array]


def make_optimizer(settings: TrainingSettings) -> optax.GradientTransformation:
    """Return the optimizer at its peak rates; `schedule_factor` is applied to its updates.

    Parameters with three axes (layer, in, out) are matrices to Muon; all others go to Adam.
    """
    return muon(
        settings.matrix_rate,
        weight_decay=settings.matrix_decay,
        adam_learning_rate=settings.other_rate,
        adam_b2=0.95,
        # A function of the parameters, as documented there; its declared type cannot say so.
        muon_weight_dimension_numbers=_matrices,  # pyright: ignore[reportArgumentType]
    )


def schedule_factor(
    step: Array | np.ndarray, num_steps: Array | int, warmup_steps: int
) -> Float[Array, "*shape"]:
    """Return the share of the peak rate: linear up to 1 over the warmup, then down to 0 at the end.

    Within the warmup it does not depend on `num_steps`, which may be settled then.

    Example:
        >>> [round(float(schedule_factor(np.array(step), 100, 20)), 3) for step in (0, 19, 20, 60, 100)]
        [0.05, 1.0, 1.0, 0.5, 0.0]
    """
    rising = (step + 1) / warmup_steps
    falling = (num_steps - step) / jnp.maximum(1, num_steps - warmup_steps)
    return jnp.clip(jnp.minimum(rising, falling), 0.0, 1.0)


def _matrices(parameters: Parameters) -> dict[str, MuonDimensionNumbers | None]:
    stacked = MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    return jax.tree.map(lambda leaf: stacked if leaf.ndim == 3 else None, parameters)
