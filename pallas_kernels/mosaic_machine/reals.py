# SPDX-License-Identifier: Apache-2.0
"""Arithmetic of float32 numbers in MLIR: that part of :mod:`pallas_kernels.mosaic_machine`."""

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels.mosaic_machine import ptx


class MosaicReals:
    """The methods of :class:`pallas_kernels.machine.Machine` from reals to reals."""

    def real(self, value: float) -> ir.Value:
        """A constant."""
        return arith.constant(ptx.f32(), ir.FloatAttr.get(ptx.f32(), value))

    def fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """Rounded once."""
        return ptx.pure(ptx.f32(), [a, b, c], "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f")

    def plus(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """The sum."""
        return arith.addf(a, b)

    def times(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """The product."""
        return arith.mulf(a, b)

    def quotient(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """Rounded to the nearest, as XLA divides."""
        return ptx.pure(ptx.f32(), [a, b], "div.rn.f32 $0, $1, $2;", "=f,f,f")

    def nearest_whole(self, a: ir.Value) -> ir.Value:
        """One conversion."""
        return ptx.pure(ptx.f32(), [a], "cvt.rni.f32.f32 $0, $1;", "=f,f")

    def clipped(self, a: ir.Value, low: float, high: float) -> ir.Value:
        """Two instructions."""
        return arith.minnumf(arith.maxnumf(a, self.real(low)), self.real(high))
