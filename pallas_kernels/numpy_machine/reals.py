# SPDX-License-Identifier: Apache-2.0
"""Arithmetic of float32 numbers with numpy: that part of :mod:`pallas_kernels.numpy_machine`."""

import numpy as np
from jaxtyping import Float32

Reals = Float32[np.ndarray, " _threads"]


class NumpyReals:
    """The methods of :class:`pallas_kernels.machine.Machine` from reals to reals."""

    def fma(self, a: Reals, b: Reals, c: Reals) -> Reals:
        """Rounded once."""
        return (a.astype(np.float64) * b + c).astype(np.float32)

    def plus(self, a: Reals, b: Reals) -> Reals:
        """The sum."""
        return a + b

    def times(self, a: Reals, b: Reals) -> Reals:
        """The product."""
        return a * b

    def quotient(self, a: Reals, b: Reals) -> Reals:
        """Rounded to the nearest."""
        return a / b

    def nearest_whole(self, a: Reals) -> Reals:
        """Halves to the even one."""
        return np.rint(a)

    def clipped(self, a: Reals, low: float, high: float) -> Reals:
        """In float32."""
        return np.clip(a, np.float32(low), np.float32(high))
