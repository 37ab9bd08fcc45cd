# SPDX-License-Identifier: Apache-2.0
"""What a language model is trained on: the next token of a text, and what a teacher expects there.

    loss = (1 - a) * CE + a * KL
    CE = - mean_t ln q_t(token_{t+1}),    KL = mean_t sum_v p_t(v) ln(p_t(v) / q_t(v))

``p`` is the teacher's distribution, mostly the unquantized model's own, and ``q`` the trained one's; both
means are over all positions but the last of a window.

References:
  Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network, 2015,
  https://arxiv.org/abs/1503.02531.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def cross_entropy(logits: Float[Array, "B T V"], tokens: Int[Array, "B T"]) -> Float[Array, ""]:
    """Mean negative log-likelihood of every token but the first of each window, in nats.

    Args:
      logits: of the token after each token.
      tokens: of the windows.

    Example:
      >>> float(cross_entropy(jnp.zeros((1, 3, 8)), jnp.zeros((1, 3), int))) == float(jnp.log(8.0))
      True
    """
    log_q = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
    return -jnp.mean(jnp.take_along_axis(log_q, tokens[:, 1:, None], axis=-1))


def distillation_loss(
    logits: Float[Array, "B T V"], teacher: Float[Array, "B T V"]
) -> Float[Array, ""]:
    """Mean divergence of the model's distributions from the teacher's, in nats.

    Args:
      logits: the trained model's.
      teacher: the teacher's; no gradient reaches them.

    Example:
      >>> float(distillation_loss(jnp.ones((1, 2, 4)), jnp.ones((1, 2, 4))))
      0.0
    """
    log_q = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
    log_p = jax.nn.log_softmax(jax.lax.stop_gradient(teacher)[:, :-1].astype(jnp.float32))
    return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))
