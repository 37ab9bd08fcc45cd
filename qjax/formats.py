# SPDX-License-Identifier: Apache-2.0
"""Number formats: which values a few bits can hold, and the way from a real number to its code.

Three kinds exist. An *integer* format holds every whole number of a range. A *float* format is an
8-bit float that the hardware knows and ml_dtypes names. A *codebook* format is a table of sixteen
values, and its code is an index into that table.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Integer, Shaped

# The 4-bit NormalFloat of QLoRA (Dettmers et al., 2023, arXiv:2305.14314, appendix E): quantiles of a
# standard normal, scaled to [-1, 1], with an exact zero.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

# E2M1 of the OCP Microscaling formats specification v1.0 (2023), section 5.3.3: bit 3 is the sign.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@dataclass(frozen=True, kw_only=True)
class Format:
    """The values that ``bits`` bits can hold.

    Attributes:
      name: what schemes, reports and files call it.
      bits: bits of one stored code.
      kind: how a code stands for a value; see the module's docstring.
      low: least value.
      high: greatest value.
      dtype: dtype of plain codes, as its numpy name.
      storage: dtype of codes as a QTensor holds them: the plain one; int4, of which XLA keeps two in
        a byte and which it alone can multiply without writing it out wide; or bytes that
        :mod:`pallas_kernels.packing` fills.
      table: the values in code order; codebook formats only.
    """

    name: str
    bits: int
    kind: Literal["integer", "float", "codebook"]
    low: float
    high: float
    dtype: str
    storage: str
    table: tuple[float, ...] = ()

    @property
    def packed(self) -> bool:
        """Whether codes are held as bytes that each carry several."""
        return self.storage == "uint8"

    @property
    def signed(self) -> bool:
        """Whether codes are two's complement; a codebook's are indices."""
        return self.kind == "integer"

    @property
    def symmetric_divisor(self) -> float:
        """What the largest magnitude is divided by to give a symmetric scale.

        For integers ``(2**bits - 1) / 2``, half the number of steps: the range is used in full, the
        positive end saturates by at most half a step. It is what compressed-tensors does.
        """
        return (self.high - self.low) / 2


def _integer(bits: int, storage: str) -> Format:
    return Format(
        name=f"int{bits}", bits=bits, kind="integer", low=-(2.0 ** (bits - 1)),
        high=2.0 ** (bits - 1) - 1, dtype="int8", storage=storage,
    )  # fmt: skip


def _float(name: str, high: float, dtype: str) -> Format:
    return Format(name=name, bits=8, kind="float", low=-high, high=high, dtype=dtype, storage=dtype)


def _codebook(name: str, table: tuple[float, ...]) -> Format:
    return Format(
        name=name, bits=4, kind="codebook", low=min(table), high=max(table), dtype="int8",
        storage="uint8", table=table,
    )  # fmt: skip


INT2, INT3 = _integer(2, "uint8"), _integer(3, "uint8")
INT4, INT8 = _integer(4, "int4"), _integer(8, "int8")
E4M3, E5M2 = _float("e4m3", 448.0, "float8_e4m3fn"), _float("e5m2", 57344.0, "float8_e5m2")
NF4, E2M1 = _codebook("nf4", _NF4), _codebook("e2m1", _E2M1)

_ALL = {f.name: f for f in (INT2, INT3, INT4, INT8, E4M3, E5M2, NF4, E2M1)}
NAMES = tuple(_ALL)


def format_named(name: str) -> Format:
    """Finds a format by its name.

    Raises:
      ValueError: no format has that name.

    >>> format_named("int4").high
    7.0
    """
    if name not in _ALL:
        raise ValueError(f"unknown number format {name!r}: qjax has {', '.join(_ALL)}")
    return _ALL[name]


def encode(values: Float[Array, "*shape"], fmt: Format) -> Shaped[Array, "*shape"]:
    """Rounds each value to the nearest one that the format holds, and gives its code.

    Ties go to the even code; values beyond the range, infinities too, saturate. NaN has no code:
    callers refuse it before.

    Args:
      values: already divided by their scale (and shifted by their zero).
      fmt: the target format.

    Returns:
      Unpacked codes of dtype ``fmt.dtype``.

    Example:
      >>> encode(jnp.array([0.5, 1.5, 9.0]), INT4).tolist()
      [0, 2, 7]
    """
    # In float32 every midpoint between neighbouring integers or 8-bit floats is exact, so one
    # rounding is all.
    clipped = jnp.clip(values.astype(jnp.float32), fmt.low, fmt.high)
    match fmt.kind:
        case "integer":
            return jnp.round(clipped).astype(fmt.dtype)
        case "float":
            return nearest(clipped, fmt.dtype).astype(fmt.dtype)
        case "codebook":
            return _nearest_entry(clipped, fmt)


def nearest(values: Float[Array, "*shape"], dtype: Any) -> Float[Array, "*shape"]:
    """What a narrower float dtype holds of float32 values, as float32; ties go to the even one.

    That is ``values.astype(dtype).astype(float32)``, but where both stand in one program, XLA on a GPU
    leaves them out (``xla_allow_excess_precision``, jax 0.11.2): what is made and read there would not be
    rounded at all. Of what this gives the conversions are exact, and it does not matter what becomes of
    them.

    Args:
      values: within the range of the dtype, else it is up to the conversion what becomes of them.
      dtype: a float of 32 bits or fewer.

    Example:
      >>> nearest(jnp.array([1.0625, 1.1, 0.001]), jnp.float8_e4m3fn).tolist()
      [1.0, 1.125, 0.001953125]
    """
    info = jnp.finfo(dtype)
    if info.nmant >= jnp.finfo(jnp.float32).nmant:
        return values
    if info.nexp == jnp.finfo(jnp.float32).nexp:
        return lax.reduce_precision(values, info.nexp, info.nmant)
    # reduce_precision flushes subnormals. Neighbours in a binade [2^e, 2^(e+1)) lie 2^(e - nmant) apart.
    exponent = lax.bitcast_convert_type(values, jnp.uint32) & 0x7F800000
    binade = jnp.maximum(
        lax.bitcast_convert_type(exponent, jnp.float32), float(info.smallest_normal)
    )
    apart = binade * 2.0**-info.nmant
    return jnp.where(jnp.isfinite(values), jnp.round(values / apart) * apart, values)


def decode(codes: Shaped[Array, "*shape"], fmt: Format) -> Float[Array, "*shape"]:
    """The float32 value of each unpacked code; exact for every format.

    >>> decode(jnp.array([7, 15], jnp.int8), E2M1).tolist()
    [6.0, -6.0]
    """
    if fmt.kind == "codebook":
        return jnp.asarray(fmt.table, jnp.float32)[codes]
    return codes.astype(jnp.float32)


def _nearest_entry(values: Float[Array, "*shape"], fmt: Format) -> Integer[Array, "*shape"]:
    """Index of the nearest table entry, the even index of two equally near."""
    order = np.argsort(fmt.table, kind="stable").astype(np.int8)
    # -0.0 is an entry of its own that no value needs: +0.0 (the lower index) stands for both.
    order = order[[0, *(np.flatnonzero(np.diff(np.asarray(fmt.table)[order])) + 1)]]
    ladder = np.asarray(fmt.table, np.float32)[order].astype(np.float64)
    midpoints = (ladder[1:] + ladder[:-1]) / 2
    # A float32 value lies above a midpoint when it lies above the last float32 not beyond it.
    bounds = midpoints.astype(np.float32)
    bounds = np.where(bounds > midpoints, np.nextafter(bounds, np.float32(-np.inf)), bounds)
    position = sum((values > bound).astype(jnp.int8) for bound in bounds)
    # A tie has just failed `>` and sits on the lower rung; it moves up if the upper code is even.
    moves_up = bounds[(bounds == midpoints) & (order[1:] % 2 == 0)]
    position += sum((values == bound).astype(jnp.int8) for bound in moves_up)
    return jnp.asarray(order)[position]


def device_bytes(tree: Any) -> int:
    """Bytes that the arrays of a pytree take on the device.

    Not their ``nbytes``: that counts a byte for each int4, of which XLA keeps two in one.

    >>> device_bytes([jnp.zeros(3, jnp.int4), jnp.zeros(3, jnp.bfloat16)])
    8
    """

    def size(leaf: Any) -> int:
        dtype = jnp.dtype(leaf.dtype)
        bits = 4 if dtype == jnp.int4 else 8 * dtype.itemsize
        return -(-math.prod(leaf.shape) * bits // 8)

    return sum(map(size, jax.tree.leaves(tree)))
