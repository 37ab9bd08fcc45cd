# SPDX-License-Identifier: Apache-2.0
"""What attention keeps of the tokens so far, in 8 bits: codes of keys and values by static scales.

    codes = encode(x / s),    x ~ codes * s,    s = largest of all calibration tokens / highest code

One scale serves all keys of a layer, as they are after their rotation by position, and one all values:
what compressed-tensors calls a ``kv_cache_scheme`` of strategy ``tensor``, and vLLM multiplies by.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from qjax import activations, formats
from qjax.nnx_layers import named_variables
from qjax.scheme import ActivationScheme

SCHEMES: Mapping[str, ActivationScheme] = {
    "kv-fp8-static": ActivationScheme(format=formats.E4M3, static=True),
}


class CacheScale(nnx.Variable):
    """The scale of a layer's keys or values, float32 ``[1]``; None before calibration has found it.

    While it is None they are kept as they are.
    """


def scheme(name: str) -> ActivationScheme:
    """What a scheme of the cache means.

    Raises:
      ValueError: there is none of this name.

    Example:
      >>> scheme("kv-fp8-static").format.name
      'e4m3'
    """
    if name not in SCHEMES:
        raise ValueError(f"unknown scheme of the cache {name!r}; there are {', '.join(SCHEMES)}")
    return SCHEMES[name]


def scales_of(module: nnx.Module, prefix: str = "") -> dict[str, CacheScale]:
    """The scales of a model or a part of it by their paths, found or not.

    Args:
      module: with arrays, or shapes in place of them.
      prefix: the module's path and a slash; empty for a model.
    """
    named = named_variables(module, prefix)
    return {path: scale for path, scale in named.items() if isinstance(scale, CacheScale)}


def expect(module: nnx.Module) -> None:
    """Puts shapes in the place of scales that are not found yet, for a file that will hold them."""
    for scale in scales_of(module).values():
        if scale.get_value() is None:
            scale.set_value(jax.ShapeDtypeStruct((1,), jnp.float32))


def encoded(
    x: Float[Array, "*shape"], scale: Float[Array, "1"], how: ActivationScheme
) -> Float[Array, "*shape"]:
    """The codes of keys or values; what lies beyond the highest saturates, NaN stays."""
    return activations.quantize(x, how, axis=(-1,), static=scale).codes


def decoded(
    codes: Float[Array, "*shape"], scale: Float[Array, "1"], dtype: jax.typing.DTypeLike
) -> Float[Array, "*shape"]:
    """What codes stand for, rounded once to a dtype."""
    return (codes.astype(jnp.float32) * scale).astype(dtype)
