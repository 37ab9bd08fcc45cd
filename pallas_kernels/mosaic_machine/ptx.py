# SPDX-License-Identifier: Apache-2.0
"""Instructions of PTX inside MLIR: those that may be moved, and those that keep their place."""

from collections.abc import Sequence
from typing import Any

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels.machine import Operand

HALF = {"bfloat16": "bf16", "float16": "f16"}  # how PTX calls them


def i32() -> ir.Type:
    """Of words."""
    return ir.IntegerType.get_signless(32)


def i64() -> ir.Type:
    """Of addresses."""
    return ir.IntegerType.get_signless(64)


def f32() -> ir.Type:
    """Of reals."""
    return ir.F32Type.get()


def pure(result: ir.Type, operands: Sequence[ir.Value], text: str, constraints: str) -> Any:
    """An instruction that LLVM may move, or leave out where nobody uses its result."""
    return llvm.inline_asm(result, list(operands), text, constraints, has_side_effects=False)


def ordered(text: str, operands: Sequence[ir.Value], constraints: str) -> None:
    """An instruction that keeps its place among others with side effects."""
    void = ir.Type.parse("!llvm.void")
    llvm.inline_asm(void, list(operands), text, constraints, has_side_effects=True)


def pinned(text: str, values: Sequence[ir.Value]) -> list[Any]:
    """An instruction through which values pass unchanged: they are computed before, and used after it."""
    kinds = ["f" if value.type == f32() else "r" for value in values]
    constraints = ",".join([f"={kind}" for kind in kinds] + [str(i) for i in range(len(kinds))])
    result = llvm.StructType.get_literal([value.type for value in values])
    out: Any = llvm.inline_asm(result, list(values), text, constraints, has_side_effects=True)
    return [llvm.extractvalue(value.type, out, [i]) for i, value in enumerate(values)]


def wgmma(
    kind: Operand, a: Sequence[ir.Value], descriptor: ir.Value, c: Sequence[ir.Value], tokens: int
) -> list[Any]:
    """``C + A . B``, under way when it returns; no C: ``A . B``.

    Args:
      kind: dtype of A and B.
      a: four words; or, of 8 bits, a descriptor.
      descriptor: of B.
      c: none, or half as many as tokens.
      tokens: columns of B.
    """
    count, type_ = tokens // 2, i32() if kind == "int8" else f32()
    names = [f"${i}" for i in range(count + len(c) + len(a) + 1)]
    accumulators, rest = ",".join(names[:count]), names[count + len(c) :]
    left = f"{{{','.join(rest[:4])}}}" if len(a) == 4 else rest[0]
    shape = f"m64n{tokens}k{16 if kind in HALF else 32}"
    adds = 1 if c else 0
    dtypes, options = {
        "bfloat16": ("f32.bf16.bf16", ", 1, 1, 0"),
        "float16": ("f32.f16.f16", ", 1, 1, 0"),
        "int8": ("s32.s8.s8", ""),
        "float8_e4m3fn": ("f32.e4m3.e4m3", ", 1, 1"),
    }[kind]
    text = (
        f"wgmma.mma_async.sync.aligned.{shape}.{dtypes} "
        f"{{{accumulators}}}, {left}, {rest[-1]}, {adds}{options};"
    )
    register = "r" if kind == "int8" else "f"
    operands = ["r"] * 4 if len(a) == 4 else ["l"]
    constraints = [f"={register}"] * count + [str(i) for i in range(len(c))] + [*operands, "l"]
    result = llvm.StructType.get_literal([type_] * count)
    out: Any = llvm.inline_asm(
        result, [*c, *a, descriptor], text, ",".join(constraints), has_side_effects=True
    )
    return [llvm.extractvalue(type_, out, [i]) for i in range(count)]
