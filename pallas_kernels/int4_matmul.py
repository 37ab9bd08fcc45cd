# SPDX-License-Identifier: Apache-2.0
"""Products of a few tokens with int4 weights: the weights stream once from memory into registers.

    y[m, n] = sum_k x[m, k] * scale[k // group, n] * (code[k, n] - zero[k // group, n])

For up to 64 tokens nothing but reading the weights has to take time: ``n k / 2`` bytes of codes and ``2
n k / group`` of scales (and as much of zeros), 60 MB at 4096 x 28672, once. Everything else is arranged
so as not to be in the way:

- A warp owns 16 or 32 outputs and a slice of the inputs, and reads its codes straight into registers,
  16 bytes a lane, in the layout of :mod:`pallas_kernels.row_blocks`; ``depth`` chunks of 128 inputs are
  on their way while one is worked on. There is no shared memory, barrier or copy engine between memory
  and arithmetic.
- Two shifts and masks' worth of integer work make a pair of codes a pair of 16-bit floats: 4 bits put
  under the exponent of 128 (bfloat16) or 1024 (float16) are the number 128 + u, and one subtraction of
  pairs takes off 128 + 8, or 128 + zero. Both steps are exact.
- Tokens are the eight columns of ``mma.m16n8k16``. Their values come through the first-level cache,
  where all warps of a block find the same lines; tokens that do not exist repeat the last one and are
  not stored.
- The scale is applied to the float32 sum of a group, not to its weights: exact, and four multiplications
  for 512 weights.
- Slices of the inputs are warps of one block, added up through shared memory in a fixed order: one
  launch, equal results from run to run.
"""

import functools
import importlib.resources
import json
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped, UInt32

from pallas_kernels import mosaic_machine, numpy_machine, row_blocks
from pallas_kernels.machine import Half, Machine, Pointer, Real, Word

CHUNK = 128  # inputs that a warp takes in one step
MOST_TOKENS = 32  # that a block multiplies; more are further blocks, which read the weights again
GROUP_SIZES = (32, 64, 128)
_SHARED_BYTES = 227 * 1024  # of a block on Hopper
BUCKETS = (8, 16, 32, 64)  # of tokens, in the table
_NEAREST_DEVICE = "NVIDIA H100 80GB HBM3"  # for Hopper GPUs that have no table of their own
# 2 ** (mantissa bits) of the 16-bit float, in both halves of a word: the float whose last bits count
# ones.
_UNIT = {"bfloat16": 0x43004300, "float16": 0x64006400}
_LEAST = {"bfloat16": 128, "float16": 1024}  # that float's value


@dataclass(frozen=True, kw_only=True)
class Config:
    """How the work is cut up.

    Attributes:
      rows: warps beside each other, with different outputs and the same inputs.
      slices: warps behind each other, with the same outputs and different inputs.
      blocks: row blocks of 16 outputs that a warp owns; they share what it reads of the tokens.
      depth: chunks of codes that are on their way.
    """

    rows: int
    slices: int
    blocks: int = 1
    depth: int = 1

    @property
    def threads(self) -> int:
        """Of a block: whole warpgroups, the last of which may have idle warps."""
        return 128 * -(-self.rows * self.slices // 4)

    @property
    def outputs(self) -> int:
        """Of a block."""
        return row_blocks.ROWS * self.rows * self.blocks


@dataclass(frozen=True, kw_only=True)
class Product:
    """What is to be computed.

    Attributes:
      m: tokens.
      k: inputs.
      n: outputs.
      group_size: inputs that share a scale; None: all.
      half: dtype of tokens and scales.
      has_zeros: whether groups have a zero of their own, instead of 0.
    """

    m: int
    k: int
    n: int
    group_size: int | None
    half: Half
    has_zeros: bool

    @property
    def tokens(self) -> int:
        """Columns of one block, a multiple of 8."""
        return 8 * -(-min(self.m, MOST_TOKENS) // 8)

    @property
    def groups(self) -> int:
        """Scales of an output."""
        return 1 if self.group_size is None else self.k // self.group_size


def why_not(m: int, k: int, n: int, group_size: int | None, dtype: Any) -> str | None:
    """Why the kernel cannot take a product, in words with the numbers; None if it can."""
    if k % CHUNK:
        return f"{k=} must be divisible by {CHUNK}"
    if n % row_blocks.ROWS:
        return f"{n=} must be divisible by {row_blocks.ROWS}"
    if group_size is not None and group_size not in GROUP_SIZES:
        return f"{group_size=} must be one of {GROUP_SIZES}, or a scale a channel"
    if str(jnp.dtype(dtype)) not in _UNIT:
        return f"tokens are {jnp.dtype(dtype)}, must be {' or '.join(_UNIT)}"
    return None if m else "there are no tokens"


def check(product: Product, config: Config) -> None:
    """Checks that a configuration fits a product.

    Raises:
      ValueError: it does not; with the numbers.
    """
    chunks = product.k // CHUNK
    if chunks % (config.slices * config.depth):
        raise ValueError(
            f"{chunks} chunks of {CHUNK} inputs are not divisible by {config.slices=} x {config.depth=}"
        )
    if config.threads > 1024:
        raise ValueError(f"{config.rows=} x {config.slices=} warps are more than 1024 threads")
    if 4 * _shared(product, config) > _SHARED_BYTES:
        raise ValueError(f"{config} needs more than {_SHARED_BYTES} bytes of shared memory")


def _shared(product: Product, config: Config) -> int:
    """Floats of shared memory: the sums of every warp."""
    return config.threads // 32 * product.tokens * row_blocks.ROWS * config.blocks


def config_for(product: Product, device: str | None = None) -> Config:
    """The tuned configuration of the nearest product in the device's table, else the default one.

    Nearest: the same ``k``, ``n`` and kind of groups, and the number of tokens in the same bucket of
    `BUCKETS`; a configuration that does not fit this very product is passed over.

    Args:
      product: what is to be computed.
      device: as JAX names its kind; None: the default device.
    """
    kind = jax.devices()[0].device_kind if device is None else device
    bucket = next((b for b in BUCKETS if product.m <= b), BUCKETS[-1])
    for entry in _tuned().get(kind, _tuned()[_NEAREST_DEVICE]):
        if (entry["k"], entry["n"], entry["m"]) == (product.k, product.n, bucket):
            config = Config(**entry["config"])
            try:
                check(product, config)
            except ValueError:
                continue
            return config
    return default_config(product)


@functools.cache
def _tuned() -> dict[str, Any]:
    """The committed table: device kind to entries."""
    text = importlib.resources.files("pallas_kernels").joinpath("int4_matmul.json").read_text()
    return json.loads(text)["devices"]


def default_config(product: Product, multiprocessors: int = 132) -> Config:
    """A configuration that fits, for products that no table names.

    One block for each multiprocessor, with the outputs that fall to it, and as many slices as make 16
    warps: that many hide the latency of memory and leave 128 registers to a thread.
    """
    row_count = -(-product.n // (row_blocks.ROWS * multiprocessors))
    blocks = 2 if product.m > 8 and row_count > 1 else 1
    rows = min(-(-row_count // blocks), 16)
    chunks = product.k // CHUNK
    slices = max(s for s in range(1, 16 // rows + 1) if chunks % s == 0)
    depth = 2 if blocks == 1 and chunks // slices % 2 == 0 else 1
    return Config(rows=rows, slices=slices, blocks=blocks, depth=depth)


def int4_matmul_reference(
    x: Float[Array, "m k"],
    words: UInt32[Array, "blocks tiles 32 4"],
    scale: UInt32[Array, "blocks groups 8"],
    zero: UInt32[Array, "blocks groups 8"] | None = None,
    *,
    out_dtype: Any = None,
) -> Float[Array, "m n"]:
    """The definition, in float32; arguments as those of :func:`int4_matmul`."""
    codes = row_blocks.untile_codes(words).astype(jnp.float32)
    k = codes.shape[0]

    def spread(pairs):
        values = row_blocks.untile_pairs(pairs, x.dtype).astype(jnp.float32)
        return jnp.repeat(values, k // values.shape[0], axis=0)

    if zero is not None:
        unit = _LEAST[str(x.dtype)]
        codes = codes - (spread(zero) - unit - 8)
    w = codes * spread(scale)
    return jnp.matmul(x.astype(jnp.float32), w, precision="highest").astype(out_dtype or x.dtype)


def pack_zeros(zero: Shaped[Array, "*layers groups n"], half: Half) -> UInt32[Array, "..."]:
    """Zeros as the kernel takes them: ``unit + 8 + zero`` in the 16-bit float, two to a word.

    Args:
      zero: int4 zeros, -8 to 7.
      half: dtype of the product.
    """
    unit = _LEAST[half]
    return row_blocks.tile_pairs((zero.astype(jnp.float32) + (unit + 8)).astype(half))


def unpack_zeros(words: UInt32[Array, "..."], half: Half) -> Shaped[Array, "*layers groups n"]:
    """Inverse of :func:`pack_zeros`: int8 zeros."""
    unit = _LEAST[half]
    lifted = row_blocks.untile_pairs(words, jnp.dtype(half)).astype(jnp.float32)
    return (lifted - (unit + 8)).astype(jnp.int8)


def int4_matmul(
    x: Float[Array, "m k"],
    words: UInt32[Array, "blocks tiles 32 4"],
    scale: UInt32[Array, "blocks groups 8"],
    zero: UInt32[Array, "blocks groups 8"] | None = None,
    *,
    out_dtype: Any = None,
    config: Config | None = None,
    interpret: bool = False,
) -> Float[Array, "m n"]:
    """``x @ ((codes - zero) * scale)`` on a Hopper GPU.

    Args:
      x: tokens, bfloat16 or float16; made for up to 64 of them.
      words: codes, from :func:`pallas_kernels.row_blocks.tile_codes`.
      scale: scales in ``x``'s dtype, from :func:`pallas_kernels.row_blocks.tile_pairs`; one group, or
        groups of 32, 64 or 128.
      zero: from :func:`pack_zeros`; None: zeros are 0.
      out_dtype: of the result; None: that of ``x``.
      config: how the work is cut up; None: what is tuned for the product, or :func:`default_config`.
      interpret: execute on the CPU, with numpy, outside jit: for tests.

    Returns:
      The product, accumulated in float32 and rounded once.

    Raises:
      ValueError: a shape or a configuration that the kernel cannot take.
    """
    m, k = x.shape
    n = words.shape[0] * row_blocks.ROWS
    if words.shape[1] * row_blocks.COLUMNS != k:
        raise ValueError(
            f"{x.shape=} does not fit weights of {words.shape[1] * row_blocks.COLUMNS} inputs"
        )
    groups = scale.shape[1]
    group_size = None if groups == 1 else k // groups
    if reason := why_not(m, k, n, group_size, x.dtype):
        raise ValueError(reason)
    half: Half = "float16" if x.dtype == jnp.float16 else "bfloat16"
    out_dtype = x.dtype if out_dtype is None else out_dtype
    product = Product(
        m=m, k=k, n=n, group_size=group_size, half=half, has_zeros=zero is not None
    )  # fmt: skip
    config = config_for(product) if config is None else config
    check(product, config)
    operands = [x, words, scale] + ([] if zero is None else [zero])
    program = functools.partial(_int4_matmul_kernel, product=product, config=config)
    grid = (-(-n // config.outputs), -(-m // product.tokens))
    shared = _shared(product, config)
    if interpret:
        out = np.full((m, n), np.nan, out_dtype)
        arrays = [*map(np.asarray, operands), out]
        numpy_machine.run(
            lambda machine: program(machine, *arrays),
            grid=grid, threads=config.threads, shared=shared,
        )  # fmt: skip
        return jnp.asarray(out)
    return mosaic_machine.launch(
        program,
        operands,
        jax.ShapeDtypeStruct((m, n), out_dtype),
        grid=grid,
        threads=config.threads,
        shared=shared,
        name="int4_matmul",
    )


def _int4_matmul_kernel(machine: Machine, *arrays: Any, product: Product, config: Config) -> None:
    """One block: `rows` x `slices` warps; arrays are x, words, scale, zero if there are any, and out."""
    x, words, scale, *zeros, out = arrays
    warps = config.rows * config.slices
    row = machine.warp % config.rows
    piece = machine.minimum(machine.warp // config.rows, config.slices - 1)
    chunks = product.k // CHUNK // config.slices
    first_chunk = piece * chunks
    reader = _Reader.at(machine, product, config, (x, words, scale, *zeros), row, first_chunk)

    zero_sums = [machine.real(0.0)] * (4 * config.blocks * (product.tokens // 8))
    weights = [reader.weights(step) for step in range(config.depth)]

    def unrolled(reader: _Reader, weights: list[Any], sums: list[Real], *, more: bool):
        for step in range(config.depth):
            sums = _multiply_chunk(machine, product, config, reader, step, weights[step], sums)
            if more:
                weights[step] = reader.weights(config.depth + step)
        return weights, sums

    def body(i: Word, carry: list[Any]) -> list[Any]:
        flat, sums = carry[: -len(zero_sums)], carry[-len(zero_sums) :]
        size = len(flat) // config.depth
        weights = [flat[size * step : size * (step + 1)] for step in range(config.depth)]
        weights, sums = unrolled(reader.advanced(i * config.depth), weights, sums, more=True)
        return [*(word for step in weights for word in step), *sums]

    rounds = chunks // config.depth - 1
    # A warp beyond the last slice has nothing to add; what it does once is not read.
    count = machine.word(rounds) if 32 * warps == config.threads else _if(machine, warps, rounds)
    carry = [*(word for step in weights for word in step), *zero_sums]
    carry = machine.loop(count, carry, body) if rounds else carry
    flat, sums = carry[: -len(zero_sums)], carry[-len(zero_sums) :]
    size = len(flat) // config.depth
    weights = [list(flat[size * step : size * (step + 1)]) for step in range(config.depth)]
    last = reader.advanced(machine.word(rounds * config.depth))
    _, sums = unrolled(last, weights, sums, more=False)
    if product.group_size is None:
        sums = reader.scaled(sums)
    _add_slices(machine, product, config, sums, out)


def _if(machine: Machine, warps: int, rounds: int) -> Word:
    """`rounds` for the first `warps` warps, 0 for the others."""
    idle = machine.minimum(machine.warp // warps, 1)
    return (machine.word(1) + idle * 0xFFFFFFFF) * rounds


@dataclass(frozen=True)
class _Reader:
    """Where a lane reads."""

    machine: Machine
    product: Product
    codes: list[Pointer]  # of each row block
    pairs: list[list[Pointer]]  # of each row block: scales, and zeros if there are any
    tokens: list[Pointer]  # of each eight tokens

    @staticmethod
    def at(
        machine: Machine, product: Product, config: Config, arrays: Any, row: Word, chunk: Word
    ) -> "_Reader":
        """The places at which a lane begins: its warp's row blocks, at a chunk of the inputs."""
        x, words, *pair_arrays = arrays
        lane = machine.thread % 32
        g, quad = lane // 4, lane % 4
        last = product.n // row_blocks.ROWS - 1
        first = (machine.block[0] * config.rows + row) * config.blocks
        rows = [machine.minimum(first + i, last) for i in range(config.blocks)]
        tiles = product.k // row_blocks.COLUMNS
        group = (
            chunk * (product.groups * CHUNK // product.k) if product.group_size else machine.word(0)
        )
        columns = [
            machine.block[1] * product.tokens + g + 8 * i for i in range(product.tokens // 8)
        ]
        return _Reader(
            machine=machine,
            product=product,
            codes=[machine.pointer(words, (r * tiles + chunk * 2) * 128 + lane * 4) for r in rows],
            pairs=[
                [machine.pointer(a, (r * product.groups + group) * 8 + g) for a in pair_arrays]
                for r in rows
            ],
            tokens=[
                machine.pointer(
                    x, machine.minimum(t, product.m - 1) * (product.k // 2) + chunk * 64 + quad * 4
                )
                for t in columns
            ],
        )

    def advanced(self, chunks: Word) -> "_Reader":
        """The same places some chunks on."""
        words = 8 * CHUNK // self.product.group_size if self.product.group_size else 0
        return _Reader(
            machine=self.machine,
            product=self.product,
            codes=[p.advanced(chunks * 256) for p in self.codes],
            pairs=[[p.advanced(chunks * words) for p in ps] if words else ps for ps in self.pairs],
            tokens=[p.advanced(chunks * (CHUNK // 2)) for p in self.tokens],
        )

    def weights(self, chunk: int) -> list[Word]:
        """Everything of the weights in a chunk: for each row block 8 words of codes, then the pairs."""
        group_size = self.product.group_size
        groups = CHUNK // group_size if group_size else 0
        loaded = []
        for codes, pairs in zip(self.codes, self.pairs, strict=True):
            for half in range(2):
                loaded += codes.load(256 * chunk + 128 * half, 4, once=True)
            for pointer in pairs:
                for group in range(groups):
                    loaded += pointer.load(8 * (groups * chunk + group), 1)
        return loaded

    def scaled(self, sums: list[Real]) -> list[Real]:
        """Sums times the one scale of their output."""
        zero, result = self.machine.real(0.0), []
        per_block = len(sums) // len(self.pairs)
        for i, (scale, *_) in enumerate(self.pairs):
            (pair,) = scale.load(0, 1)
            result += _scaled(
                self.machine, self.product.half, sums[i * per_block :][:per_block], pair,
                [zero] * per_block,
            )  # fmt: skip
        return result


def _scaled(
    machine: Machine, half: Half, parts: list[Real], pair: Word, sums: list[Real]
) -> list[Real]:
    """``sums + parts * scale``; of each four parts two belong to the low output, two to the high one."""
    low, high = (machine.half_as_real(half, pair, which) for which in ("low", "high"))
    return [
        machine.fma(part, high if i % 4 > 1 else low, total)
        for i, (part, total) in enumerate(zip(parts, sums, strict=True))
    ]


def _multiply_chunk(
    machine: Machine,
    product: Product,
    config: Config,
    reader: _Reader,
    chunk: int,
    weights: list[Word],
    sums: list[Real],
) -> list[Real]:
    """Adds the products of 128 inputs with all row blocks of a warp."""
    group_size = product.group_size
    groups = CHUNK // group_size if group_size else 0
    size = len(weights) // config.blocks
    eights = product.tokens // 8
    zero = machine.real(0.0)
    blank = [zero] * (4 * eights)
    totals = [sums[4 * eights * i :][: 4 * eights] for i in range(config.blocks)]
    parts = [list(blank) if groups else total for total in totals]
    for quarter in range(4):  # of 32 inputs
        tokens = [p.load(64 * chunk + 16 * quarter, 4) for p in reader.tokens]
        group = quarter * groups // 4
        for i in range(config.blocks):
            block = weights[size * i :][:size]
            offsets = _offsets(machine, product, block, group if groups else None, reader, i)
            for j in range(2):
                a = _unpacked(machine, product.half, block[2 * quarter + j], offsets)
                for t in range(eights):
                    b = tokens[t][2 * j : 2 * j + 2]
                    part = machine.mma(product.half, a, b, parts[i][4 * t : 4 * t + 4])
                    parts[i] = [*parts[i][: 4 * t], *part, *parts[i][4 * t + 4 :]]
            if groups and (quarter + 1) * groups % 4 == 0:
                totals[i] = _scaled(machine, product.half, parts[i], block[8 + group], totals[i])
                parts[i] = list(blank)
    return [value for total in (totals if groups else parts) for value in total]


def _offsets(
    machine: Machine,
    product: Product,
    block: list[Word],
    group: int | None,
    reader: _Reader,
    row_block: int,
) -> tuple[Word, Word]:
    """What is subtracted from the codes of the low and the high output, in both halves of a word."""
    if not product.has_zeros:
        same = machine.word(_UNIT[product.half] + 0x00080008)
        return same, same
    if group is None:
        (pair,) = reader.pairs[row_block][1].load(0, 1)
    else:
        assert product.group_size is not None
        pair = block[8 + CHUNK // product.group_size + group]
    return machine.twice(pair, "low"), machine.twice(pair, "high")


def _unpacked(machine: Machine, half: Half, word: Word, offsets: tuple[Word, Word]) -> list[Word]:
    """The four pairs of 16-bit floats of eight codes, in the order of the A operand."""
    pairs = []
    for i in range(4):
        lifted = ((word >> (4 * i) if i else word) & 0x000F000F) | _UNIT[half]
        pairs.append(machine.half_pair_minus(half, lifted, offsets[i % 2]))
    return pairs


def _add_slices(
    machine: Machine, product: Product, config: Config, sums: list[Real], out: Any
) -> None:
    """Adds up what the warps behind each other have, and stores it.

    Shared memory is an array ``[warp, token, output of the warp]``.
    """
    own = row_blocks.ROWS * config.blocks  # outputs of a warp
    lane = machine.thread % 32
    g, quad = lane // 4, lane % 4
    eights = product.tokens // 8
    for i, value in enumerate(sums):
        row_block, eight, place = i // (4 * eights), i // 4 % eights, i % 4
        token = quad * 2 + (8 * eight + place % 2)
        output = g + (row_blocks.ROWS * row_block + 8 * (place // 2))
        machine.shared_store((machine.warp * product.tokens + token) * own + output, value)
    machine.barrier()
    for start in range(0, config.outputs * product.tokens, config.threads):
        place = machine.minimum(machine.thread + start, config.outputs * product.tokens - 1)
        token, output = place // config.outputs, place % config.outputs
        total = None
        for piece in range(config.slices):
            warp = output // own + piece * config.rows
            part = machine.shared_load((warp * product.tokens + token) * own + output % own)
            total = part if total is None else machine.plus(total, part)
        m, n = machine.block[1] * product.tokens + token, machine.block[0] * config.outputs + output
        inside = machine.thread + start < config.outputs * product.tokens
        machine.store(out, m * product.n + n, total, inside & (m < product.m) & (n < product.n))
