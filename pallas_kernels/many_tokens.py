# SPDX-License-Identifier: Apache-2.0
"""Products of many tokens: warpgroup products whose weights are unpacked in registers.

From about 32 tokens on the arithmetic counts, and Hopper has it in ``wgmma`` alone: one instruction
multiplies 64 outputs x 32 bytes of inputs, in registers, with up to 256 tokens, in shared memory. What is
to be computed, and the layout of the weights, are those of few tokens (:mod:`pallas_kernels.few_tokens`).

- A warpgroup owns 64 or 128 outputs and all tokens of its block. Products follow one another without a
  gap: one is under way while the codes of the next are unpacked.
- Codes and tokens come to shared memory by copies of the hardware's own, ``stages`` steps of a ring
  ahead; a step is ``span`` times 128 bytes of each token. Nobody waits at a barrier: a stage has an
  *arrival* for what is copied into it, and one for the warps that have done with it.
- ``ldmatrix`` brings a warp its codes from there, so distributed among its lanes that the tokens can
  stay in the order of memory: :mod:`pallas_kernels.row_blocks`.
- Scales of groups are multiplied into 16-bit weights, as if they had been dequantized (one rounding).
  All other scales are applied to sums: exact.
"""

from dataclasses import dataclass
from typing import Any

from pallas_kernels import epilogue, operands, row_blocks
from pallas_kernels.machine import Machine, Pointer, Sum, Word
from pallas_kernels.product import SHARED_BYTES, Arrays, Product

_PAD = 4  # words between the tokens of a result in shared memory, against bank conflicts
_TILE_WORDS = 32  # of a token: 128 bytes
_PRODUCTS = 4  # of a tile


@dataclass(frozen=True, kw_only=True)
class Config:
    """How the work is cut up.

    Attributes:
      rows: warpgroups beside each other, with different outputs and the same inputs.
      slices: warpgroups behind each other, with the same outputs and different inputs.
      fragments: of 64 outputs, that a warpgroup owns.
      tokens: of a block.
      span: times 128 bytes of each token, that a step takes: from barrier to barrier.
      stages: steps in shared memory: two that are multiplied, the others on their way.
    """

    rows: int
    slices: int = 1
    fragments: int = 1
    tokens: int = 128
    span: int = 1
    stages: int = 4

    @property
    def warpgroups(self) -> int:
        """Of a block."""
        return self.rows * self.slices

    @property
    def threads(self) -> int:
        """Of a block."""
        return 128 * self.warpgroups

    @property
    def own(self) -> int:
        """Outputs of a warpgroup."""
        return 64 * self.fragments

    @property
    def outputs(self) -> int:
        """Of a block."""
        return self.rows * self.own


def check(product: Product, config: Config) -> None:
    """Checks that a configuration fits a product.

    Raises:
      ValueError: it does not; with the numbers.
    """
    if reason := why_not(product):
        raise ValueError(reason)
    if config.stages < 3:
        raise ValueError(
            f"{config.stages=} must be at least 3: two are multiplied, one is copied into"
        )
    tiles = product.k // tile_inputs(product)
    if tiles % (config.slices * config.span):
        raise ValueError(
            f"{tiles} times {tile_inputs(product)} inputs are not divisible by "
            f"{config.slices=} x {config.span=}"
        )
    if config.tokens % 8 or config.tokens > 256:
        raise ValueError(f"{config.tokens=} must be a multiple of 8, and at most 256")
    if config.outputs > 512:
        raise ValueError(f"{config.outputs} outputs of a block are more than 512")
    if config.threads > 1024:
        raise ValueError(f"{config.rows=} x {config.slices=} warpgroups are more than 1024 threads")
    if 4 * shared_words(product, config) > SHARED_BYTES:
        raise ValueError(f"{config} needs more than {SHARED_BYTES} bytes of shared memory")


def shared_words(product: Product, config: Config) -> int:
    """Words of shared memory: the ring, in its place the sums at the end; and the arrivals."""
    return _arrivals_at(product, config) + 4 * config.slices * config.stages


def _arrivals_at(product: Product, config: Config) -> int:
    ring = config.slices * config.stages * _Ring.of(product, config).stage
    return max(ring, config.warpgroups * config.tokens * (config.own + _PAD))


def grid(product: Product, config: Config) -> tuple[int, int]:
    """Blocks along outputs and tokens."""
    return -(-product.n // config.outputs), -(-product.m // config.tokens)


def why_not(product: Product) -> str | None:
    """Why this kernel cannot take a product that others may; None if it can."""
    if product.has_blocks:
        return "scales of 128 x 128 blocks are for few tokens only"
    if product.tokens == "float8_e4m3fn" and product.weights == "int4":
        return "int4 weights with float8_e4m3fn tokens are for few tokens only"
    return None


def default_config(product: Product, multiprocessors: int = 132) -> Config:
    """A configuration that fits, for products that no table names.

    As many tokens a block as there are, up to 256; then blocks as large as leave no multiprocessor idle,
    and slices of the inputs where even small ones do; less of either where shared memory ends.
    """
    tokens = next((t for t in (32, 64, 128) if product.m <= t), 256)
    most = 2 if tokens == 256 else 4  # warpgroups, by the registers of their sums
    columns = -(-product.m // tokens)

    def blocks(rows: int) -> int:
        return -(-product.n // (64 * rows)) * columns

    rows = next((r for r in (4, 2) if r <= most and blocks(r) >= multiprocessors), 1)
    slices = 1
    while 2 * rows * slices <= most and blocks(rows) * slices < multiprocessors:
        slices *= 2
    while not _fits(product, Config(rows=rows, slices=slices, tokens=tokens)):
        if slices > 1:
            slices //= 2
        elif rows > 1:
            rows //= 2
        else:
            tokens //= 2
    return Config(rows=rows, slices=slices, tokens=tokens)


def _fits(product: Product, config: Config) -> bool:
    try:
        check(product, config)
    except ValueError:
        return False
    return True


def tile_inputs(product: Product) -> int:
    """Inputs in 128 bytes of a token."""
    return 64 if product.has_half_tokens else 128


@dataclass(frozen=True)
class _Ring:
    """The stages of one slice in shared memory, in words: tokens, tile by tile; codes; scales."""

    tile: int  # tokens of one tile
    tokens: int  # of a stage
    block: int  # codes of one block of 16 outputs x 64 inputs
    row: int  # codes of 16 outputs in a stage
    groups: int  # of a stage, whose scales are multiplied into weights; part of one counts as one
    pairs: int  # scales of 16 outputs in a stage; of zeros there are as many
    scales: int  # where they begin
    copied: int  # of a stage
    stage: int

    @staticmethod
    def of(product: Product, config: Config) -> "_Ring":
        """The ring of a product."""
        tile = config.tokens * _TILE_WORDS
        block = 32 * operands.BITS[product.weights]
        inputs = config.span * tile_inputs(product)
        row = block * inputs // row_blocks.COLUMNS
        grouped = product.has_half_tokens and product.group_size is not None
        groups = max(inputs // product.group_size, 1) if grouped and product.group_size else 0
        pairs = 8 * groups
        scales = config.span * tile + config.outputs // 16 * row
        copied = scales + config.outputs // 16 * pairs * (2 if product.has_zeros else 1)
        # Tiles lie at multiples of 1024 bytes.
        stage = -(-copied // 256) * 256
        return _Ring(tile, config.span * tile, block, row, groups, pairs, scales, copied, stage)


def kernel(machine: Machine, arrays: Arrays, product: Product, config: Config) -> None:
    """One block: `rows` x `slices` warpgroups."""
    warpgroup = machine.warp // 4
    row, piece = warpgroup % config.rows, warpgroup // config.rows
    steps = product.k // tile_inputs(product) // config.slices // config.span
    stream = _Stream.at(machine, product, config, arrays, row, piece, steps)
    weights = _Weights.at(machine, product, config, arrays, stream)
    stages, full = config.slices * config.stages, machine.word(_arrivals_at(product, config))
    machine.start_arrivals(full, stages, threads=1)
    machine.start_arrivals(full + 2 * stages, stages, threads=4 * config.rows)
    machine.barrier()
    for step in range(config.stages - 2):
        stream.begin(machine.word(step))
    stream.wait(machine.word(0))
    codes, scales = weights.codes(machine.word(0), 0), weights.scales(machine.word(0))
    nothing = machine.word(0) if product.is_whole else machine.real(0.0)
    state = _State(
        codes=codes,
        scales=scales,
        ready=weights.operands(machine.word(0), 0, codes, scales),
        sums=[[nothing] * (config.tokens // 2) for _ in range(config.fragments)],
    )

    def body(step: Word, carry: list[Any]) -> list[Any]:
        return _multiply_step(machine, config, weights, stream, step, shape.filled(carry)).flat()

    shape = state
    state = shape.filled(machine.loop(machine.word(steps), state.flat(), body))
    sums = machine.wait(0, state.sums)
    if product.has_half_tokens and product.group_size is None:
        sums = weights.scaled(sums)
    machine.barrier()
    _store(machine, product, config, sums, arrays)


@dataclass(frozen=True)
class _State:
    """What a lane carries from step to step."""

    codes: list[Word]  # of the tile that is multiplied
    scales: list[Word]  # of the step
    ready: list[list[Word]]  # A of the next product, of each fragment
    sums: list[list[Sum]]  # of each fragment

    def flat(self) -> list[Any]:
        """All of it in one list."""
        return [v for part in (self.codes, self.scales, *self.ready, *self.sums) for v in part]

    def filled(self, flat: list[Any]) -> "_State":
        """The state of this shape that :meth:`flat` made a list of."""
        values = iter(flat)

        def take(like: list[Any]) -> list[Any]:
            return [next(values) for _ in like]

        return _State(
            codes=take(self.codes),
            scales=take(self.scales),
            ready=[take(part) for part in self.ready],
            sums=[take(part) for part in self.sums],
        )


def _multiply_step(
    machine: Machine,
    config: Config,
    weights: "_Weights",
    stream: "_Stream",
    step: Word,
    state: _State,
) -> _State:
    """Adds the products of a step, and has a later one copied into the stage of the last but one."""
    codes, scales, ready, sums = state.codes, state.scales, state.ready, state.sums
    kind, last = weights.product.operand, _PRODUCTS * config.span - 1
    for i in range(last + 1):
        sums = machine.wgmma(kind, ready, stream.tile(step, i // _PRODUCTS), i % _PRODUCTS, sums)
        sums = machine.wait(1, sums)
        after, product = step, i + 1
        if i == 0:
            stream.leave_last(step)
            stream.begin(step + (config.stages - 2))
        if i == last:
            # After the last step there is none; what is unpacked then, of that step again, nobody takes.
            after, product = machine.minimum(step + 1, stream.steps - 1), 0
            stream.wait(after)
            scales = weights.scales(after)
        if product % _PRODUCTS == 0:
            codes = weights.codes(after, product // _PRODUCTS)
        ready = weights.operands(after, product, codes, scales)
    return _State(codes=codes, scales=scales, ready=ready, sums=sums)


@dataclass(frozen=True)
class _Stream:
    """How the steps of a slice come to shared memory."""

    machine: Machine
    product: Product
    config: Config
    ring: _Ring
    arrays: Arrays
    steps: int
    first: Word  # step of the slice
    start: Word  # of its stages
    full: Word  # arrivals of its stages, two words each: copied
    free: Word  # likewise: done with
    blocks: list[Word]  # row block of each fragment of this warp
    codes: list[Pointer]  # of each fragment of this warp, at the first step
    places: list[Word]  # of those in a stage
    pairs: list[list[Pointer]]  # of each fragment: its scales, and zeros if there are any
    pair_places: list[list[Word]]  # of those in a stage
    copies: Word  # whether this thread copies the codes of its warp
    leads: Word  # whether it copies the tokens

    @staticmethod
    def at(
        machine: Machine,
        product: Product,
        config: Config,
        arrays: Arrays,
        row: Word,
        piece: Word,
        steps: int,
    ) -> "_Stream":
        """The stream of a slice: a thread of each warp copies codes for it, one of them tokens too."""
        ring = _Ring.of(product, config)
        warp, one = machine.warp % 4, machine.thread % 32 < 1
        own = [(row * config.fragments + f) * 4 + warp for f in range(config.fragments)]
        last = product.n // row_blocks.ROWS - 1
        first = machine.block[0] * (config.outputs // row_blocks.ROWS)
        blocks = [machine.minimum(first + i, last) for i in own]
        words = product.k // row_blocks.COLUMNS * ring.block  # of a row block
        full = _arrivals_at(product, config)
        pairs = [arrays.scale] + ([arrays.zero] if product.has_zeros else []) if ring.groups else []
        all_pairs = ring.pairs * (config.outputs // 16)
        return _Stream(
            machine=machine,
            product=product,
            config=config,
            ring=ring,
            arrays=arrays,
            steps=steps,
            first=piece * steps,
            start=piece * (config.stages * ring.stage),
            full=piece * (2 * config.stages) + full,
            free=piece * (2 * config.stages) + (full + 2 * config.slices * config.stages),
            blocks=blocks,
            codes=[machine.pointer(arrays.codes, block * words) for block in blocks],
            places=[i * ring.row + ring.tokens for i in own],
            pairs=[[machine.pointer(a, b * (product.groups * 8)) for a in pairs] for b in blocks],
            pair_places=[
                [i * ring.pairs + (ring.scales + all_pairs * kind) for kind in range(len(pairs))]
                for i in own
            ],
            copies=one,
            leads=one & (row < 1) & (warp < 1),
        )

    def stage(self, step: Word) -> Word:
        """Where a step lies."""
        return self.start + step % self.config.stages * self.ring.stage

    def tile(self, step: Word, tile: int) -> Word:
        """Where a tile of its tokens lies."""
        return self.stage(step) + tile * self.ring.tile

    def _turn(self, step: Word, arrivals: Word) -> tuple[Word, Word]:
        """The arrival of a step's stage, and how often the stage was used before."""
        return arrivals + step % self.config.stages * 2, step // self.config.stages

    def begin(self, step: Word) -> None:
        """Begins to copy a step, if there is such a one, when all warps have done with its stage."""
        machine, ring, config = self.machine, self.ring, self.config
        full, used = self._turn(step, self.full)
        free, _ = self._turn(step, self.free)
        machine.wait_for(free, used + 1)  # the turn before; what was never used is free
        exists, stage, global_step = step < self.steps, self.stage(step), self.first + step
        machine.expect(full, 4 * ring.copied, exists & self.leads)
        for tile in range(config.span):
            column = (global_step * config.span + tile) * tile_inputs(self.product)
            machine.copy_tokens(
                stage + tile * ring.tile, self.arrays.x, machine.block[1] * config.tokens, column,
                config.tokens, full, exists & self.leads,
            )  # fmt: skip
        pieces = [
            (codes, place, ring.row) for codes, place in zip(self.codes, self.places, strict=True)
        ]
        for source, place, words in pieces:
            here = source.advanced(global_step * words)
            machine.copy_words(stage + place, here, words, full, exists & self.copies)
        group = self._group(global_step)
        for pairs, places in zip(self.pairs, self.pair_places, strict=True):
            for source, place in zip(pairs, places, strict=True):
                here = source.advanced(group * 8)
                machine.copy_words(stage + place, here, ring.pairs, full, exists & self.copies)

    def _group(self, step: Word) -> Word:
        """The first group of a step."""
        inputs = self.config.span * tile_inputs(self.product)
        each = max((self.product.group_size or 0) // inputs, 1)  # steps of a group
        return step * self.ring.groups if each == 1 else step // each

    def leave_last(self, step: Word) -> None:
        """This warp has done with the step before, if there was one."""
        free, _ = self._turn(step + (self.config.stages - 1), self.free)
        self.machine.arrive(free, (self.machine.word(0) < step) & self.copies)

    def wait(self, step: Word) -> None:
        """Waits for a step; once it was waited for, in no time."""
        self.machine.wait_for(*self._turn(step, self.full))


@dataclass(frozen=True)
class _Weights:
    """How a warp comes by its weights."""

    machine: Machine
    product: Product
    config: Config
    stream: _Stream
    pairs: list[list[Pointer]]  # of each fragment: scales, and zeros if there are any
    lanes_out: list[Word]  # which row a lane names to each ldmatrix of a block

    @staticmethod
    def at(
        machine: Machine,
        product: Product,
        config: Config,
        arrays: Arrays,
        stream: _Stream,
    ) -> "_Weights":
        """The weights of this thread's warp."""
        lane = machine.thread % 32
        pairs = [arrays.scale] + ([arrays.zero] if product.has_zeros else [])
        return _Weights(
            machine=machine,
            product=product,
            config=config,
            stream=stream,
            pairs=[
                [machine.pointer(a, b * (product.groups * 8) + lane // 4) for a in pairs]
                for b in stream.blocks
            ],
            lanes_out=_matrix_rows(product, lane),
        )

    def codes(self, step: Word, tile: int) -> list[Word]:
        """The codes of a tile, for each fragment, where they are to be unpacked."""
        if self._are_operands:
            return []
        blocks = tile_inputs(self.product) // row_blocks.COLUMNS
        return [
            word
            for fragment in range(self.config.fragments)
            for block in range(blocks * tile, blocks * (tile + 1))
            for part in range(len(self.lanes_out))
            for word in self._matrices(step, block, fragment, part)
        ]

    @property
    def _are_operands(self) -> bool:
        """Whether codes are multiplied as they are."""
        return self.product.weights == self.product.tokens

    def _matrices(self, step: Word, block: int, fragment: int, part: int) -> list[Word]:
        """Four words of a lane, of one of the blocks of a step."""
        place = self.stream.places[fragment] + self.lanes_out[part] + self.stream.ring.block * block
        return self.machine.shared_load_matrices(self.stream.stage(step) + place)

    @property
    def groups(self) -> int:
        """Of a step, that are multiplied into weights."""
        return self.stream.ring.groups

    def scales(self, step: Word) -> list[Word]:
        """For each fragment the scales of a step, then its zeros."""
        stage, g = self.stream.stage(step), self.machine.thread % 32 // 4
        return [
            self.machine.shared_load(stage + place + g + 8 * i)
            for places in self.stream.pair_places
            for place in places
            for i in range(self.groups)
        ]

    def operands(
        self, step: Word, i: int, codes: list[Word], scales: list[Word]
    ) -> list[list[Word]]:
        """A of product i of a step, for each fragment."""
        count = self.config.fragments
        if self._are_operands:
            # Not loaded ahead: where they are carried on, the assembler lets no products overlap.
            return [self._matrices(step, i // 2, f, i % 2) for f in range(count)]
        size, scale_size = len(codes) // count, len(scales) // count
        return [
            self._unpacked(codes[size * f :][:size], scales[scale_size * f :][:scale_size], i, f)
            for f in range(count)
        ]

    def _unpacked(self, codes: list[Word], scales: list[Word], i: int, fragment: int) -> list[Word]:
        machine, product, step = self.machine, self.product, i % _PRODUCTS
        if product.is_whole:
            return operands.int8_operand(machine, product.weights, codes[2 * step :][:2])
        words = [codes[step]] if product.weights == "int4" else codes[2 * step :][:2]
        group = i * self.groups // (_PRODUCTS * self.config.span)
        offsets = self._offsets(scales, group, fragment)
        values = operands.half_operand(machine, product.weights, product.half, words, offsets)
        if not self.groups:
            return values
        factors = operands.each_twice(machine, scales[group])
        return [
            machine.half_pair_times(product.half, value, factors[r % 2])
            for r, value in enumerate(values)
        ]

    def _offsets(self, scales: list[Word], group: int, fragment: int) -> Any:
        """What is subtracted from the codes of rows g and g + 8, in both halves of a word."""
        product = self.product
        if not product.has_zeros:
            same = operands.constant_offset(self.machine, product.weights, product.half)
            return same, same
        if self.groups:
            pair = scales[self.groups + group]
        else:
            (pair,) = self.pairs[fragment][1].load(0, 1)
        return operands.each_twice(self.machine, pair)

    def scaled(self, sums: list[list[Sum]]) -> list[list[Sum]]:
        """Sums times the one scale of their output."""
        machine, result = self.machine, []
        for values, (scale, *_) in zip(sums, self.pairs, strict=True):
            (pair,) = scale.load(0, 1)
            both = [
                machine.half_as_real(self.product.half, pair, which) for which in ("low", "high")
            ]
            result.append([machine.times(v, both[i // 2 % 2]) for i, v in enumerate(values)])
        return result


def _matrix_rows(product: Product, lane: Word) -> list[Word]:
    """Which row of a block's codes a lane names to each ldmatrix, in words.

    A matrix is the 16 bytes of the eight lanes of one c. int4: those of c = 0, 1, 2, 3. 8 bits: with
    outputs g and g + 8 in turns, as in an A operand, of c = 0, 1 and then of c = 2, 3.
    """
    matrix, g = lane // 8, lane % 8
    if product.weights == "int4":
        return [(g * 4 + (matrix ^ (g // 2))) * 4]
    half = matrix % 2 * 128
    return [half + (g * 4 + ((matrix // 2 + first) ^ (g // 2))) * 4 for first in (0, 2)]


def _store(
    machine: Machine, product: Product, config: Config, sums: list[list[Sum]], arrays: Arrays
) -> None:
    """Adds up what the warpgroups behind each other have, finishes it and stores rows of eight outputs.

    Shared memory is an array ``[warpgroup, token, output of the warpgroup]``, with a pad after a token.
    """
    pitch = config.own + _PAD
    lane, warp = machine.thread % 32, machine.warp % 4
    g, quad = lane // 4, lane % 4
    start = machine.warp // 4 * (config.tokens * pitch) + quad * (2 * pitch) + warp * 16 + g
    for fragment, values in enumerate(sums):
        for i, value in enumerate(values):
            token, output = 8 * (i // 4) + i % 2, 64 * fragment + 8 * (i // 2 % 2)
            bits = value if product.is_whole else machine.as_word(value)
            machine.shared_store(start, bits, token * pitch + output)
    machine.barrier()
    rows = config.outputs // 8  # of a token
    for first in range(0, rows * config.tokens, config.threads):
        # In the last round there may be more threads than rows.
        place = machine.minimum(machine.thread + first, rows * config.tokens - 1)
        token, output = place // rows, place % rows * 8
        at = (output // config.own * config.tokens + token) * pitch + output % config.own
        total: list[Sum] = []
        for piece in range(config.slices):
            behind = piece * (config.rows * config.tokens * pitch)
            bits = [word for i in (0, 4) for word in machine.shared_load_row(at, 4, behind + i)]
            total = epilogue.plus(machine, product, total, bits)
        m, n = machine.block[1] * config.tokens + token, machine.block[0] * config.outputs + output
        inside = (machine.thread + first < rows * config.tokens) & (m < product.m) & (n < product.n)
        values = epilogue.finished(machine, product, arrays, total, m, n)
        machine.store_row(arrays.out, m * product.n + n, values, inside)
