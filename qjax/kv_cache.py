# SPDX-License-Identifier: Apache-2.0
"""What attention keeps of the tokens so far, in few bits: codes of keys and values, and their scales.

    codes = encode(x / s),    x ~ codes * s

================  ======  =============================================================================
scheme            bits    s
================  ======  =============================================================================
kv-fp8-static     8       of all keys of a layer and of all its values: the largest magnitude that
                          calibration saw / highest code. compressed-tensors' ``kv_cache_scheme``
kv-fp8, kv-int8   8.25    of a head of a token: its entry of largest magnitude / lowest code
kv-int4           4.5     likewise of 64 neighbours in it, after a rotation of the head
================  ======  =============================================================================

(bits a number in heads of 128, scales included.) A scale that is of the values themselves has the sign
that takes the largest of them to the lowest code, -8 or -128: one more step than to the highest, for
nothing. In the shipped model's 4-bit cache that is worth as much as a zero for each group.

**Rotation.** Keys have channels that are an order larger than others, in every token, and 4 bits for the
group leave the others nothing. So queries, keys and values are turned by one Hadamard rotation R of the
head, after the rotation by position, which it does not commute with; and what attention makes of values
is turned back:

    (q R) . (k R)  =  q . k,        (sum_t p_t v_t R) R^T  =  sum_t p_t v_t

Perplexity of the shipped model over [24, 512] tokens, 6.856 unquantized: turned 7.008, not turned 7.174
(by absmax; 7.054 with a zero). With four channels of each head's keys and two of its values ten times as
large, and queries and o_proj as much smaller, which changes nothing else: 7.72, and 49.9 (14.5) (float32,
2 CPU cores, jax 0.10.2, 2026-11-29).

References:
  Ashkboos, Mohtashami, Croci, Li, Cameron, Jaggi, Alistarh, Hoefler, Hensman, QuaRot: Outlier-Free 4-Bit
  Inference in Rotated LLMs, NeurIPS 2024, https://arxiv.org/abs/2404.00456, section 4 (values are turned
  there by their weights, and groups have a zero).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Shaped

from pallas_kernels import packing
from qjax import activations, formats, tiles
from qjax.algorithms import rotation
from qjax.formats import Format
from qjax.nnx_layers import named_variables
from qjax.scheme import ActivationScheme
from qjax.straight_through import straight_through

_SIGNS = 0  # seed of the rotation's; weights that are turned already have none, and H H = I


@dataclass(frozen=True, kw_only=True)
class CacheScheme:
    """How keys and values are kept.

    Attributes:
      format: of the codes.
      static: whether one scale, from calibration, serves all; else scales come from the values.
      group_size: neighbours in a head that share a scale, where it is theirs; None: the whole head.
      turned: whether heads are rotated.
    """

    format: Format
    static: bool = False
    group_size: int | None = None
    turned: bool = False

    @property
    def activations(self) -> ActivationScheme:
        """The same as a scheme of activations; static ones only."""
        return ActivationScheme(format=self.format, static=self.static)


SCHEMES: Mapping[str, CacheScheme] = {
    "kv-fp8-static": CacheScheme(format=formats.E4M3, static=True),
    "kv-fp8": CacheScheme(format=formats.E4M3),
    "kv-int8": CacheScheme(format=formats.INT8),
    "kv-int4": CacheScheme(format=formats.INT4, group_size=64, turned=True),
}
DYNAMIC = tuple(name for name, scheme in SCHEMES.items() if not scheme.static)


class Codes(NamedTuple):
    """Keys or values in few bits.

    Attributes:
      codes: of the last axis, the head: plain, or packed into bytes where two fit into one.
      scale: float32, one of each group; None where one serves all.
    """

    codes: Shaped[Array, "*tokens bytes"]
    scale: Float[Array, "*tokens groups"] | None


class CacheScale(nnx.Variable):
    """The scale of a layer's keys or values, float32 ``[1]``; None before calibration has found it.

    While it is None they are kept as they are.
    """


def scheme(name: str) -> CacheScheme:
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
    """The scales of a model or a part of it by their paths, found or not; none where none is static.

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


def turned(heads: Float[Array, "*tokens H"]) -> Float[Array, "*tokens H"]:
    """Queries, keys or values in the basis of a scheme that is ``turned``."""
    return rotation.turned(heads, axis=-1, seed=_SIGNS)


def turned_back(mixed: Float[Array, "*tokens H"]) -> Float[Array, "*tokens H"]:
    """What attention made of turned values, in the basis of the layer behind it."""
    return rotation.turned_back(mixed, axis=-1, seed=_SIGNS)


def encoded(
    x: Float[Array, "*tokens H"], how: CacheScheme, static: Float[Array, "1"] | None = None
) -> Codes:
    """The codes of keys or values.

    What lies beyond the highest code of a static scale saturates, and a NaN is one there. Other groups
    with something that is not finite are NaN altogether.

    Args:
      x: heads, turned where the scheme is.
      how: the scheme.
      static: the scale of a static one.

    Example:
      >>> kept = encoded(jnp.array([[1.0, -4.0, 2.0, 0.5]]), SCHEMES["kv-int4"])
      >>> kept.codes.shape, kept.scale.tolist()
      ((1, 2), [[0.5]])
    """
    if how.static:
        return Codes(activations.quantize(x, how.activations, (-1,), static).codes, None)
    wide = x.astype(jnp.float32)
    tile = _tile(x.shape[-1], how)
    groups = tiles.split(wide, tile)
    most, least = groups.max(axis=-1), groups.min(axis=-1)
    scale = jnp.where(most > -least, most, least) / how.format.low
    scale = jnp.where(scale == 0, 1.0, scale)
    codes = formats.encode(wide / tiles.spread(scale, tile, x.shape[-1:]), how.format)
    return Codes(packing.pack(codes, 4) if how.format.bits == 4 else codes, scale)


def factors(
    kept: Codes, how: CacheScheme, size: int, static: Float[Array, "1"] | None = None
) -> tuple[Shaped[Array, "*tokens H"], Float[Array, "*#tokens groups"]]:
    """What codes and scales stand for as two factors, for products that multiply by scales last.

    Attention reads a byte of each number so, where :func:`decoded` writes 16 bits of it for the product
    to read.

    Args:
      kept: what :func:`encoded` made.
      how: the scheme.
      size: entries of a head, H.
      static: the scale of a static scheme.

    Returns:
      Codes, one for each entry; and the scale of each ``group_size`` of them, the last of a head's groups
      perhaps a shorter one.

    Example:
      >>> kept = encoded(jnp.array([[1.0, -4.0, 2.0, 0.5]]), SCHEMES["kv-int4"])
      >>> codes, scale = factors(kept, SCHEMES["kv-int4"], 4)
      >>> codes.tolist(), scale.tolist()
      ([[2, -8, 4, 1]], [[0.5]])
    """
    codes = kept.codes
    if how.format.bits == 4:
        codes = packing.unpack(codes, 4, size, signed=True)
    if kept.scale is not None:
        return codes, kept.scale
    assert static is not None  # codes of a static scheme are made by a scale
    return codes, static.reshape((1,) * codes.ndim)


def decoded(
    kept: Codes,
    how: CacheScheme,
    size: int,
    dtype: jax.typing.DTypeLike,
    static: Float[Array, "1"] | None = None,
) -> Float[Array, "*tokens H"]:
    """What codes stand for, rounded once to a dtype.

    Args:
      kept: what :func:`encoded` made.
      how: the scheme.
      size: entries of a head, H.
      dtype: of the result.
      static: the scale of a static scheme.

    Example:
      >>> kept = encoded(jnp.array([[1.0, -4.0, 2.0, 0.5]]), SCHEMES["kv-int4"])
      >>> decoded(kept, SCHEMES["kv-int4"], 4, jnp.float32).tolist()
      [[1.0, -4.0, 2.0, 0.5]]
    """
    codes, scale = factors(kept, how, size, static)
    spread = tiles.spread(scale, _tile(size, how), (size,))
    return (codes.astype(jnp.float32) * spread).astype(dtype)


def rounded(
    x: Float[Array, "*tokens H"], how: CacheScheme, static: Float[Array, "1"] | None = None
) -> Float[Array, "*tokens H"]:
    """What is left of keys or values that were kept so, in their dtype; their gradient passes through.

    What lies beyond a static scale has none.

    Args:
      x: heads, turned where the scheme is.
      how: the scheme.
      static: the scale of a static one.
    """
    if how.static:
        return activations.fake_quantize(x, how.activations, (-1,), static)
    return straight_through(x, decoded(encoded(x, how), how, x.shape[-1], x.dtype))


def _tile(size: int, how: CacheScheme) -> tuple[int]:
    return (min(size, how.group_size or size),)
