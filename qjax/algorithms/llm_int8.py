# SPDX-License-Identifier: Apache-2.0
"""LLM.int8(): the few inputs with outliers are multiplied in 16 bits, all others in 8.

    X W  ~  sum_{h in O} X_h W_h  +  S sum_{h not in O} X'_h W'_h,     O = {h : max_t |X_th| >= alpha}

==============  ============================================================================
paper           here
==============  ============================================================================
X [s, h]        what the layer multiplies: tokens by inputs
W [h, o]        its weight
O               ``columns``: numbers of the inputs with outliers, ascending
alpha           ``Options.threshold``
X', W'          codes: int8, a scale for each token and for each output, taken without O
S               the product of both scales
==============  ============================================================================

One outlier makes its token's scale so coarse that all its other inputs round to a few codes. There are
few such inputs, the same ones for every token, so 16 bits for them cost little.

Where it differs from the paper, which reads O off each batch as it comes:

- XLA compiles a program for shapes that are known, and O is one. Here each layer's O is chosen once,
  from the maxima over the calibration tokens, and with it how many inputs it has. An input that was
  large there stays in 16 bits for good; one that grows large only later is rounded with the rest.
- Over many tokens more inputs reach the threshold than in one batch. ``Options.capacity`` bounds them:
  the largest are kept, the others are rounded, and the report says how many.
- The weights of O are kept as they are, and the scales of the others do not see them. The authors' code
  holds all of W in int8 and takes those of O back from there.
- 16 bits are those of the model: bfloat16 in most, where the paper has float16. A float32 model keeps
  float32.
- The codes keep a place for O, filled with zeros, and X' has zeros there: so one product of the whole
  width is left, the one that kernels are made for.

The split product is :func:`qjax.dot_general`'s, for any weight that has outliers.

References:
  Dettmers, Lewis, Belkada, Zettlemoyer, LLM.int8(): 8-bit Matrix Multiplication for Transformers at
  Scale, NeurIPS 2022, https://arxiv.org/abs/2208.07339, section 3 and equation 8.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from qjax import formats, outliers
from qjax.algorithms import round_nearest
from qjax.qtensor import QTensor
from qjax.scheme import Scheme


# How much room to leave. The shipped model in float32, with six of the 256 channels of each norm 48 times
# as large and the weights behind them as much smaller; calibrated on [8, 512] tokens of the standard
# library, perplexity over [6, 512] others, 7.4195 unquantized; 2 CPU cores, jax 0.10.2, 2026-11-28:
#
#   capacity 1/64   +7.10 %   8.23 bits of codes and weights: four inputs are kept where six are needed
#            1/32   +0.32 %   8.43
#            1/16   +0.22 %   8.68
#
# Without outliers it loses 0.32 % by rounding to nearest and 0.16 % at 1/32: the inputs of down_proj,
# products of two halves, reach 6.0 in up to all of 768 places, and room is what bounds them.
@dataclass(frozen=True, kw_only=True)
class Options:
    """How LLM.int8() is run.

    Attributes:
      threshold: alpha, the magnitude from which on a value is an outlier; 6.0 in the paper.
      capacity: the share of a layer's inputs that is kept in 16 bits at most, in (0, 1]; at least one
        input is.
    """

    threshold: float = 6.0
    capacity: float = 1 / 16

    def __post_init__(self):  # noqa: D105
        if not self.threshold > 0:
            raise ValueError(f"the threshold of outliers is positive, got {self.threshold}")
        if not 0 < self.capacity <= 1:
            raise ValueError(f"the capacity for outliers lies in (0, 1], got {self.capacity}")


class Chosen(NamedTuple):
    """Which inputs of a layer are kept in 16 bits.

    Attributes:
      columns: their numbers, ascending.
      crowded_out: how many others reach the threshold, for which there is no room.
    """

    columns: Int[np.ndarray, " c"]
    crowded_out: int


def choose(absmax: Float[Array, " k"], options: Options) -> Chosen:
    """The inputs with outliers: those that reach the threshold, the largest where they are too many.

    How many there are depends on the values: not to be called under jit.

    Args:
      absmax: the largest magnitude of each input in calibration.
      options: threshold and capacity.

    Example:
      >>> choose(jnp.array([1.0, 9.0, 7.0, 6.0]), Options(capacity=0.5))
      Chosen(columns=array([1, 2], dtype=int32), crowded_out=1)
    """
    magnitudes = np.asarray(absmax)
    reaching = np.flatnonzero(magnitudes >= options.threshold)
    largest_first = reaching[np.argsort(-magnitudes[reaching], kind="stable")]
    most = max(1, int(options.capacity * len(magnitudes)))
    kept = np.sort(largest_first[:most]).astype(np.int32)
    return Chosen(columns=kept, crowded_out=len(reaching) - len(kept))


def quantize(
    w: Float[Array, "..."],
    scheme: Scheme,
    columns: Int[np.ndarray, " c"],
    *,
    axis: tuple[int, ...],
    name: str = "array",
    **options: Any,
) -> QTensor:
    """Rounds a weight to nearest, but for the inputs with outliers.

    Args:
      w: the weight.
      scheme: of int8 weights and int8 activations (:func:`check`).
      columns: numbers of the inputs to keep, as :mod:`qjax.outliers` counts them; of none the result
        is that of rounding to nearest.
      axis: what a product sums over.
      name: what errors call the weight.
      options: others that :func:`qjax.quantize` takes.

    Returns:
      The QTensor, with outliers.

    Raises:
      ValueError: as :func:`qjax.quantize` does; or weights that are to be kept are not finite.

    Example:
      >>> w = jnp.ones((64, 32), jnp.bfloat16)
      >>> q = quantize(w, Scheme.parse("w8a8"), np.array([5]), axis=(-2,))
      >>> q.outliers.shape, q.nbytes  # codes, scales, a number, weights
      ((1, 32), 2180)
    """
    if len(columns) == 0:
        return round_nearest.quantize(w, scheme, axis=axis, name=name, **options)
    chosen = jnp.asarray(columns)
    rest, held = outliers.split(w, chosen, axis)
    finite = jnp.isfinite(held).all()
    if not isinstance(finite, Tracer) and not bool(finite):
        raise ValueError(f"{name}: weights of inputs with outliers are kept and must be finite")
    q = round_nearest.quantize(rest, scheme, axis=axis, name=name, **options)
    return q.replaced(columns=chosen, outliers=held)


def check(scheme: Scheme) -> None:
    """Checks that a scheme has the two kinds of codes that the paper splits a product into.

    Raises:
      ValueError: weights or activations are not int8, or activations have one scale for all tokens.
    """
    activations = scheme.activations
    kinds = {scheme.weights.format, activations and activations.format}
    if kinds != {formats.INT8} or scheme.is_static:
        raise ValueError(
            f"llm-int8 keeps outliers beside int8 weights and int8 activations: it is for w8a8 (with "
            f"-gN or -tensor), not for {scheme.name}"
        )
