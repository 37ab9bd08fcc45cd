# SPDX-License-Identifier: Apache-2.0
"""The numbers in words, and where the words of operands lie, for :mod:`pallas_kernels.numpy_machine`."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int64, Shaped, UInt8, UInt32

from pallas_kernels.machine import Half, Operand

_DTYPES = {"bfloat16": np.dtype(jnp.bfloat16), "float16": np.dtype(np.float16)}

Words = UInt32[np.ndarray, " _threads"]


def inside_tokens(tokens: int, first: int, words: int) -> Int64[np.ndarray, "_tokens _words"]:
    """Where so many words of tokens lie, from their first-th 16 bytes on."""
    token, word = np.arange(tokens)[:, None], np.arange(words)
    return 32 * token + 4 * ((first + word // 4) ^ token % 8) + word % 4


def inside_rows(part: int) -> Int64[np.ndarray, "_rows _words"]:
    """Where the words of :class:`pallas_kernels.machine.Rows` lie."""
    row, word = np.arange(64)[:, None], np.arange(8)
    return 16 * row + 4 * ((2 * part + word // 4) ^ row % 8 // 2) + word % 4


def elements(kind: Operand, word: Words) -> np.ndarray:
    """The numbers in words, along a last axis: float32, or int32."""
    if kind == "bfloat16" or kind == "float16":
        return halves(kind, word).astype(np.float32)
    values = bytes_in(word)
    if kind == "int8":
        return values.view(np.int8).astype(np.int32)
    return values.view(jnp.float8_e4m3fn).astype(np.float32)


def bytes_in(word: Words) -> UInt8[np.ndarray, "_threads 4"]:
    """The four bytes of each, the lowest first."""
    return np.ascontiguousarray(word).view(np.uint8).reshape(-1, 4)


def halves(half: Half, pair: Words) -> Shaped[np.ndarray, "_threads 2"]:
    """The two 16-bit floats of each, the low one first."""
    return np.ascontiguousarray(pair).view(_DTYPES[half]).reshape(-1, 2)


def joined(half: Half, values: Float32[np.ndarray, "_threads 2"]) -> Words:
    """Rounds two floats each to a pair."""
    return np.ascontiguousarray(values.astype(_DTYPES[half])).view(np.uint32).reshape(-1)
