# SPDX-License-Identifier: Apache-2.0
"""Emits a kernel of :mod:`pallas_kernels.machine` into a Mosaic GPU kernel, and launches it."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, nvvm, scf

from pallas_kernels.machine import Half, Machine, Operand, Rows
from pallas_kernels.mosaic_machine import ptx
from pallas_kernels.mosaic_machine.reals import MosaicReals
from pallas_kernels.mosaic_machine.words import (
    MosaicPointer,
    MosaicWord,
    address_of,
    byte_count,
    index_of,
    integer,
    raw,
    value_of,
    wrapped,
)

# The upper half of descriptors: how rows are swizzled (128 bytes: 1; 64 bytes: 2), and sixteens of bytes
# from eight rows to the next.
_WIDE_ROWS = 1 << 30 | 1024 >> 4
_SHORT_ROWS = (2 << 30 | 512 >> 4) - 2**32  # as MLIR takes it: with a sign
_PART_BARRIER = 15  # the named barrier of the first threads of a block in two parts


def launch(
    program: Callable[..., None],
    operands: Sequence[jax.Array],
    out: jax.ShapeDtypeStruct,
    *,
    grid: tuple[int, int],
    threads: int,
    shared: int,
    name: str,
) -> jax.Array:
    """Runs a program on every block of a grid, on a GPU.

    Args:
      program: a kernel of a machine, the operands and the output.
      operands: global arrays to read.
      out: shape and float dtype of the output.
      grid: blocks along each axis.
      threads: of a block; a multiple of 128, whole warpgroups.
      shared: words of shared memory.
      name: what profilers call the kernel.
    """

    def body(*refs: Any) -> None:
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))
        def emit(context: Any, *refs: ir.Value) -> None:
            *arrays, scratch = refs
            program(MosaicMachine(context, scratch, grid), *arrays)

        emit(*refs)

    body.__name__ = name
    kernel = plgpu.kernel(
        body,
        out_type=out,
        grid=(grid[0] * grid[1],),
        grid_names=("block",),
        num_threads=threads // 128,
        thread_name="warpgroup",
        scratch_types=(plgpu.SMEM((shared,), jnp.uint32),),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    return kernel(*operands)


class MosaicMachine(MosaicReals, Machine):
    """One block of threads; see :class:`pallas_kernels.machine.Machine`."""

    def __init__(self, context: Any, shared: ir.Value, grid: tuple[int, int]):
        """Begins to emit at MLIR's current place.

        Args:
          context: Mosaic's of the launch.
          shared: memref of the block's shared memory, of words.
          grid: blocks along each axis; the launch has them in one row, the second axis fastest, so that
            blocks of the same weights run at the same time.
        """
        self._context = context
        self._shared = utils.memref_ptr(shared)
        self.thread = MosaicWord(arith.index_cast(ptx.i32(), gpu.thread_id(gpu.Dimension.x)))
        self.warp = MosaicWord(utils.warp_idx(sync=True))
        block = MosaicWord(arith.index_cast(ptx.i32(), gpu.block_id(gpu.Dimension.x)))
        self.block = (block // grid[1], block % grid[1])
        self._barrier = "bar.sync 0;"

    def pointer(self, array: ir.Value, word: MosaicWord) -> MosaicPointer:
        """The address of a word."""
        return MosaicPointer(arith.addi(address_of(array), byte_count(word, 4)))

    def store(self, array: ir.Value, index: MosaicWord, value: ir.Value, where: MosaicWord) -> None:
        """One store in a branch: a predicate would need registers that the assembler does not have."""
        dtype = ir.MemRefType(array.type).element_type
        address = arith.addi(
            address_of(array),
            byte_count(index, 4 if dtype == ptx.f32() else 2),
        )
        branch = scf.IfOp(where.value)
        with ir.InsertionPoint(branch.then_block):
            rounded = value if dtype == ptx.f32() else arith.truncf(dtype, value)
            llvm.store(rounded, llvm.inttoptr(ir.Type.parse("!llvm.ptr<1>"), address))
            scf.yield_([])

    def real_at(self, array: ir.Value, index: MosaicWord) -> ir.Value:
        """One load, and what makes a float32 of it."""
        dtype = ir.MemRefType(array.type).element_type
        size = 4 if dtype == ptx.f32() else 2
        address = arith.addi(address_of(array), byte_count(index, size))
        value = llvm.load(dtype, llvm.inttoptr(ir.Type.parse("!llvm.ptr<1>"), address))
        return value if dtype == ptx.f32() else arith.extf(ptx.f32(), value)

    def _shared_place(self, index: MosaicWord, offset: int = 0) -> ir.Value:
        """A constant offset becomes a part of the instruction."""
        dynamic = -(2**31)  # MLIR's mark for an index that is a value
        none, type_ = llvm.GEPNoWrapFlags.none, self._shared.type
        place = llvm.getelementptr(type_, self._shared, [index.value], [dynamic], ptx.i32(), none)
        return llvm.getelementptr(type_, place, [], [offset], ptx.i32(), none) if offset else place

    def shared_store(self, index: MosaicWord, value: MosaicWord, offset: int = 0) -> None:
        """One store."""
        llvm.store(value.value, self._shared_place(index, offset))

    def shared_load(self, index: MosaicWord, offset: int = 0) -> MosaicWord:
        """One load."""
        return MosaicWord(llvm.load(ptx.i32(), self._shared_place(index, offset)))

    def shared_load_row(self, index: MosaicWord, count: int, offset: int = 0) -> list[MosaicWord]:
        """One vector load."""
        row_type = ir.VectorType.get((count,), ptx.i32())
        row = llvm.load(row_type, self._shared_place(index, offset), alignment=4 * count)
        return [MosaicWord(llvm.extractelement(row, integer(i, ptx.i32()))) for i in range(count)]

    def _shared_address(self, index: MosaicWord) -> ir.Value:
        """As the 32-bit address of PTX's `shared` window."""
        return llvm.ptrtoint(ptx.i32(), self._shared_place(index))

    def shared_load_matrices(self, index: MosaicWord) -> list[MosaicWord]:
        """One instruction."""
        text = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0,$1,$2,$3}, [$4];"
        result = llvm.StructType.get_literal([ptx.i32()] * 4)
        address = self._shared_address(index)
        out: Any = llvm.inline_asm(
            result, [address], text, "=r,=r,=r,=r,r,~{memory}", has_side_effects=True
        )
        return [MosaicWord(llvm.extractvalue(ptx.i32(), out, [i])) for i in range(4)]

    def shared_store_matrices(self, index: MosaicWord, words: Sequence[MosaicWord]) -> None:
        """One instruction."""
        count = len(words)
        names = ",".join(f"${i + 1}" for i in range(count))
        text = f"stmatrix.sync.aligned.m8n8.x{count}.trans.shared.b16 [$0], {{{names}}};"
        operands = [self._shared_address(index), *(word.value for word in words)]
        ptx.ordered(text, operands, ",".join("r" * (count + 1)) + ",~{memory}")

    def start_arrivals(self, place: MosaicWord, count: int, threads: int) -> None:
        """Barriers in shared memory."""
        first = self.thread < 1
        for i in range(count):
            address = self._shared_address(place + 2 * i)
            _order_where(first, f"mbarrier.init.shared::cta.b64 [$0], {threads};", [address], "r")
        ptx.ordered("fence.mbarrier_init.release.cluster;", [], "~{memory}")
        ptx.ordered("fence.proxy.async.shared::cta;", [], "~{memory}")

    def one_thread(self, where: MosaicWord | None, body: Callable[[], None]) -> None:
        """A branch that all operands of copies are uniform in: as the assembler wants it."""
        elected = nvvm.elect_sync()
        branch = scf.IfOp(elected if where is None else arith.andi(where.value, elected))
        with ir.InsertionPoint(branch.then_block):
            body()
            scf.yield_([])

    def arrive(self, arrival: MosaicWord) -> None:
        """One instruction."""
        address = self._shared_address(arrival)
        ptx.ordered("mbarrier.arrive.shared::cta.b64 _, [$0];", [address], "r,~{memory}")

    def expect(self, arrival: MosaicWord, nbytes: int) -> None:
        """One instruction."""
        text = f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], {nbytes};"
        ptx.ordered(text, [self._shared_address(arrival)], "r,~{memory}")

    def copy_words(
        self, place: MosaicWord, source: MosaicPointer, count: int, arrival: MosaicWord
    ) -> None:
        """One instruction."""
        text = (
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
            f"[$0], [$1], {4 * count}, [$2];"
        )
        operands = [self._shared_address(place), source.address, self._shared_address(arrival)]
        ptx.ordered(text, operands, "r,l,r,~{memory}")

    def copy_tokens(
        self,
        place: MosaicWord,
        array: ir.Value,
        token: MosaicWord,
        column: MosaicWord,
        tokens: int,
        arrival: MosaicWord,
    ) -> None:
        """The tensor memory accelerator, by Mosaic's hand: it has the descriptor made on the host."""
        self._context.async_copy(
            src_ref=array,
            dst_ref=self._tile(place, array, tokens),
            gmem_slice=self._slice(array, token, column, tokens),
            barrier=self._arrival(arrival),
            swizzle=128,
            arrive=False,
            predicate=None,
        )

    def copy_out(
        self,
        place: MosaicWord,
        array: ir.Value,
        token: MosaicWord,
        output: MosaicWord,
        tokens: int,
    ) -> None:
        """The tensor memory accelerator, likewise."""
        self._context.async_copy(
            src_ref=self._tile(place, array, tokens),
            dst_ref=array,
            gmem_slice=self._slice(array, token, output, tokens),
            swizzle=128,
            predicate=None,
        )

    def wait_for_copies_out(self) -> None:
        """One instruction, for all threads: most have begun none."""
        ptx.ordered("cp.async.bulk.wait_group.read 0;", [], "~{memory}")

    def _tile(self, place: MosaicWord, array: ir.Value, tokens: int) -> ir.Value:
        """128 bytes of so many tokens in shared memory."""
        dtype = ir.MemRefType(array.type).element_type
        shape = (tokens, 128 // utils.bytewidth(dtype))
        tile = ir.MemRefType.get(shape, dtype, memory_space=utils.smem())
        return utils.ptr_as_memref(self._shared_place(place), tile)

    def _slice(
        self, array: ir.Value, token: MosaicWord, column: MosaicWord, tokens: int
    ) -> tuple[utils.DynamicSlice, utils.DynamicSlice]:
        """The same of a global array."""
        columns = 128 // utils.bytewidth(ir.MemRefType(array.type).element_type)
        return (
            utils.DynamicSlice(index_of(token), tokens),
            utils.DynamicSlice(index_of(column), columns),
        )

    def _arrival(self, arrival: MosaicWord) -> utils.BarrierRef:
        zero = integer(0, ptx.i32())
        return utils.BarrierRef(self._shared_place(arrival), zero, zero, 1)

    def wait_for(self, arrival: MosaicWord, turn: MosaicWord) -> None:
        """A loop around an instruction that waits for some time."""
        one = ir.IntegerType.get_signless(1)
        self._arrival(arrival).wait_parity(arith.trunci(one, turn.value))

    def barrier(self) -> None:
        """Of all threads of this machine."""
        ptx.ordered(self._barrier, [], "~{memory}")

    def parted(
        self,
        threads: int,
        registers: tuple[int, int],
        first: Callable[[Machine], None],
        rest: Callable[[Machine], None],
    ) -> None:
        """A branch that whole warpgroups take; only the first have a barrier of their own."""
        branch = scf.IfOp((self.warp < threads // 32).value, has_else=True)
        change = nvvm.SetMaxRegisterAction
        with ir.InsertionPoint(branch.then_block):
            nvvm.setmaxregister(registers[0], change.increase)
            part = copy.copy(self)
            part._barrier = f"bar.sync {_PART_BARRIER}, {threads};"
            first(part)
            scf.yield_([])
        other = branch.else_block
        assert other is not None
        with ir.InsertionPoint(other):
            nvvm.setmaxregister(registers[1], change.decrease)
            rest(self)
            scf.yield_([])

    def warpgroup_barrier(self) -> None:
        """Named barriers 1, 2 and so on; 0 is that of all threads."""
        ptx.ordered("fence.proxy.async.shared::cta;", [], "~{memory}")
        own = self.warp // 4 + 1
        ptx.ordered("bar.sync $0, 128;", [own.value], "r,~{memory}")

    def word(self, value: int) -> MosaicWord:
        """A constant."""
        return MosaicWord(integer(value, ptx.i32()))

    def minimum(self, a: MosaicWord, b: MosaicWord | int) -> MosaicWord:
        """The lesser."""
        return MosaicWord(arith.minui(a.value, value_of(b)))

    def loop(
        self, count: MosaicWord, carry: Sequence[Any], body: Callable[..., Sequence[Any]]
    ) -> list[Any]:
        """A loop of the device; words and reals are carried in registers."""
        index = ir.IndexType.get()
        start, step = integer(0, index), integer(1, index)
        begin = [raw(value) for value in carry]
        op = scf.ForOp(start, arith.index_cast(index, count.value), step, begin)
        with ir.InsertionPoint(op.body):
            i = MosaicWord(arith.index_cast(ptx.i32(), op.induction_variable))
            new = body(i, [wrapped(value) for value in op.inner_iter_args])
            scf.yield_([raw(value) for value in new])
        return [wrapped(value) for value in op.results]

    def from_lane(self, value: ir.Value, lane: MosaicWord) -> ir.Value:
        """One instruction."""
        text = "shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;"
        return ptx.pure(ptx.f32(), [value, lane.value], text, "=f,f,r")

    def as_word(self, value: ir.Value) -> MosaicWord:
        """No instruction."""
        return MosaicWord(arith.bitcast(ptx.i32(), value))

    def as_real(self, bits: MosaicWord) -> ir.Value:
        """No instruction."""
        return arith.bitcast(ptx.f32(), bits.value)

    def rounded(self, integer: MosaicWord) -> ir.Value:
        """One conversion."""
        return arith.sitofp(ptx.f32(), integer.value)

    def half_pair(self, half: Half, low: ir.Value, high: ir.Value) -> MosaicWord:
        """One instruction."""
        text = f"cvt.rn.{ptx.HALF[half]}x2.f32 $0, $1, $2;"
        return MosaicWord(ptx.pure(ptx.i32(), [high, low], text, "=r,f,f"))

    def half_pair_minus(self, half: Half, a: MosaicWord, b: MosaicWord) -> MosaicWord:
        """One instruction for the pair."""
        text = f"sub.rn.{ptx.HALF[half]}x2 $0, $1, $2;"
        return MosaicWord(ptx.pure(ptx.i32(), [a.value, b.value], text, "=r,r,r"))

    def half_pair_times(self, half: Half, a: MosaicWord, b: MosaicWord) -> MosaicWord:
        """One instruction for the pair."""
        text = f"mul.rn.{ptx.HALF[half]}x2 $0, $1, $2;"
        return MosaicWord(ptx.pure(ptx.i32(), [a.value, b.value], text, "=r,r,r"))

    def bytes_of(self, a: MosaicWord, b: MosaicWord, places: int) -> MosaicWord:
        """A permutation of bytes."""
        text = f"prmt.b32 $0, $1, $2, {places:#06x};"
        return MosaicWord(ptx.pure(ptx.i32(), [a.value, b.value], text, "=r,r,r"))

    def lifted(self, word: MosaicWord, mask: int, unit: MosaicWord) -> MosaicWord:
        """Asked for as such: the assembler would make two, with a constant in each."""
        text = f"lop3.b32 $0, $1, {mask:#x}, $2, 0x6a;"
        return MosaicWord(ptx.pure(ptx.i32(), [word.value, unit.value], text, "=r,r,r"))

    def e4m3_as_half(self, word: MosaicWord, which: str) -> MosaicWord:
        """One conversion."""
        names = "{lo, hi}"
        text = f"{{ .reg .b16 lo, hi; mov.b32 {names}, $1; cvt.rn.f16x2.e4m3x2 $0, {which[:2]}; }}"
        return MosaicWord(ptx.pure(ptx.i32(), [word.value], text, "=r,r"))

    def half_as_real(self, half: Half, pair: MosaicWord, which: str) -> ir.Value:
        """A shift for bfloat16, a conversion for float16."""
        if half == "bfloat16":
            bits = pair << 16 if which == "low" else pair & 0xFFFF0000
            return arith.bitcast(ptx.f32(), bits.value)
        names = "{lo, hi}"
        text = f"{{ .reg .b16 lo, hi; mov.b32 {names}, $1; cvt.f32.f16 $0, {which[:2]}; }}"
        return ptx.pure(ptx.f32(), [pair.value], text, "=f,r")

    def mma(
        self, half: Half, a: Sequence[MosaicWord], b: Sequence[MosaicWord], c: Sequence[ir.Value]
    ) -> list[ir.Value]:
        """One tensor-core instruction."""
        kind = ptx.HALF[half]
        text = (
            f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
            "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
        )
        operands = [*(w.value for w in a), *(w.value for w in b), *c]
        result = llvm.StructType.get_literal([ptx.f32()] * 4)
        out = ptx.pure(result, operands, text, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f")
        return [llvm.extractvalue(ptx.f32(), out, [i]) for i in range(4)]

    def mma_int8(
        self, a: Sequence[MosaicWord], b: Sequence[MosaicWord], c: Sequence[MosaicWord]
    ) -> list[MosaicWord]:
        """One tensor-core instruction."""
        text = (
            "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
            "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
        )
        result = llvm.StructType.get_literal([ptx.i32()] * 4)
        operands = [word.value for word in (*a, *b, *c)]
        out = ptx.pure(result, operands, text, ",".join(["=r"] * 4 + ["r"] * 10))
        return [MosaicWord(llvm.extractvalue(ptx.i32(), out, [i])) for i in range(4)]

    def wgmma(
        self,
        kind: Operand,
        a: Sequence[Sequence[MosaicWord]] | Sequence[Rows],
        tile: MosaicWord,
        step: int,
        sums: Sequence[Sequence[Any]] | None,
        tokens: int,
    ) -> list[list[Any]]:
        """One instruction for each i, and the commit of them together."""
        # Registers of A and C must be written before the fence; what LLVM takes for pure it could move.
        in_registers = [words for words in a if not isinstance(words, Rows)]
        flat = [raw(v) for values in (*in_registers, *(sums or ())) for v in values]
        flat = ptx.pinned("wgmma.fence.sync.aligned;", flat)
        size, count = 4 * len(in_registers), tokens // 2
        descriptor = self._descriptor(tile, 8 * step, _WIDE_ROWS)
        results = [
            ptx.wgmma(
                kind,
                [self._descriptor(part.place, part.words + 8 * part.part, _SHORT_ROWS)]
                if isinstance(part, Rows)
                else flat[4 * i : 4 * i + 4],
                descriptor,
                flat[size + count * i :][: count if sums else 0],
                tokens,
            )
            for i, part in enumerate(a)
        ]
        ptx.ordered("wgmma.commit_group.sync.aligned;", [], "")
        return [[wrapped(value) for value in values] for values in results]

    def _descriptor(self, place: MosaicWord, words: int, rows: int) -> ir.Value:
        """Of a K-major operand that lies so many words after a place.

        The constants come in by one addition of the lower half: places of one step share the rest.
        """
        sixteens = MosaicWord(self._shared_address(place)) >> 4
        low = arith.extui(ptx.i64(), (sixteens + (words // 4 | 1 << 16)).value)
        return arith.ori(low, integer(rows << 32, ptx.i64()))

    def wait(self, pending: int, sums: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """What is returned passes through the instruction, so that no use of it comes before."""
        flat = [raw(value) for values in sums for value in values]
        flat = ptx.pinned(f"wgmma.wait_group.sync.aligned {pending};", flat)
        values, count = [wrapped(value) for value in flat], len(sums[0])
        return [values[i : i + count] for i in range(0, len(values), count)]


def _order_where(
    where: MosaicWord, text: str, operands: Sequence[ir.Value], constraints: str
) -> None:
    """The same for threads for which a condition holds: without a branch, so warps stay together."""
    condition = arith.extui(ptx.i32(), where.value)
    guarded = f"{{ .reg .pred p; setp.ne.b32 p, ${len(operands)}, 0; @p {text} }}"
    ptx.ordered(guarded, [*operands, condition], f"{constraints},r,~{{memory}}")
