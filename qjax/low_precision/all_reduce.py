# SPDX-License-Identifier: Apache-2.0
"""The mean of gradients over devices, with 8-bit floats on the wire.

    s     = max over devices of amax(g_i) / 448           one scale for a tensor, shared by all devices
    c_i   = Q(g_i / s)                                    e4m3
    mean  = Q(sum_i c_i / n) * s                          summed in float32, n devices

A device sends each other one its share of the codes (all-to-all), sums what it gets, and all gather
the means: 2 (n - 1) / n bytes an element where float32 takes 8 (n - 1) / n. As one scale serves all
devices, codes are summed without it, and as no mean is larger than the largest gradient, none overflows.

    |mean - exact| <= 2**-4 (mean_i |g_i| + |mean|) + 2 * 2**-10 s      of each element: two roundings

=====================================  =================================================================
paper                                  here
=====================================  =================================================================
s'_g = min(s'_1, ..., s'_N)            one ``pmax`` of amaxes: their scales multiply, ours divide
mu, adjusted automatically             not needed: sums are float32 and never FP8, so that neither the sum
                                       overflows nor dividing before it underflows
FP8 NCCL all-reduce                    all-to-all, sum, all-gather: an all-reduce of FP8 codes would round
                                       at every hop
=====================================  =================================================================

References:
  Peng, Wu, Wei, Zhao, Yang, Liu, Xiong, Yang, Ni, Hu, Li, Zhang, Li, Ning, Wang, Zhang, Liu, Chau, Hu,
  Cheng, FP8-LM: Training FP8 Large Language Models, 2023, https://arxiv.org/abs/2310.18313.
"""

import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt8

from qjax import formats, ranges
from qjax.formats import E4M3

PyTreeT = TypeVar("PyTreeT")


def all_reduce_mean(gradients: PyTreeT, axis_name: Any) -> PyTreeT:
    """``jax.lax.pmean`` of gradients that travel as e4m3.

    All arrays travel together, each with a scale of its own. An infinity or NaN on any device is NaN in
    the mean of every device, so that a loss scaling sees it.

    Args:
      gradients: any pytree of floating-point arrays, inside ``jax.shard_map``.
      axis_name: of the mesh, one or several.

    Returns:
      The same on every device, in the gradients' dtypes. ``shard_map`` cannot see that: its
      ``check_vma=False`` lets the result out as replicated.

    Raises:
      ValueError: a leaf is not floating-point.

    Example:
      >>> from jax.sharding import PartitionSpec as P
      >>> mesh = jax.sharding.Mesh(jax.devices()[:1], ("data",))
      >>> mean = jax.shard_map(lambda g: all_reduce_mean(g, "data"), mesh=mesh, in_specs=P("data"),
      ...                      out_specs=P(), check_vma=False)
      >>> mean({"w": jnp.array([448.0, 0.0, -28.0])})["w"].tolist()
      [448.0, 0.0, -28.0]
    """
    leaves, structure = jax.tree.flatten(gradients)
    for leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"gradients are floating-point, got {leaf.dtype} of shape {leaf.shape}"
            )
    if not leaves:
        return gradients
    amaxes = lax.pmax(jnp.stack([_amax(leaf) for leaf in leaves]), axis_name)
    scales = ranges.symmetric_scale(amaxes, E4M3, "float", divisor=E4M3.high)
    codes = jnp.concatenate(
        [_encoded(leaf / scale).ravel() for leaf, scale in zip(leaves, scales, strict=True)]
    )
    means = _mean(codes, axis_name)
    results, start = [], 0
    for leaf, scale in zip(leaves, scales, strict=True):
        mean = _decoded(means[start : start + leaf.size]).reshape(leaf.shape) * scale
        results.append(mean.astype(leaf.dtype))
        start += leaf.size
    return jax.tree.unflatten(structure, results)


def _mean(codes: UInt8[Array, " size"], axis_name: Any) -> UInt8[Array, " size"]:
    """Codes of the mean of what the codes of all devices stand for."""
    devices = lax.psum(1, axis_name)
    share = math.ceil(codes.size / devices)
    padded = jnp.pad(codes, (0, share * devices - codes.size)).reshape(devices, share)
    mine = lax.all_to_all(padded, axis_name, split_axis=0, concat_axis=0, tiled=True)
    mean = _encoded(jnp.sum(_decoded(mine), axis=0) / devices)
    return lax.all_gather(mean, axis_name, tiled=True)[: codes.size]


def _amax(x: Float[Array, "..."]) -> Float[Array, ""]:
    return jnp.max(jnp.abs(jnp.where(jnp.isfinite(x), x, 0)), initial=0).astype(jnp.float32)


def _encoded(x: Float[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    """Codes as bytes: what travels must not be widened on its way."""
    codes = formats.encode(jnp.where(jnp.isfinite(x), x, jnp.nan), E4M3)
    return lax.bitcast_convert_type(codes, jnp.uint8)


def _decoded(codes: UInt8[Array, "*shape"]) -> Float[Array, "*shape"]:
    return formats.decode(lax.bitcast_convert_type(codes, jnp.dtype(E4M3.dtype)), E4M3)
