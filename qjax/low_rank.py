# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters: a frozen weight, and beside it a trained correction of few parameters.

    y = x . W + s (x . A) . B,        s = alpha / rank,        A [k, rank],  B [rank, n]

``W`` stays as it is: in 4 bits (QLoRA), or plain (LoRA). ``B`` starts with zeros, so that an adapted
layer begins as exactly the layer that it was; ``W + s A B`` is the weight that it ends as.

=============================  ==================================================================
papers                         here
=============================  ==================================================================
W_0, d x k (LoRA)              the layer's kernel, inputs first: ``[k, n]``
A, r x k;  B, d x r (LoRA)     ``lora_a [k, rank]``, ``lora_b [rank, n]``: transposed like the kernel
alpha / r (LoRA, section 4.1)  ``Adapter.scaling``
L_1 L_2, s (QLoRA, eq. 3, 5)   ``lora_a lora_b``, ``Adapter.scaling``
doubleDequant(c_1, c_2, W)     :func:`qjax.dequantize`, in the product and again in its backward pass:
(QLoRA, eq. 5, 6)              what is kept between the two are the codes
=============================  ==================================================================

``A`` is drawn as the authors of LoRA draw it in their code, uniformly with variance ``1 / (3 k)``; the
paper speaks of a Gaussian. Two things of QLoRA are not here. The scales of a group are not quantized
a second time: they stay in the weight's dtype, which for nf4 in groups of 64 and bfloat16 is 0.25 bits a
weight; the paper's 8-bit scales in groups of 256 take 0.127, so 0.123 bits a weight could be saved, of
4.25. And optimizer states are not paged: XLA plans memory before a program runs.

``flax.nnx.LoRA`` wraps a layer, whose path then becomes ``q_proj/base_module``, knows no alpha, and
sums over one axis. Its variable type is used, and so are its names ``lora_a`` and ``lora_b``.

References:
  Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen, LoRA: Low-Rank Adaptation of Large Language
  Models, 2021, https://arxiv.org/abs/2106.09685.
  Dettmers, Pagnoni, Holtzman, Zettlemoyer, QLoRA: Efficient Finetuning of Quantized LLMs, 2023,
  https://arxiv.org/abs/2305.14314.
"""

import math
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from qjax import ops, qtensor
from qjax.qtensor import QTensor
from qjax.subscripts import letters

HOOKS = ("dot_general", "einsum_op")


class Factors(NamedTuple):
    """Both halves of a correction.

    Attributes:
      a: ``[*lead, k, rank]``; lead are axes of a batch of weights, or of stacked layers.
      b: ``[*lead, rank, n]``.
    """

    a: Float[Array, "*lead k rank"]
    b: Float[Array, "*lead rank n"]


@dataclass(frozen=True, kw_only=True)
class KernelAxes:
    """What the axes of a kernel are there for; each of them is in one of the three.

    Attributes:
      lead: of a batch, or of stacked layers.
      summed: over which the product sums.
      free: the outputs.
    """

    lead: tuple[int, ...]
    summed: tuple[int, ...]
    free: tuple[int, ...]

    def sides(self, shape: Sequence[int]) -> tuple[int, int]:
        """``k`` and ``n`` of a kernel: its inputs and outputs."""
        k, n = (math.prod(shape[i] for i in axes) for axes in (self.summed, self.free))
        return k, n


def initial(
    key: Array, shape: Sequence[int], axes: KernelAxes, rank: int, dtype: DTypeLike = jnp.float32
) -> Factors:
    """The factors that training starts from: their product is zero.

    Args:
      key: of jax.random.
      shape: of the kernel.
      axes: of the kernel.
      rank: of the correction, at least 1.
      dtype: of the factors.

    Raises:
      ValueError: the rank is below 1, or more than one side of the kernel.

    Example:
      >>> axes = KernelAxes(lead=(), summed=(0,), free=(1, 2))
      >>> factors = initial(jax.random.key(0), (8, 2, 3), axes, 4)
      >>> factors.a.shape, factors.b.shape
      ((8, 4), (4, 6))
    """
    k, n = axes.sides(shape)
    if not 1 <= rank <= min(k, n):
        raise ValueError(
            f"a weight of {k} inputs and {n} outputs has corrections of rank 1 to {min(k, n)}, "
            f"got {rank}"
        )
    lead = tuple(shape[i] for i in axes.lead)
    bound = 1 / math.sqrt(k)
    a = jax.random.uniform(key, (*lead, k, rank), jnp.float32, -bound, bound)
    return Factors(a.astype(dtype), jnp.zeros((*lead, rank, n), dtype))


def merged(
    w: Float[Array, "..."] | QTensor, factors: Factors, scaling: float, axes: KernelAxes
) -> Float[Array, "..."]:
    """``W + s A B``, summed in float32 and rounded once to the dtype of the weight.

    Args:
      w: the kernel; a quantized one is dequantized.
      factors: of its correction.
      scaling: s.
      axes: of the kernel.
    """
    order = (*axes.lead, *axes.summed, *axes.free)
    correction = jnp.matmul(
        factors.a.astype(jnp.float32), factors.b.astype(jnp.float32), precision="highest"
    )
    correction = correction.reshape([w.shape[i] for i in order])
    correction = jnp.transpose(correction, [order.index(i) for i in range(w.ndim)])
    base = qtensor.dequantize(w, jnp.float32) if isinstance(w, QTensor) else w.astype(jnp.float32)
    return (base + scaling * correction).astype(w.dtype)


class Adapter(nnx.Module):
    """What stands in a layer's hook: the product that was there, and a correction.

    Attributes:
      base: the hook that was there; None: none was.
      alpha: numerator of the scaling.
      lora_a: ``A``.
      lora_b: ``B``.
    """

    def __init__(self, base: Callable[..., Any] | None, factors: Factors, alpha: float):
        """Holds the factors as variables to be trained."""
        self.base = base
        self.alpha = alpha
        self.lora_a = nnx.LoRAParam(factors.a)
        self.lora_b = nnx.LoRAParam(factors.b)

    @property
    def rank(self) -> int:
        """Of the correction."""
        return self.lora_a.get_value().shape[-1]

    @property
    def scaling(self) -> float:
        """``alpha / rank``."""
        return self.alpha / self.rank

    @property
    def factors(self) -> Factors:
        """``A`` and ``B`` as arrays."""
        return Factors(self.lora_a.get_value(), self.lora_b.get_value())

    def added(
        self,
        product: Callable[[Any, Any], Array],
        x: Shaped[Array, "..."],
        w: Any,
        names: tuple[str, str, str],
    ) -> Float[Array, "..."]:
        """``product(x, w) + s (x . A) . B``.

        Args:
          product: of activations and kernel.
          x: activations.
          w: kernel, plain or quantized.
          names: of the axes of ``x``, of the kernel and of the result, a letter each.
        """
        if isinstance(w, QTensor):
            # The backward pass needs W once more. Left to itself JAX keeps what was dequantized in the
            # forward pass until then, which is all of the model; this keeps the codes. (On a CPU XLA
            # sees through it and keeps the weights.)
            product = jax.checkpoint(product)
        y = product(x, w)
        return y + self._correction(x, w.shape, names, y.dtype)

    def _correction(
        self,
        x: Shaped[Array, "..."],
        shape: tuple[int, ...],
        names: tuple[str, str, str],
        dtype: DTypeLike,
    ) -> Float[Array, "..."]:
        in_x, in_w, in_y = names
        lead = "".join(c for c in in_w if c in in_x and c in in_y)
        summed = "".join(c for c in in_w if c in in_x and c not in in_y)
        free = "".join(c for c in in_w if c not in in_x)
        rank = next(c for c in string.ascii_letters if c not in in_x + in_w + in_y)
        lengths = dict(zip(in_w, shape, strict=True)) | {rank: self.rank}
        in_a, in_b = lead + summed + rank, lead + rank + free
        a, b = (
            factor.reshape([lengths[c] for c in names]).astype(x.dtype)
            for factor, names in zip(self.factors, (in_a, in_b), strict=True)
        )
        in_few = "".join(c for c in in_x if c not in summed) + rank
        few = ops.einsum(f"{in_x},{in_a}->{in_few}", x, a, preferred_element_type=jnp.float32)
        few = (few * self.scaling).astype(x.dtype)  # here, where the numbers are fewest
        return ops.einsum(f"{in_few},{in_b}->{in_y}", few, b, preferred_element_type=dtype)


class AdaptedDot(Adapter):
    """The ``dot_general=`` of an adapted ``nnx.Linear`` or ``nnx.LinearGeneral``."""

    def __call__(
        self, x: Shaped[Array, "..."], w: Any, dimension_numbers: Any, **options: Any
    ) -> Float[Array, "..."]:
        """The adapted product; arguments as those of ``jax.lax.dot_general``."""
        # An nnx.LinearGeneral may have none of its own.
        base = lax.dot_general if self.base is None else self.base

        def product(x: Any, w: Any) -> Array:
            return base(x, w, dimension_numbers, **options)

        return self.added(product, x, w, _names(dimension_numbers, x.ndim, w.ndim))


class AdaptedEinsum(Adapter):
    """The ``einsum_op=`` of an adapted ``nnx.Einsum``."""

    def __call__(
        self, subscripts: str, x: Shaped[Array, "..."], w: Any, **options: Any
    ) -> Float[Array, "..."]:
        """The adapted product; arguments as those of ``jnp.einsum``."""
        base = jnp.einsum if self.base is None else self.base

        def product(x: Any, w: Any) -> Array:
            return base(subscripts, x, w, **options)

        in_x, in_w, in_y = map("".join, letters(subscripts, x.ndim, w.ndim))
        return self.added(product, x, w, (in_x, in_w, in_y))


def _names(dimension_numbers: Any, x_ndim: int, w_ndim: int) -> tuple[str, str, str]:
    """A letter for each axis of the operands of a ``dot_general``, and of its result."""
    (x_summed, w_summed), (x_batch, w_batch) = dimension_numbers
    in_x = list(string.ascii_letters[:x_ndim])
    in_w = list(string.ascii_letters[x_ndim : x_ndim + w_ndim])
    for i, j in zip((*x_summed, *x_batch), (*w_summed, *w_batch), strict=True):
        in_w[j] = in_x[i]
    batch = [in_x[i] for i in x_batch]
    own_x, own_w = ([c for c in a if c not in b] for a, b in ((in_x, in_w), (in_w, in_x)))
    return "".join(in_x), "".join(in_w), "".join(batch + own_x + own_w)


def adapter_of(layer: nnx.Module) -> Adapter | None:
    """The adapter in a layer's hook; None: there is none.

    >>> adapter_of(nnx.Linear(2, 2, rngs=nnx.Rngs(0))) is None
    True
    """
    hooks = (getattr(layer, name, None) for name in HOOKS)
    return next((hook for hook in hooks if isinstance(hook, Adapter)), None)
