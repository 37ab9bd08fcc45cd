# SPDX-License-Identifier: Apache-2.0
"""The straight-through estimator: the value of one array with the gradient of another.

Rounding has a gradient of zero wherever it has one, so nothing in front of it would ever be trained. The
estimator takes it for the identity in the backward pass.

References:
  Bengio, Leonard, Courville, Estimating or Propagating Gradients Through Stochastic Neurons for
  Conditional Computation, 2013, https://arxiv.org/abs/1308.3432.
"""

import jax
from jaxtyping import Array, Float


# Not `smooth + stop_gradient(exact - smooth)`: that sum would round, and exact is meant.
@jax.custom_jvp
def straight_through(
    smooth: Float[Array, "*shape"], exact: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """The second argument, bit for bit, with the gradient of the first.

    Args:
      smooth: what is differentiated.
      exact: what is computed.

    Example:
      >>> value, slope = jax.value_and_grad(lambda x: straight_through(3 * x, jax.numpy.round(x)))(0.6)
      >>> float(value), float(slope)
      (1.0, 3.0)
    """
    del smooth
    return exact


straight_through.defjvps(lambda tangent, result, smooth, exact: tangent, None)
