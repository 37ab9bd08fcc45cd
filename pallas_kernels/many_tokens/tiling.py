# SPDX-License-Identifier: Apache-2.0
"""How the kernel for many tokens cuts up its work, and what lies where in shared memory."""

from dataclasses import dataclass

from pallas_kernels import operands, row_blocks
from pallas_kernels.machine import Machine, Word
from pallas_kernels.product import SHARED_BYTES, Product

TILE_WORDS = 32  # of a token: 128 bytes
PRODUCTS = 4  # wgmma's that 128 bytes of a token are
_ALIGNED = 256  # words: where tiles begin that wgmma reads or copies write


@dataclass(frozen=True, kw_only=True)
class Config:
    """How the work is cut up.

    Attributes:
      rows: warpgroups beside each other, with different outputs and the same inputs.
      slices: warpgroups behind each other, with the same outputs and different inputs.
      fragments: of 64 outputs, that a warpgroup owns.
      tokens: of a tile.
      span: times 128 bytes of each token, that a step takes.
      stages: steps in shared memory: two that are multiplied, the others on their way.
      resident: blocks, one for each multiprocessor, that go through the tiles by turns: while one result
        is stored the next tile is already on its way. None: a block for each tile.
      loader: whether a warpgroup of its own begins all copies; else each warp begins those of its codes.
      parts: of the inputs, in blocks of their own, for products that have too few tiles to keep all
        multiprocessors busy. Their sums are written out and added up by another kernel.
    """

    rows: int
    slices: int = 1
    fragments: int = 1
    tokens: int = 128
    span: int = 1
    stages: int = 4
    resident: int | None = None
    loader: bool = False
    parts: int = 1

    @property
    def warpgroups(self) -> int:
        """Of a block, that multiply."""
        return self.rows * self.slices

    @property
    def threads(self) -> int:
        """Of a block."""
        return 128 * (self.warpgroups + self.loader)

    @property
    def own(self) -> int:
        """Outputs of a warpgroup."""
        return 64 * self.fragments

    @property
    def outputs(self) -> int:
        """Of a tile."""
        return self.rows * self.own


@dataclass(frozen=True)
class Tile:
    """Some outputs of some tokens, and the part of the inputs that is summed up."""

    row_block: Word  # the first of 16 outputs
    token: Word  # the first
    part: Word  # of the inputs


@dataclass(frozen=True)
class Tiles:
    """All of a product, tokens fastest: blocks that run together share weights."""

    rows: int
    columns: int
    config: Config

    @staticmethod
    def of(product: Product, config: Config) -> "Tiles":
        """All of a product."""
        rows, columns = -(-product.n // config.outputs), -(-product.m // config.tokens)
        return Tiles(rows, columns, config)

    @property
    def blocks(self) -> int:
        """That go through them."""
        return min(self.total, self.config.resident or self.total)

    @property
    def total(self) -> int:
        """Of all parts of the inputs."""
        return self.rows * self.columns * self.config.parts

    def count(self, machine: Machine) -> Word:
        """Of this block."""
        return (machine.block[0] * 0xFFFFFFFF + (self.total + self.blocks - 1)) // self.blocks

    def at(self, machine: Machine, turn: Word | int) -> Tile:
        """The tile that is this block's at a turn."""
        index, part = machine.block[0] + turn * self.blocks, machine.word(0)
        if self.config.parts > 1:
            each = self.rows * self.columns
            index, part = index % each, index // each
        return Tile(
            row_block=index // self.columns * (self.config.outputs // row_blocks.ROWS),
            token=index % self.columns * self.config.tokens,
            part=part,
        )


def tile_inputs(product: Product) -> int:
    """Inputs in 128 bytes of a token."""
    return 64 if product.has_half_tokens else 128


def takes_rows(product: Product) -> bool:
    """Whether products take codes from shared memory, as they are.

    Not where the sums of blocks are scaled: there a product is 64 outputs x 128 tokens at most, and both
    operands would be three quarters of what shared memory can give.
    """
    return product.weights == product.tokens and not product.has_group_sums


def steps(product: Product, config: Config) -> int:
    """That a slice of a tile takes."""
    return product.k // tile_inputs(product) // config.parts // config.slices // config.span


@dataclass(frozen=True)
class Stage:
    """A step of one slice in shared memory, in words: tokens, tile by tile; codes; scales.

    Codes lie row block by row block; or, where products take them from here, in planes of 64 inputs, and
    in each of them row block by row block.
    """

    tile: int  # tokens of one tile
    block: int  # codes of one block of 16 outputs x 64 inputs
    row: int  # codes of 16 outputs
    plane: int | None  # codes of 64 inputs; None: row block by row block
    codes: int  # where they begin
    groups: int  # whose scales come along in pairs; part of one counts as one
    pairs: int  # scales of 16 outputs; of zeros there are as many
    scales: int  # where they begin
    token_scales: int  # of the tokens, for these inputs: where they begin
    copied: int
    size: int

    @staticmethod
    def of(product: Product, config: Config) -> "Stage":
        """The stage of a product."""
        tile = config.tokens * TILE_WORDS
        block = 32 * operands.BITS[product.weights]
        inputs = config.span * tile_inputs(product)
        row = block * inputs // row_blocks.COLUMNS
        grouped = product.has_pairs and product.group_size is not None
        groups = max(inputs // product.group_size, 1) if grouped and product.group_size else 0
        pairs = 8 * groups
        codes, row_count = config.span * tile, config.outputs // row_blocks.ROWS
        plane = row_count * block if takes_rows(product) else None
        scales = codes + row_count * row
        token_scales = scales + row_count * pairs * (2 if product.has_zeros else 1)
        copied = token_scales + (config.tokens if product.has_blocks else 0)
        size = -(-copied // _ALIGNED) * _ALIGNED
        return Stage(
            tile, block, row, plane, codes, groups, pairs, scales, token_scales, copied, size
        )  # fmt: skip


@dataclass(frozen=True)
class Shared:
    """All of shared memory, in words.

    The stages of each slice; where blocks have one tile, in their place at its end the sums that slices
    exchange, and 16-bit results on their way out; else those have a place of their own.
    """

    stage: Stage
    sums: int  # of each warpgroup, that slices exchange
    results: int  # where they begin
    chunk: int  # tokens whose results are on their way out at once
    arrivals: int  # where they begin
    size: int

    @staticmethod
    def of(product: Product, config: Config) -> "Shared":
        """The memory of a product."""
        stage = Stage.of(product, config)
        ring = config.slices * config.stages * stage.size
        sums = config.tokens * config.own if config.slices > 1 else 0
        arrivals = 4 * config.slices * config.stages
        chunk = config.tokens // config.slices

        def results() -> int:
            return config.warpgroups * chunk * (config.own // 2)

        if config.resident is None:
            start = config.warpgroups * sums
            end = max(ring, start + results())
        else:
            start = ring
            while chunk % 16 == 0 and 4 * (ring + results() + arrivals) > SHARED_BYTES:
                chunk //= 2
            end = ring + results()
        return Shared(stage, sums, start, chunk, end, end + arrivals)
