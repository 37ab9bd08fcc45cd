# SPDX-License-Identifier: Apache-2.0
"""What the threads of :mod:`pallas_kernels.few_tokens` do."""

from dataclasses import dataclass
from typing import Any

from pallas_kernels import operands, row_blocks
from pallas_kernels.few_tokens_product import BLOCK, CHUNK, Config, Product
from pallas_kernels.machine import Machine, Pointer, Real, Word

Sum = Any  # a real, or a word that is an int32


@dataclass(frozen=True, kw_only=True)
class Arrays:
    """Global arrays, as the arguments of :func:`pallas_kernels.few_tokens.few_tokens`; None: absent."""

    x: Any
    codes: Any
    scale: Any
    out: Any
    zero: Any = None
    token_scale: Any = None
    bias: Any = None
    residual: Any = None


def few_tokens_kernel(machine: Machine, arrays: Arrays, product: Product, config: Config) -> None:
    """One block: `rows` x `slices` warps."""
    warps = config.rows * config.slices
    row = machine.warp % config.rows
    piece = machine.minimum(machine.warp // config.rows, config.slices - 1)
    chunks = product.k // CHUNK // config.slices
    reader = _Reader.at(machine, product, config, arrays, row, piece * chunks)

    zero_sums = [_nothing(machine, product)] * (4 * config.blocks * (product.columns // 8))
    weights = [reader.weights(step) for step in range(config.depth)]

    def unrolled(reader: _Reader, weights: list[Any], sums: list[Sum], *, more: bool):
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
    if product.has_half_tokens and product.group_size is None:
        sums = reader.scaled(sums)
    _add_slices(machine, product, config, sums, arrays)


def _nothing(machine: Machine, product: Product) -> Sum:
    """The sum of no products."""
    return machine.word(0) if product.is_whole else machine.real(0.0)


def _if(machine: Machine, warps: int, rounds: int) -> Word:
    """`rounds` for the first `warps` warps, 0 for the others."""
    idle = machine.minimum(machine.warp // warps, 1)
    return (machine.word(1) + idle * 0xFFFFFFFF) * rounds


@dataclass(frozen=True)
class _Walk:
    """How a lane goes through the codes and tokens of a chunk, in words; loads are of 4 words.

    Attributes:
      codes: where its first codes lie in a row block.
      code_loads: the places from there on.
      tokens: where its first inputs lie in a token.
      token_loads: the places from there on.
      code_chunk: from one chunk to the next.
      token_chunk: likewise.
      token_words: of a load of tokens.
    """

    codes: Word
    code_loads: tuple[int, ...]
    tokens: Word
    token_loads: tuple[int, ...]
    code_chunk: int
    token_chunk: int
    token_words: int = 4

    @staticmethod
    def of(machine: Machine, product: Product) -> "_Walk":
        """The walk of this thread's lane.

        The tokens that a load brings must be the inputs of the codes of one: see the layouts. In groups
        of 32 the lanes of a warp share out the 8-bit codes of 64 inputs so that a load is of 32
        neighbours, not of 8 out of every 16: a tensor-core product then has one scale.
        """
        lane = machine.thread % 32
        g, quad = lane // 4, lane % 4
        in_order, neighbours = (0, 16, 32, 48), quad * 4
        if product.weights == "int4" and product.has_half_tokens:
            return _Walk(lane * 4, (0, 128), neighbours, in_order, 256, 64)
        if product.weights == "int4":
            return _Walk(lane * 4, (0, 128), quad * 2, (0, 8, 16, 24), 256, 32, token_words=2)
        if not product.has_half_tokens:
            return _Walk(lane * 4, (0, 128, 256, 384), neighbours, in_order[:2], 512, 32)
        if product.group_size == 32:
            shared_out = g * 16 + quad // 2 * 4 + quad % 2 * 128
            return _Walk(shared_out, (0, 8, 256, 264), neighbours, in_order, 512, 64)
        return _Walk(lane * 4, (0, 128, 256, 384), quad * 8, (0, 4, 32, 36), 512, 64)


@dataclass(frozen=True)
class _Reader:
    """Where a lane reads."""

    machine: Machine
    product: Product
    walk: _Walk
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
        walk = _Walk.of(machine, product)
        last = product.n // row_blocks.ROWS - 1
        first = (machine.block[0] * config.rows + row) * config.blocks
        rows = [machine.minimum(first + i, last) for i in range(config.blocks)]
        chunks = product.k // CHUNK
        group = chunk * (product.groups // chunks) if product.group_size else machine.word(0)
        eights = [machine.block[1] * product.columns + 8 * i for i in range(product.columns // 8)]

        def token(index: Word) -> Word:
            return machine.minimum(index, product.m - 1)

        def scales(r: Word) -> list[Pointer]:
            if product.has_blocks:
                place = group * _scale_stride(product) + r // (BLOCK // row_blocks.ROWS)
                return [machine.pointer(arrays.scale, place)]
            if not product.has_half_tokens:
                return []
            pairs = [arrays.scale] + ([arrays.zero] if product.has_zeros else [])
            return [machine.pointer(a, (r * product.groups + group) * 8 + g) for a in pairs]

        return _Reader(
            machine=machine,
            product=product,
            walk=walk,
            codes=[
                machine.pointer(arrays.codes, (r * chunks + chunk) * walk.code_chunk + walk.codes)
                for r in rows
            ],
            scales=[scales(r) for r in rows],
            tokens=[
                machine.pointer(
                    arrays.x, (token(t + g) * chunks + chunk) * walk.token_chunk + walk.tokens
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
            walk=self.walk,
            codes=[p.advanced(chunks * self.walk.code_chunk) for p in self.codes],
            scales=[
                [p.advanced(chunks * words) for p in ps] if words else ps for ps in self.scales
            ],
            tokens=[p.advanced(chunks * self.walk.token_chunk) for p in self.tokens],
            token_scales=[[p.advanced(chunks) for p in ps] for ps in self.token_scales],
        )

    @property
    def _groups(self) -> int:
        """Of a chunk; 0: scales are none of its business."""
        return CHUNK // self.product.group_size if self.product.group_size else 0

    def weights(self, chunk: int) -> list[Word]:
        """Everything of the weights in a chunk: for each row block its codes, then scales and zeros."""
        stride, loaded = _scale_stride(self.product), []
        for codes, scales in zip(self.codes, self.scales, strict=True):
            for place in self.walk.code_loads:
                loaded += codes.load(self.walk.code_chunk * chunk + place, 4, once=True)
            for pointer in scales:
                for group in range(self._groups):
                    loaded += pointer.load(stride * (self._groups * chunk + group), 1)
        return loaded

    def tokens_of(self, chunk: int, load: int) -> list[list[Word]]:
        """For each eight tokens the B operands of the products of one load, two words each."""
        place = self.walk.token_chunk * chunk + self.walk.token_loads[load]
        loaded = [pointer.load(place, self.walk.token_words) for pointer in self.tokens]
        machine, product = self.machine, self.product
        if product.is_whole:
            return [operands.int8_tokens(machine, product.weights, words) for words in loaded]
        if product.has_half_tokens:
            return loaded
        return [
            [pair for word in words for pair in operands.e4m3_pairs(machine, word)]
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


def _scale_stride(product: Product) -> int:
    """Words from the scales of a group to those of the next."""
    return -(-product.n // BLOCK) if product.has_blocks else 8


def _pair_factors(machine: Machine, product: Product, pair: Word) -> list[Real]:
    """The scales of the four sums of a fragment: two belong to the low output, two to the high one."""
    low, high = (machine.half_as_real(product.half, pair, which) for which in ("low", "high"))
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
    eights = product.columns // 8
    blank = [_nothing(machine, product)] * (4 * eights)
    totals = [sums[4 * eights * i :][: 4 * eights] for i in range(config.blocks)]
    parts = [list(blank) if groups else total for total in totals]
    code_words = 2 * operands.BITS[product.weights]  # of a chunk
    loads, steps = CHUNK // product.span, product.span // product.step
    step_words = code_words // (loads * steps)
    for load in range(loads):
        tokens = reader.tokens_of(chunk, load)
        group = load * groups // loads
        for i in range(config.blocks):
            block = weights[size * i :][:size]
            offsets = _offsets(machine, product, block[code_words:], group, reader, i)
            for j in range(steps):
                codes = block[step_words * (load * steps + j) :][:step_words]
                a = _a_operand(machine, product, codes, offsets)
                for t in range(eights):
                    b, c = tokens[t][2 * j : 2 * j + 2], parts[i][4 * t : 4 * t + 4]
                    part = _mma(machine, product, a, b, c)
                    parts[i] = [*parts[i][: 4 * t], *part, *parts[i][4 * t + 4 :]]
            if groups and (load + 1) * groups % loads == 0:
                factors = reader.factors(chunk, block[code_words + group])
                totals[i] = _scaled(machine, parts[i], factors, totals[i])
                parts[i] = list(blank)
    return [value for total in (totals if groups else parts) for value in total]


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
    return machine.bytes_of(pair, pair, 0x1010), machine.bytes_of(pair, pair, 0x3232)


def _add_slices(
    machine: Machine, product: Product, config: Config, sums: list[Sum], arrays: Arrays
) -> None:
    """Adds up what the warps behind each other have, finishes it and stores it.

    Shared memory is an array ``[warp, token, output of the warp]``.
    """
    own = row_blocks.ROWS * config.blocks  # outputs of a warp
    lane = machine.thread % 32
    g, quad = lane // 4, lane % 4
    columns, eights = product.columns, product.columns // 8
    for i, value in enumerate(sums):
        row_block, eight, place = i // (4 * eights), i // 4 % eights, i % 4
        token = quad * 2 + (8 * eight + place % 2)
        output = g + (row_blocks.ROWS * row_block + 8 * (place // 2))
        bits = value if product.is_whole else machine.as_word(value)
        machine.shared_store((machine.warp * columns + token) * own + output, bits)
    machine.barrier()
    for start in range(0, config.outputs * columns, config.threads):
        place = machine.minimum(machine.thread + start, config.outputs * columns - 1)
        token, output = place // config.outputs, place % config.outputs
        total = None
        for piece in range(config.slices):
            warp = output // own + piece * config.rows
            bits = machine.shared_load((warp * columns + token) * own + output % own)
            total = _plus(machine, product, total, bits)
        if product.is_whole:
            total = _real(machine, product, total)
        m, n = machine.block[1] * columns + token, machine.block[0] * config.outputs + output
        inside = machine.thread + start < config.outputs * columns
        inside = inside & (m < product.m) & (n < product.n)
        total = _finished(machine, product, arrays, total, m, n)
        machine.store(arrays.out, m * product.n + n, total, inside)


def _plus(machine: Machine, product: Product, total: Sum | None, bits: Word) -> Sum:
    """A sum and the bits of a further one; None: the first."""
    if product.is_whole:
        return bits if total is None else total + bits
    part = machine.as_real(bits)
    return part if total is None else machine.plus(total, part)


def _real(machine: Machine, product: Product, total: Word) -> Real:
    """The float32 nearest to a whole sum."""
    total = machine.rounded(total)
    if product.weights == "int8":
        return total
    return machine.times(total, machine.real(1 / operands.INT4_IN_INT8))  # exact


def _finished(
    machine: Machine, product: Product, arrays: Arrays, total: Real, m: Word, n: Word
) -> Real:
    """Applies to the sum of an output what applies to all of it: scales, bias, residual."""
    m, n = machine.minimum(m, product.m - 1), machine.minimum(n, product.n - 1)
    first = machine.word(0)
    if not product.has_half_tokens and not product.has_blocks:
        token_scale = machine.real_at(arrays.token_scale, first if product.one_token_scale else m)
        total = machine.times(total, token_scale)
        scale = machine.real_at(arrays.scale, first if product.one_scale else n)
        total = machine.times(total, scale)
    if arrays.bias is not None:
        total = machine.plus(total, machine.real_at(arrays.bias, n))
    if arrays.residual is not None:
        total = machine.plus(total, machine.real_at(arrays.residual, m * product.n + n))
    return total
