# SPDX-License-Identifier: Apache-2.0
"""Products of tokens with weights of 4 or 8 bits, on a Hopper GPU.

    y[m, n] = sum_k x[m, k] * scale[k // group, n] * (code[k, n] - zero[k // group, n])

with 16-bit tokens; with 8-bit ones, which have scales of their own,

    y[m, n] = token_scale[m] * scale[n] * sum_k x[m, k] * code[k, n]                     or, by group,
    y[m, n] = token_scale[m] * sum_g scale[g, n] * sum_(k in g) x[m, k] * code[k, n]     or, by 128 x 128,
    y[m, n] = sum_b token_scale[m, b] * scale[b, n // 128] * sum_(k in b) x[m, k] * code[k, n]

and to each a bias of the output and a residual are added, before the one rounding.

Two kernels compute it, of one layout of the weights: :mod:`pallas_kernels.few_tokens`, which waits for
nothing but memory, and :mod:`pallas_kernels.many_tokens`, which multiplies with whole warpgroups.
Which one, and how its work is cut up: :mod:`pallas_kernels.configs`.
"""

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Shaped, UInt32

from pallas_kernels import many_tokens, mosaic_machine, numpy_machine, operands, row_blocks
from pallas_kernels.configs import Config, config_for, kernel_of
from pallas_kernels.machine import Half
from pallas_kernels.operands import Weights
from pallas_kernels.product import BLOCK, OUT, Arrays, Out, Product, Tokens, why_not


def quantized_matmul_reference(
    x: Shaped[Array, "m k"],
    codes: UInt32[Array, "..."],
    scale: Shaped[Array, "..."],
    zero: UInt32[Array, "..."] | None = None,
    *,
    weights: Weights,
    token_scale: Float[Array, "..."] | None = None,
    scale_dtype: Half = "bfloat16",
    bias: Float[Array, " n"] | None = None,
    residual: Float[Array, "m n"] | None = None,
    layer: Int[Array, ""] | None = None,
    out_dtype: Any = None,
) -> Float[Array, "m n"]:
    """The definition, in float32, or int32 where integers meet; arguments as of `quantized_matmul`."""
    if layer is not None:
        codes, scale, zero = codes[layer], scale[layer], None if zero is None else zero[layer]
    w = plain_codes(codes, weights)
    k, n = w.shape

    def spread(pairs, dtype):
        values = row_blocks.untile_pairs(pairs, dtype).astype(jnp.float32)
        return jnp.repeat(values, k // values.shape[0], axis=0)

    near = x.astype(jnp.float32)
    if token_scale is None:
        centre = 0 if zero is None else spread(zero, x.dtype) - _lift(weights, x.dtype)
        y = _matmul(near, (w.astype(jnp.float32) - centre) * spread(scale, x.dtype))
    elif scale.ndim == 3:
        y = _matmul(near, w.astype(jnp.float32) * spread(scale, scale_dtype))
        y = y * token_scale[:, None]
    elif scale.ndim == 2:
        near = (near.reshape(-1, k // BLOCK, BLOCK) * token_scale[:, :, None]).reshape(-1, k)
        spread_scale = jnp.repeat(jnp.repeat(scale, BLOCK, axis=0), BLOCK, axis=1)[:, :n]
        y = _matmul(near, w.astype(jnp.float32) * spread_scale)
    else:
        wide = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
        y = _matmul(x.astype(wide), w.astype(wide)).astype(jnp.float32)
        y = y * token_scale[:, None] * scale.astype(jnp.float32)
    return _added(y[None], bias, residual).astype(_out_dtype(x, out_dtype))


def plain_codes(codes: UInt32[Array, "..."], weights: Weights) -> Shaped[Array, "*layers k n"]:
    """Codes out of row blocks: int8 for integers."""
    if weights == "int4":
        return row_blocks.untile_codes(codes)
    return row_blocks.untile_bytes(codes, jnp.dtype(weights))


def tiled_codes(codes: Shaped[Array, "*layers k n"], weights: Weights) -> UInt32[Array, "..."]:
    """Codes into the row blocks that the kernel takes: the inverse of :func:`plain_codes`."""
    return row_blocks.tile_codes(codes) if weights == "int4" else row_blocks.tile_bytes(codes)


def pack_zeros(
    zero: Shaped[Array, "*layers groups n"], half: Half, weights: Weights
) -> UInt32[Array, "..."]:
    """Zeros as the kernel takes them, two to a word: what to subtract from lifted codes.

    Args:
      zero: int8 or int4 zeros.
      half: dtype of the product.
      weights: what the codes are; see :data:`pallas_kernels.operands.LIFTS`.
    """
    lifted = zero.astype(jnp.float32) + _lift(weights, half)
    return row_blocks.tile_pairs(lifted.astype(half))


def unpack_zeros(
    words: UInt32[Array, "..."], half: Half, weights: Weights
) -> Shaped[Array, "*layers groups n"]:
    """Inverse of :func:`pack_zeros`: int8 zeros."""
    lifted = row_blocks.untile_pairs(words, jnp.dtype(half)).astype(jnp.float32)
    return (lifted - _lift(weights, half)).astype(jnp.int8)


def _lift(weights: Weights, half: Any) -> int:
    return operands.LIFTS[weights, cast(Half, str(jnp.dtype(half)))]


def _matmul(x: Array, w: Array) -> Array:
    return jnp.matmul(x, w, precision="highest")


def quantized_matmul(
    x: Shaped[Array, "m k"],
    codes: UInt32[Array, "..."],
    scale: Shaped[Array, "..."],
    zero: UInt32[Array, "..."] | None = None,
    *,
    weights: Weights,
    token_scale: Float[Array, "..."] | None = None,
    scale_dtype: Half = "bfloat16",
    bias: Float[Array, " n"] | None = None,
    residual: Float[Array, "m n"] | None = None,
    layer: Int[Array, ""] | None = None,
    out_dtype: Any = None,
    config: Config | None = None,
    interpret: bool = False,
) -> Float[Array, "m n"]:
    """The product of the module's docstring, on a Hopper GPU.

    Args:
      x: tokens, bfloat16 or float16; or int8 or float8_e4m3fn, for weights that are the same or int4.
      codes: weights in row blocks, :func:`tiled_codes`.
      scale: with 16-bit tokens in their dtype, from :func:`pallas_kernels.row_blocks.tile_pairs`, of one
        group or of groups of 32, 64 or 128. With 8-bit tokens floats of one output each, ``[n]``, or one
        for all, ``[1]``; or, with float8_e4m3fn tokens, for int4 pairs of groups of 128, for
        float8_e4m3fn float32 ``[k / 128, ceil(n / 128)]``.
      zero: from :func:`pack_zeros`; None: zeros are 0. With 16-bit tokens and integer weights only.
      weights: dtype of the codes.
      token_scale: with 8-bit tokens, float32 ``[m]``, ``[1]`` or, with scales by block, ``[m, k / 128]``.
      scale_dtype: of pairs, with 8-bit tokens.
      bias: added to every token.
      residual: added to the result.
      layer: which one of weights that are stacked: ``codes``, ``scale`` and ``zero`` have an axis of
        layers in front then, of which the kernel reads this one, in its place.
      out_dtype: bfloat16, float16 or float32; None: that of ``x``, or float32 for 8-bit tokens.
      config: how the work is cut up; None: what is tuned for the product, or a default.
      interpret: execute on the CPU, with numpy, outside jit: for tests.

    Returns:
      The product, accumulated in float32 or int32 and rounded once. Two exceptions, both beyond few
      tokens: 16-bit tokens meet weights whose group's scale is multiplied in, rounded to 16 bits, as if
      they had been dequantized; and e4m3 is added up in the sums of the tensor cores, of about 14 bits,
      of all inputs or, with scales of groups or blocks, of 128 of them (relative error on one H100:
      0.001 at 4096 inputs, 0.002 at 14336).

    Raises:
      ValueError: a shape, a dtype or a configuration that the kernel cannot take.
    """
    product = _product(
        x, codes, scale, zero, weights, token_scale, scale_dtype=scale_dtype, layer=layer,
        out=_out_dtype(x, out_dtype),
    )  # fmt: skip
    m, n = product.m, product.n
    for name, array, shape in (("bias", bias, (n,)), ("residual", residual, (m, n))):
        if array is not None and (array.shape != shape or str(array.dtype) not in OUT):
            raise ValueError(f"{name} is {array.dtype}{array.shape}, must be floats of {shape}")
    config = config_for(product) if config is None else config
    kernel = kernel_of(config)
    kernel.check(product, config)
    parts = config.parts if isinstance(config, many_tokens.Config) else 1
    ends = {"bias": bias, "residual": residual}
    if parts > 1:  # of the inputs: what is added at the end is added to all of them
        product = dataclasses.replace(product, out="float32")
    if layer is not None:  # none beyond the last, as indexing has it
        layer = jnp.clip(jnp.asarray(layer, jnp.int32).reshape(1), 0, len(codes) - 1)
    given = {
        "x": x, "codes": codes, "scale": scale, "zero": zero, "token_scale": token_scale,
        "layer": layer, **(ends if parts == 1 else {}),
    }  # fmt: skip
    if not product.has_half_tokens:
        # few_tokens multiplies int4 with e4m3 as 16-bit pairs, in the order of bytes.
        whole_bytes = product.is_whole or kernel is many_tokens
        given["x"] = row_blocks.ordered_tokens(x, by_nibbles=weights == "int4" and whole_bytes)
    if product.has_blocks and isinstance(config, many_tokens.Config):
        given["token_scale"] = many_tokens.token_scales(product, config, cast(Array, token_scale))
    present = {name: array for name, array in given.items() if array is not None}

    def program(machine, *arrays):
        named = Arrays(**dict(zip((*present, "out"), arrays, strict=True)))
        kernel.kernel(machine, named, product, config)

    sizes = {
        "grid": kernel.grid(product, config),
        "threads": config.threads,
        "shared": kernel.shared_words(product, config),
    }
    if interpret:
        result = np.full((parts * m, n), np.nan, product.out)
        arrays = [*map(np.asarray, present.values()), result]
        numpy_machine.run(lambda machine: program(machine, *arrays), **sizes)
        sums = jnp.asarray(result)
    else:
        out = jax.ShapeDtypeStruct((parts * m, n), product.out)
        name = kernel.__name__.rpartition(".")[2]
        sums = mosaic_machine.launch(program, list(present.values()), out, name=name, **sizes)
    if parts == 1:
        return sums
    return _added(sums.reshape(parts, m, n), *ends.values()).astype(_out_dtype(x, out_dtype))


def _added(
    sums: Float[Array, "parts m n"],
    bias: Float[Array, " n"] | None,
    residual: Float[Array, "m n"] | None,
) -> Float[Array, "m n"]:
    """What the parts of the inputs give together, in a fixed order, and what is added at the end."""
    y = functools.reduce(jnp.add, sums)
    for term in (bias, residual):
        y = y if term is None else y + term.astype(jnp.float32)
    return y


def _out_dtype(x: Array, out_dtype: Any) -> Any:
    if out_dtype is not None:
        return jnp.dtype(out_dtype)
    return x.dtype if x.dtype.itemsize == 2 else jnp.dtype(jnp.float32)


def _product(
    x: Array,
    codes: Array,
    scale: Array,
    zero: Array | None,
    weights: Weights,
    token_scale: Array | None,
    *,
    scale_dtype: Half,
    layer: Array | None,
    out: Any,
) -> Product:
    """What the arguments say is to be computed; refuses what does not go together."""
    (m, k), tokens = x.shape, str(x.dtype)
    # Of one layer.
    codes_shape, scale_shape = (a.shape if layer is None else a.shape[1:] for a in (codes, scale))
    n, inputs = codes_shape[0] * row_blocks.ROWS, codes_shape[1] * row_blocks.COLUMNS
    tail = (32, 4) if weights == "int4" else (2, 32, 4)
    if codes_shape[2:] != tail:
        raise ValueError(f"{codes.shape=} are no row blocks of {weights}, which end in {tail}")
    if inputs != k:
        raise ValueError(f"{x.shape=} does not fit weights of {inputs} inputs")
    if layer is not None:
        _check_layer(layer, codes, scale, zero)
    if str(out) not in OUT:
        raise ValueError(f"out_dtype is {out}, must be one of {', '.join(OUT)}")
    is_half = token_scale is None
    if len(scale_shape) == 3:
        groups = scale_shape[1]
        group_size = None if groups == 1 and is_half else k // groups
    else:
        group_size = BLOCK if len(scale_shape) == 2 else None
    reason = why_not(
        m, k, n, weights=weights, tokens=tokens, group_size=group_size, has_zeros=zero is not None
    )
    if reason:
        raise ValueError(reason)
    product = Product(
        m=m, k=k, n=n, group_size=group_size, weights=weights, tokens=cast(Tokens, tokens),
        has_zeros=zero is not None, scales=scale_dtype, one_scale=not is_half and scale_shape == (1,),
        one_token_scale=not is_half and token_scale.shape == (1,), out=cast(Out, str(out)),
    )  # fmt: skip
    if product.has_half_tokens != is_half:
        raise ValueError(f"{tokens} tokens need {'no' if is_half is False else 'a'} token_scale")
    pairs = [array for array in (scale, zero) if array is not None]
    if product.has_pairs:
        _check_pairs(product, pairs, () if layer is None else codes.shape[:1])
    if token_scale is not None:
        _check_scales(product, scale.dtype, scale_shape, token_scale)
    return product


def _check_layer(layer: Any, codes: Array, scale: Array, zero: Array | None) -> None:
    """Refuses a layer that there is not, where its number is known, and stacks of different lengths."""
    if not jnp.issubdtype(jnp.result_type(layer), jnp.integer) or jnp.ndim(layer):
        raise ValueError(f"layer is {layer}, must be an integer")
    lengths = {len(array) for array in (codes, scale, zero) if array is not None}
    if len(lengths) != 1:
        raise ValueError(
            f"codes, scale and zero are of {sorted(lengths)} layers, must be of as many"
        )
    if not isinstance(layer, Tracer) and not 0 <= int(layer) < len(codes):
        raise ValueError(f"layer={int(layer)} of {len(codes)} layers, counted from 0")


def _check_pairs(product: Product, pairs: list[Array], layers: tuple[int, ...]) -> None:
    """Refuses scales and zeros that should be pairs and are not."""
    shape = (*layers, product.n // row_blocks.ROWS, product.groups, 8)
    if product.pair not in ("bfloat16", "float16"):
        raise ValueError(f"scale_dtype is {product.pair}, must be bfloat16 or float16")
    for name, array in zip(("scale", "zero"), pairs, strict=False):
        if array.shape != shape or array.dtype != jnp.uint32:
            raise ValueError(f"{name} is {array.dtype}{array.shape}, must be pairs: uint32{shape}")


def _check_scales(product: Product, dtype: Any, shape: tuple[int, ...], token_scale: Array) -> None:
    """Refuses scales of 8-bit tokens that have another shape or dtype."""
    blocks, of_tokens, dtypes = product.k // BLOCK, {(product.m,), (1,)}, OUT
    if product.has_pairs:
        of_weights, dtypes = {shape}, (str(dtype),)  # see _check_pairs
    elif product.has_blocks:
        of_weights, dtypes = {(blocks, -(-product.n // BLOCK))}, ("float32",)
        of_tokens = {(product.m, blocks)}
    else:
        of_weights = {(product.n,), (1,)}
    given = (str(dtype), shape), (str(token_scale.dtype), token_scale.shape)
    expected = (dtypes, of_weights), (("float32",), of_tokens)
    for name, has, (types, shapes) in zip(("scale", "token_scale"), given, expected, strict=True):
        if has[0] not in types or has[1] not in shapes:
            raise ValueError(
                f"{name} is {has[0]}{has[1]}, must be {' or '.join(map(str, shapes))} "
                f"of {' or '.join(types)}"
            )
