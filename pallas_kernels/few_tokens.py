# SPDX-License-Identifier: Apache-2.0
"""Products of few tokens: the weights stream once from memory into registers.

For up to 32 tokens nothing but reading the weights has to take time: ``n k / 2`` or ``n k`` bytes of
codes and ``2 n k / group`` of scales (and as much of zeros), 60 MB of int4 at 4096 x 28672, once.
Everything else is arranged so as not to be in the way:

- A warp owns 16 or 32 outputs and a slice of the inputs, and reads its codes straight into registers,
  16 bytes a lane, in a layout of :mod:`pallas_kernels.row_blocks`; ``depth`` chunks of 128 inputs are
  on their way while one is worked on. There is no shared memory, barrier or copy engine between memory
  and arithmetic.
- A few integer instructions make codes 16-bit floats, exactly: :mod:`pallas_kernels.operands`. int8 meets
  int8 as it is, in int32 sums, and int4 meets it as int8; float8_e4m3fn meets float8_e4m3fn as float16,
  which holds all its values (it is what the assembler makes of an e4m3 ``mma`` on this GPU, too, but once
  for all tokens).
- Tokens are the eight columns of ``mma.m16n8k16``. Their values come through the first-level cache,
  where all warps of a block find the same lines; tokens that do not exist repeat the last one and are
  not stored.
- The scale is applied to the float32 sum of a group, not to its weights: exact, and four multiplications
  for 512 weights.
- Slices of the inputs are warps of one block, added up through shared memory in a fixed order: one
  launch, equal results from run to run.
"""

from dataclasses import dataclass
from typing import Any

from pallas_kernels import epilogue, operands, row_blocks
from pallas_kernels.device import MULTIPROCESSORS
from pallas_kernels.machine import Machine, Pointer, Real, Sum, Word
from pallas_kernels.product import BLOCK, CHUNK, SHARED_BYTES, Arrays, Product

MOST_COLUMNS = (
    32  # tokens that a block multiplies; more are further blocks, which read the weights again
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """How the work is cut up.

    Attributes:
      rows: warps beside each other, with different outputs and the same inputs.
      slices: warps behind each other, with the same outputs and different inputs.
      blocks: row blocks of 16 outputs that a warp owns; they share what it reads of the tokens.
      depth: chunks of codes that are on their way.
      queue: whether they move up in registers, a chunk a step; else a step takes all of them, and the
        assembler puts its loads where it likes, at worst right before their use.
    """

    rows: int
    slices: int
    blocks: int = 1
    depth: int = 1
    queue: bool = False

    @property
    def threads(self) -> int:
        """Of a block: whole warpgroups, the last of which may have idle warps."""
        return 128 * -(-self.rows * self.slices // 4)

    @property
    def outputs(self) -> int:
        """Of a block."""
        return row_blocks.ROWS * self.rows * self.blocks


def columns(product: Product) -> int:
    """Tokens of one block, a multiple of 8."""
    return 8 * -(-min(product.m, MOST_COLUMNS) // 8)


def grid(product: Product, config: Config) -> tuple[int, int]:
    """Blocks along outputs and tokens."""
    return -(-product.n // config.outputs), -(-product.m // columns(product))


def check(product: Product, config: Config) -> None:
    """Checks that a configuration fits a product.

    Raises:
      ValueError: it does not; with the numbers.
    """
    chunks = product.k // CHUNK
    if chunks % (config.slices * (1 if config.queue else config.depth)):
        raise ValueError(
            f"{chunks} chunks of {CHUNK} inputs are not divisible by {config.slices=} x {config.depth=}"
        )
    if chunks < config.slices * config.depth:
        raise ValueError(
            f"{chunks} chunks of {CHUNK} inputs are fewer than {config.slices=} x {config.depth=}"
        )
    if config.threads > 1024:
        raise ValueError(f"{config.rows=} x {config.slices=} warps are more than 1024 threads")
    if 4 * shared_words(product, config) > SHARED_BYTES:
        raise ValueError(f"{config} needs more than {SHARED_BYTES} bytes of shared memory")


def shared_words(product: Product, config: Config) -> int:
    """Words of shared memory: the sums of every warp."""
    return config.threads // 32 * columns(product) * row_blocks.ROWS * config.blocks


def default_config(product: Product, multiprocessors: int = MULTIPROCESSORS) -> Config:
    """A configuration that fits, for products that no table names.

    int4: one block for each multiprocessor, with the outputs that fall to it, and as many slices as make
    16 warps: that many hide the latency of memory and leave 128 registers to a thread. The sums of more
    than 16 tokens need more registers: 8 warps. With 8 bits there is less to do for each byte: small
    blocks, of 16 outputs, keep memory busier.
    """
    chunks = product.k // CHUNK
    if product.weights != "int4":
        slices = next(s for s in (8, 4, 2, 1) if chunks % s == 0)
        return Config(
            rows=1, slices=slices, depth=1 if product.m > 8 or chunks // slices % 2 else 2
        )
    warps = 16 if columns(product) <= 16 else 8
    row_count = -(-product.n // (row_blocks.ROWS * multiprocessors))
    blocks = 2 if product.m > 8 and row_count > 1 else 1
    rows = min(-(-row_count // blocks), warps)
    slices = max(s for s in range(1, warps // rows + 1) if chunks % s == 0)
    depth = 2 if blocks == 1 and chunks // slices % 2 == 0 else 1
    return Config(rows=rows, slices=slices, blocks=blocks, depth=depth)


def kernel(machine: Machine, arrays: Arrays, product: Product, config: Config) -> None:
    """One block: `rows` x `slices` warps."""
    warps = config.rows * config.slices
    row = machine.warp % config.rows
    piece = machine.minimum(machine.warp // config.rows, config.slices - 1)
    chunks = product.k // CHUNK // config.slices
    reader = _Reader.at(machine, product, config, arrays, row, piece * chunks)

    zero_sums = [_nothing(machine, product)] * (4 * config.blocks * (columns(product) // 8))
    weights = [reader.weights(step) for step in range(config.depth)]
    taken = 1 if config.queue else config.depth  # chunks that a round multiplies

    def multiplied(
        reader: _Reader, weights: list[Any], sums: list[Sum], count: int, *, more: bool
    ) -> tuple[list[Any], list[Sum]]:
        """The chunks that are still on their way, and the sums with the first ones."""
        weights = list(weights)
        for step in range(count):
            sums = _multiply_chunk(machine, product, config, reader, step, weights.pop(0), sums)
            if more:
                weights.append(reader.weights(config.depth + step))
        return weights, sums

    def body(i: Word, carry: list[Any]) -> list[Any]:
        weights, sums = _apart(carry, config.depth, len(zero_sums))
        weights, sums = multiplied(reader.advanced(i * taken), weights, sums, taken, more=True)
        return [*(word for step in weights for word in step), *sums]

    rounds = (chunks - config.depth) // taken
    # A warp beyond the last slice has nothing to add; what it does once is not read.
    count = machine.word(rounds) if 32 * warps == config.threads else _if(machine, warps, rounds)
    carry = [*(word for step in weights for word in step), *zero_sums]
    carry = machine.loop(count, carry, body) if rounds else carry
    weights, sums = _apart(carry, config.depth, len(zero_sums))
    last = reader.advanced(machine.word(rounds * taken))
    _, sums = multiplied(last, weights, sums, config.depth, more=False)
    if product.has_half_tokens and product.group_size is None:
        sums = reader.scaled(sums)
    _add_slices(machine, product, config, sums, arrays)


def _apart(carry: list[Any], depth: int, sum_count: int) -> tuple[list[list[Word]], list[Sum]]:
    """What a loop carries: the words of each chunk on its way, and the sums."""
    flat, sums = carry[:-sum_count], carry[-sum_count:]
    size = len(flat) // depth
    return [list(flat[size * step : size * (step + 1)]) for step in range(depth)], list(sums)


def _nothing(machine: Machine, product: Product) -> Sum:
    """The sum of no products."""
    return machine.word(0) if product.is_whole else machine.real(0.0)


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
    scales: list[list[Pointer]]  # of each row block: scales, and zeros if there are any
    tokens: list[Pointer]  # of each eight tokens
    token_scales: list[list[Pointer]]  # of each eight tokens: of the two whose sums the lane has

    @staticmethod
    def at(
        machine: Machine, product: Product, config: Config, arrays: Arrays, row: Word, chunk: Word
    ) -> "_Reader":
        """The places at which a lane begins: its warp's row blocks, at a chunk of the inputs."""
        lane = machine.thread % 32
        g, quad = lane // 4, lane % 4
        last = product.n // row_blocks.ROWS - 1
        first = (machine.block[0] * config.rows + row) * config.blocks
        rows = [machine.minimum(first + i, last) for i in range(config.blocks)]
        chunks = product.k // CHUNK
        group = chunk * (product.groups // chunks) if product.group_size else machine.word(0)
        words = _token_words(product)
        eights = [machine.block[1] * columns(product) + 8 * i for i in range(columns(product) // 8)]

        def token(index: Word) -> Word:
            return machine.minimum(index, product.m - 1)

        chunk_words = 32 * _code_words(product)
        row_count = product.n // row_blocks.ROWS

        def scales(r: Word) -> list[Pointer]:
            if product.has_blocks:
                stride = _scale_stride(product)
                place = group * stride + r // (BLOCK // row_blocks.ROWS)
                return [arrays.pointer(machine, arrays.scale, place, product.groups * stride)]
            if not product.has_pairs:
                return []
            pairs = [arrays.scale] + ([arrays.zero] if product.has_zeros else [])
            place, words = (r * product.groups + group) * 8 + g, product.groups * 8
            return [arrays.pointer(machine, a, place, row_count * words) for a in pairs]

        return _Reader(
            machine=machine,
            product=product,
            codes=[
                arrays.pointer(
                    machine,
                    arrays.codes,
                    (r * chunks + chunk) * chunk_words + row_blocks.place_of(lane) * 4,
                    row_count * chunks * chunk_words,
                )
                for r in rows
            ],
            scales=[scales(r) for r in rows],
            tokens=[
                machine.pointer(
                    arrays.x, (token(t + g) * chunks + chunk) * words + quad * (words // 8)
                )
                for t in eights
            ],
            token_scales=[
                [
                    machine.pointer(arrays.token_scale, token(t + quad * 2 + e) * chunks + chunk)
                    for e in range(2)
                ]
                for t in (eights if product.has_blocks else [])
            ],
        )

    def advanced(self, chunks: Word) -> "_Reader":
        """The same places some chunks on."""
        words = self._groups * _scale_stride(self.product)
        return _Reader(
            machine=self.machine,
            product=self.product,
            codes=[p.advanced(chunks * (32 * _code_words(self.product))) for p in self.codes],
            scales=[
                [p.advanced(chunks * words) for p in ps] if words else ps for ps in self.scales
            ],
            tokens=[p.advanced(chunks * _token_words(self.product)) for p in self.tokens],
            token_scales=[[p.advanced(chunks) for p in ps] for ps in self.token_scales],
        )

    @property
    def _groups(self) -> int:
        """Of a chunk; 0: scales are none of its business."""
        return CHUNK // self.product.group_size if self.product.group_size else 0

    def weights(self, chunk: int) -> list[Word]:
        """Everything of the weights in a chunk: for each row block its codes, then scales and zeros."""
        stride, loaded = _scale_stride(self.product), []
        words = _code_words(self.product)
        for codes, scales in zip(self.codes, self.scales, strict=True):
            for first in range(0, words, 4):
                loaded += codes.load(32 * (words * chunk + first), 4, once=True)
            for pointer in scales:
                for group in range(self._groups):
                    loaded += pointer.load(stride * (self._groups * chunk + group), 1)
        return loaded

    def tokens_of(self, chunk: int, tile: int) -> list[list[Word]]:
        """For each eight tokens the B operands of the products of 64 inputs, two words each."""
        words = _token_words(self.product)
        place = words * chunk + words // 2 * tile
        if self.product.has_half_tokens:
            eights = [(p.load(place, 4), p.load(place + 4, 4)) for p in self.tokens]
            return [[word for pair in zip(*both, strict=True) for word in pair] for both in eights]
        loaded = [pointer.load(place, 4) for pointer in self.tokens]
        if self.product.is_whole:
            return loaded
        return [
            [pair for word in words for pair in operands.e4m3_pairs(self.machine, word)]
            for words in loaded
        ]

    def scaled(self, sums: list[Real]) -> list[Real]:
        """Sums times the one scale of their output."""
        zero, result = self.machine.real(0.0), []
        per_block = len(sums) // len(self.scales)
        for i, (scale, *_) in enumerate(self.scales):
            (pair,) = scale.load(0, 1)
            parts = sums[i * per_block :][:per_block]
            factors = _pair_factors(self.machine, self.product, pair)
            result += _scaled(self.machine, parts, factors, [zero] * per_block)
        return result

    def factors(self, chunk: int, scale: Word) -> list[Real]:
        """What a group's sums are multiplied with; where all eights have the same, those of one."""
        machine, product = self.machine, self.product
        if not product.has_blocks:
            return _pair_factors(machine, product, scale)
        result = []
        for pointers in self.token_scales:
            of_tokens = [machine.as_real(pointer.load(chunk, 1)[0]) for pointer in pointers]
            both = [machine.times(token, machine.as_real(scale)) for token in of_tokens]
            result += both * 2
        return result


def _code_words(product: Product) -> int:
    """Of a lane, in a chunk."""
    return 2 * operands.BITS[product.weights]


def _token_words(product: Product) -> int:
    """Of a token, in a chunk."""
    return CHUNK // 2 if product.has_half_tokens else CHUNK // 4


def _scale_stride(product: Product) -> int:
    """Words from the scales of a group to those of the next."""
    return -(-product.n // BLOCK) if product.has_blocks else 8


def _pair_factors(machine: Machine, product: Product, pair: Word) -> list[Real]:
    """The scales of the four sums of a fragment: two belong to the low output, two to the high one."""
    low, high = (machine.half_as_real(product.pair, pair, which) for which in ("low", "high"))
    return [low, low, high, high]


def _scaled(
    machine: Machine, parts: list[Real], factors: list[Real], sums: list[Real]
) -> list[Real]:
    """``sums + parts * factors``, the factors repeated."""
    return [
        machine.fma(part, factors[i % len(factors)], total)
        for i, (part, total) in enumerate(zip(parts, sums, strict=True))
    ]


def _multiply_chunk(
    machine: Machine,
    product: Product,
    config: Config,
    reader: _Reader,
    chunk: int,
    weights: list[Word],
    sums: list[Sum],
) -> list[Sum]:
    """Adds the products of 128 inputs with all row blocks of a warp."""
    groups = CHUNK // product.group_size if product.group_size else 0
    size = len(weights) // config.blocks
    eights = columns(product) // 8
    blank = [_nothing(machine, product)] * (4 * eights)
    totals = [sums[4 * eights * i :][: 4 * eights] for i in range(config.blocks)]
    parts = [list(blank) if groups else total for total in totals]
    code_words = _code_words(product)
    # Groups of 32 belong to half of the lanes: two passes, in which the others multiply nothing.
    passes = 2 if product.group_size == 32 else 1
    for tile in range(2):
        tokens = reader.tokens_of(chunk, tile)
        for half in range(passes):
            group = (passes * tile + half) * groups // (2 * passes)
            own = tokens if passes == 1 else _of_half(machine, tokens, half)
            for i in range(config.blocks):
                block = weights[size * i :][:size]
                offsets = _offsets(machine, product, block[code_words:], group, reader, i)
                for j, codes in enumerate(_steps(product, block, tile)):
                    a = _a_operand(machine, product, codes, offsets)
                    for t in range(eights):
                        b, c = own[t][2 * j : 2 * j + 2], parts[i][4 * t : 4 * t + 4]
                        part = _mma(machine, product, a, b, c)
                        parts[i] = [*parts[i][: 4 * t], *part, *parts[i][4 * t + 4 :]]
                if groups and (passes * tile + half + 1) * groups % (2 * passes) == 0:
                    factors = reader.factors(chunk, block[code_words + group])
                    totals[i] = _scaled(machine, parts[i], factors, totals[i])
                    parts[i] = list(blank)
    return [value for total in (totals if groups else parts) for value in total]


def _steps(product: Product, block: list[Word], tile: int) -> list[list[Word]]:
    """The codes of each tensor-core product of 64 inputs: of 8 bits outputs g and g + 8 in turns."""
    words = block[_code_words(product) // 2 * tile :]
    if product.weights == "int4":
        steps = [[word] for word in words[:4]]
    else:
        steps = [[words[w], words[4 + w]] for w in range(4)]
    return [steps[0] + steps[1], steps[2] + steps[3]] if product.is_whole else steps


def _of_half(machine: Machine, tokens: list[list[Word]], half: int) -> list[list[Word]]:
    """Tokens with nothing in the lanes that have the other 32 of 64 inputs."""
    mask = (machine.thread % 4 // 2 ^ (1 - half)) * 0xFFFFFFFF
    return [[word & mask for word in words] for words in tokens]


def _a_operand(
    machine: Machine, product: Product, codes: list[Word], offsets: tuple[Word | None, Word | None]
) -> list[Word]:
    """The A operand of one tensor-core product."""
    if product.is_whole:
        return operands.int8_operand(machine, product.weights, codes)
    return operands.half_operand(machine, product.weights, product.half, codes, offsets)


def _mma(
    machine: Machine, product: Product, a: list[Word], b: list[Word], c: list[Sum]
) -> list[Sum]:
    """One tensor-core product of the kind that the operands are."""
    return machine.mma_int8(a, b, c) if product.is_whole else machine.mma(product.half, a, b, c)


def _offsets(
    machine: Machine,
    product: Product,
    scales: list[Word],
    group: int,
    reader: _Reader,
    row_block: int,
) -> tuple[Word | None, Word | None]:
    """What is subtracted from the codes of the low and the high output, in both halves of a word."""
    if not product.has_zeros:
        same = operands.constant_offset(machine, product.weights, product.half)
        return same, same
    if product.group_size is None:
        (pair,) = reader.scales[row_block][1].load(0, 1)
    else:
        pair = scales[CHUNK // product.group_size + group]
    return operands.each_twice(machine, pair)


def _add_slices(
    machine: Machine, product: Product, config: Config, sums: list[Sum], arrays: Arrays
) -> None:
    """Adds up what the warps behind each other have, finishes it and stores it.

    Shared memory is an array ``[warp, token, output of the warp]``.
    """
    own = row_blocks.ROWS * config.blocks  # outputs of a warp
    lane = machine.thread % 32
    g, quad = lane // 4, lane % 4
    width, eights = columns(product), columns(product) // 8
    for i, value in enumerate(sums):
        row_block, eight, place = i // (4 * eights), i // 4 % eights, i % 4
        token = quad * 2 + (8 * eight + place % 2)
        output = g + (row_blocks.ROWS * row_block + 8 * (place // 2))
        bits = epilogue.as_word(machine, product, value)
        machine.shared_store((machine.warp * width + token) * own + output, bits)
    machine.barrier()
    for start in range(0, config.outputs * width, config.threads):
        place = machine.minimum(machine.thread + start, config.outputs * width - 1)
        token, output = place // config.outputs, place % config.outputs

        def of_slice(piece: int, token: Word = token, output: Word = output) -> Sum:
            warp = output // own + piece * config.rows
            bits = machine.shared_load((warp * width + token) * own + output % own)
            return epilogue.as_sum(machine, product, bits)

        total = of_slice(0)
        for piece in range(1, config.slices):
            total = epilogue.plus(machine, product, total, of_slice(piece))
        m, n = machine.block[1] * width + token, machine.block[0] * config.outputs + output
        inside = machine.thread + start < config.outputs * width
        inside = inside & (m < product.m) & (n < product.n)
        (token_scale,) = epilogue.of_tokens(machine, product, arrays, m, [0])
        output = epilogue.of_output(machine, product, arrays, n)
        result = epilogue.finished(
            machine, product, arrays, total, m, n, token_scale=token_scale, output=output
        )
        machine.store(arrays.out, m * product.n + n, result, inside)
