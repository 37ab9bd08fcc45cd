# SPDX-License-Identifier: Apache-2.0
"""PACT: activations that are not negative, cut off at a learned level.

    y  = clip(x, 0, alpha),      y' = round(y * (2**bits - 1) / alpha) * alpha / (2**bits - 1)

    dy'/dx = 1 for 0 <= x < alpha, else 0            dy'/dalpha = 1 for x >= alpha, else 0

The level is a parameter of the model, regularized like a weight: a low one rounds finely and cuts much
off. For activations of both signs see :mod:`qjax.qat.lsq`, whose range is learned at both ends.

References:
  Choi, Wang, Venkataramani, Chuang, Srinivasan, Gopalakrishnan, PACT: Parameterized Clipping Activation
  for Quantized Neural Networks, 2018, https://arxiv.org/abs/1805.06085.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def pact(x: Float[Array, "*shape"], alpha: Float[Array, ""], bits: int) -> Float[Array, "*shape"]:
    """Clips and rounds activations, with the gradients of the module's docstring.

    Args:
      x: what stands in the place of a ReLU's input.
      alpha: level at which it is cut off, positive.
      bits: of the codes, at least 1.

    Raises:
      ValueError: fewer than one bit.

    Example:
      >>> pact(jnp.array([-1.0, 0.4, 9.0]), jnp.array(3.0), 2).tolist()
      [0.0, 0.0, 3.0]
    """
    if bits < 1:
        raise ValueError(f"a code has at least one bit, got {bits=}")
    # Regularized like a weight it may come to zero, where everything is cut off.
    alpha = jnp.maximum(alpha.astype(jnp.float32), jnp.finfo(jnp.float32).tiny * 2**bits)
    step = alpha / (2**bits - 1)
    return (jnp.round(jnp.clip(x.astype(jnp.float32), 0.0, alpha) / step) * step).astype(x.dtype)


def _forward(x, alpha, bits):
    return pact(x, alpha, bits), (x, alpha)


def _backward(bits, saved, cotangent):
    del bits
    x, alpha = saved
    above = x >= alpha
    d_x = jnp.where((x >= 0) & ~above, cotangent, 0).astype(x.dtype)
    d_alpha = jnp.sum(jnp.where(above, cotangent, 0).astype(jnp.float32)).astype(alpha.dtype)
    return d_x, d_alpha


pact.defvjp(_forward, _backward)
