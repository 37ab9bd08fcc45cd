# SPDX-License-Identifier: Apache-2.0
"""Words of threads and places in global arrays in MLIR: those of :mod:`pallas_kernels.mosaic_machine`."""

from collections.abc import Callable
from typing import Any

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.machine import Pointer
from pallas_kernels.mosaic_machine import ptx


def index_of(word: "MosaicWord") -> ir.Value:
    """A word as MLIR's type of indices."""
    return arith.index_castui(ir.IndexType.get(), word.value)


def integer(value: int, type_: ir.Type) -> ir.Value:
    """A constant."""
    # MLIR takes the attribute's value as signed.
    signed = value - 2**32 if type_ == ptx.i32() and value >= 2**31 else value
    return arith.constant(type_, ir.IntegerAttr.get(type_, signed))


class MosaicWord:
    """A 32-bit unsigned value of each thread, with the operators of integers."""

    def __init__(self, value: ir.Value):
        """Wraps an i32."""
        self.value = value

    def _with(self, operation: Callable[..., Any], other: "MosaicWord | int") -> "MosaicWord":
        return MosaicWord(operation(self.value, value_of(other)))

    def __add__(self, other: "MosaicWord | int") -> "MosaicWord":
        """Sum."""
        return self._with(arith.addi, other)

    def __mul__(self, other: "MosaicWord | int") -> "MosaicWord":
        """Product."""
        return self._with(arith.muli, other)

    def __floordiv__(self, other: "MosaicWord | int") -> "MosaicWord":
        """Quotient."""
        return self._with(arith.divui, other)

    def __mod__(self, other: "MosaicWord | int") -> "MosaicWord":
        """Remainder."""
        return self._with(arith.remui, other)

    def __and__(self, other: "MosaicWord | int") -> "MosaicWord":
        """Bits of both."""
        return self._with(arith.andi, other)

    def __or__(self, other: "MosaicWord | int") -> "MosaicWord":
        """Bits of either."""
        return self._with(arith.ori, other)

    def __xor__(self, other: "MosaicWord | int") -> "MosaicWord":
        """Bits of one alone."""
        return self._with(arith.xori, other)

    def __lshift__(self, other: "MosaicWord | int") -> "MosaicWord":
        """Towards the high bits."""
        return self._with(arith.shli, other)

    def __rshift__(self, other: "MosaicWord | int") -> "MosaicWord":
        """Towards the low bits."""
        return self._with(arith.shrui, other)

    def __lt__(self, other: "MosaicWord | int") -> "MosaicWord":
        """Comparison; the result is a condition."""
        less = arith.CmpIPredicate.ult
        return MosaicWord(arith.cmpi(less, self.value, value_of(other)))


def value_of(word: "MosaicWord | int") -> ir.Value:
    """An i32."""
    return word.value if isinstance(word, MosaicWord) else integer(word, ptx.i32())


class MosaicPointer(Pointer):
    """A 64-bit address of each thread."""

    def __init__(self, address: ir.Value):
        """Wraps an i64."""
        self.address = address

    def load(self, offset: int, count: int, *, once: bool = False) -> list[MosaicWord]:
        """One load instruction; the arrays of a kernel do not change while it runs (`.nc`)."""
        cache = ".L1::no_allocate.L2::128B" if once else ""
        vector, names = (f".v{count}", "{" + ",".join(f"${i}" for i in range(count)) + "}")
        if count == 1:
            vector, names = "", "$0"
        text = f"ld.global.nc{cache}{vector}.b32 {names}, [${count}+{4 * offset}];"
        outs = ",".join(["=r"] * count)
        result = ptx.i32() if count == 1 else llvm.StructType.get_literal([ptx.i32()] * count)
        loaded = ptx.pure(result, [self.address], text, f"{outs},l")
        if count == 1:
            return [MosaicWord(loaded)]
        return [MosaicWord(llvm.extractvalue(ptx.i32(), loaded, [i])) for i in range(count)]

    def load_where(self, offset: int, where: MosaicWord) -> MosaicWord:
        """One predicated load."""
        condition = arith.extui(ptx.i32(), where.value)
        text = (
            "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; "
            f"@p ld.global.nc.b32 $0, [$1+{4 * offset}]; }}"
        )
        return MosaicWord(ptx.pure(ptx.i32(), [self.address, condition], text, "=&r,l,r"))

    def advanced(self, count: MosaicWord | int, each: int = 1) -> "MosaicPointer":
        """Further on, in 64 bits."""
        return MosaicPointer(arith.addi(self.address, byte_count(count, 4 * each)))


def byte_count(index: MosaicWord | int, size: int) -> ir.Value:
    """An index as a 64-bit count of bytes."""
    wide = arith.extui(ptx.i64(), value_of(index))
    return arith.muli(wide, integer(size, ptx.i64()))


def address_of(array: ir.Value) -> ir.Value:
    """Where a global array begins, an i64."""
    return llvm.ptrtoint(ptx.i64(), utils.memref_ptr(array))


def raw(value: Any) -> ir.Value:
    """What MLIR has for a word or a real."""
    return value.value if isinstance(value, MosaicWord) else value


def wrapped(value: ir.Value) -> Any:
    """The other way."""
    return MosaicWord(value) if isinstance(value.type, ir.IntegerType) else value
