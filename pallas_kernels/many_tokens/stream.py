# SPDX-License-Identifier: Apache-2.0
"""How tokens, codes and scales come to shared memory, for the kernel of many tokens."""

from dataclasses import dataclass
from typing import Any

from pallas_kernels import row_blocks
from pallas_kernels.machine import Machine, Pointer, Word
from pallas_kernels.many_tokens import tiling
from pallas_kernels.many_tokens.tiling import Config, Shared, Stage, Tile, Tiles
from pallas_kernels.product import Arrays, Product


def start_arrivals(machine: Machine, product: Product, config: Config) -> None:
    """Makes the arrivals of all streams of a block ready."""
    stages, full = config.slices * config.stages, Shared.of(product, config).arrivals
    machine.start_arrivals(machine.word(full), stages, threads=1)
    machine.start_arrivals(machine.word(full + 2 * stages), stages, threads=4 * config.rows)
    machine.barrier()


@dataclass(frozen=True)
class Stream:
    """The steps of one slice, of one tile after the other, in a ring of stages.

    A stage has an *arrival* for what is copied into it, and one for the warps that have done with it. A
    thread of each warp begins the copies of its warp's codes and scales, one warp those of the tokens; or
    the warps of a loader, a warpgroup that does nothing else, share out both.
    """

    machine: Machine
    product: Product
    config: Config
    arrays: Arrays
    stage: Stage
    tiles: Tiles
    steps: int  # of a tile
    all_steps: Word  # of all tiles of this block
    first: Word  # step of the slice in its part of the inputs
    start: Word  # of its stages
    full: Word  # arrivals of its stages, two words each: copied
    free: Word  # likewise: done with
    own: list[Word]  # row blocks of a tile that this warp multiplies, or copies as a loader
    leads: Word  # whether this warp copies the tokens

    @staticmethod
    def at(machine: Machine, product: Product, config: Config, arrays: Arrays) -> "Stream":
        """The stream of this thread's slice; where there is a loader, one that only multiplies."""
        warpgroup, warp = machine.warp // 4, machine.warp % 4
        row, piece = warpgroup % config.rows, warpgroup // config.rows
        own = [(row * config.fragments + f) * 4 + warp for f in range(config.fragments)]
        return Stream._of(machine, product, config, arrays, piece, own, (row < 1) & (warp < 1))

    @staticmethod
    def of_loader(machine: Machine, product: Product, config: Config, arrays: Arrays) -> "Stream":
        """The stream of the loader, which copies for all warpgroups."""
        warp, piece = machine.warp % 4, machine.word(0)
        own = [warp + 4 * f for f in range(config.rows * config.fragments)]
        return Stream._of(machine, product, config, arrays, piece, own, warp < 1)

    @staticmethod
    def _of(
        machine: Machine, product: Product, config: Config, arrays: Arrays, piece: Word,
        own: list[Word], leads: Word,
    ) -> "Stream":  # fmt: skip
        shared, tiles = Shared.of(product, config), Tiles.of(product, config)
        steps, stages = tiling.steps(product, config), config.slices * config.stages
        full = piece * (2 * config.stages) + shared.arrivals
        return Stream(
            machine=machine,
            product=product,
            config=config,
            arrays=arrays,
            stage=shared.stage,
            tiles=tiles,
            steps=steps,
            all_steps=machine.word(steps)
            if config.resident is None
            else tiles.count(machine) * steps,
            first=piece * steps,
            start=piece * (config.stages * shared.stage.size),
            full=full,
            free=full + 2 * stages,
            own=own,
            leads=leads,
        )

    def open(self) -> None:
        """Begins the first steps, where no loader does."""
        if not self.config.loader:
            for step in range(self.config.stages - 2):
                self.begin(self.machine.word(step))

    def begin_ahead(self, step: Word) -> None:
        """Begins the step that takes the place of the one before the last, where no loader does."""
        if not self.config.loader:
            self.begin(step + (self.config.stages - 2))

    def begin_all(self) -> None:
        """All that the loader does: begins step after step as soon as a stage is free."""

        def one(step: Word, carry: list[Any]) -> list[Any]:
            self.begin(step)
            return carry

        self.machine.loop(self.all_steps, [], one)

    def place(self, step: Word) -> Word:
        """Where a step lies."""
        return self.start + step % self.config.stages * self.stage.size

    def tile_of(self, step: Word) -> tuple[Tile, Word]:
        """The tile that a step belongs to, and which step of all inputs it is."""
        turn, own_step = self.machine.word(0), step
        if self.config.resident is not None:
            turn, own_step = step // self.steps, step % self.steps
        tile = self.tiles.at(self.machine, turn)
        each = self.steps * self.config.slices  # of a part
        return tile, own_step + self.first + tile.part * each

    def row_block(self, tile: Tile, fragment: int) -> Word:
        """The row block of a fragment of this warp; beyond the last one that."""
        last = self.product.n // row_blocks.ROWS - 1
        return self.machine.minimum(tile.row_block + self.own[fragment], last)

    def group(self, step: Word) -> Word:
        """The first group of a step of all inputs, of those that have scales in pairs."""
        inputs = self.config.span * tiling.tile_inputs(self.product)
        each = max((self.product.group_size or 0) // inputs, 1)  # steps of a group
        return step * self.stage.groups if each == 1 else step // each

    def _turn(self, step: Word, arrivals: Word) -> tuple[Word, Word]:
        """The arrival of a step's stage, and how often the stage was used before."""
        return arrivals + step % self.config.stages * 2, step // self.config.stages

    def begin(self, step: Word) -> None:
        """Begins to copy a step, if there is such a one, when all warps have done with its stage."""
        machine, exists = self.machine, step < self.all_steps
        full, used = self._turn(step, self.full)
        free, _ = self._turn(step, self.free)
        machine.wait_for(free, used + 1)  # the turn before; what was never used is free
        place = self.place(step)
        tile, step = self.tile_of(step)

        def copy_tokens() -> None:
            machine.expect(full, 4 * self.stage.copied)
            self._copy_tokens(tile, step, place, full)

        def copy_weights() -> None:
            for fragment in range(len(self.own)):
                block = self.row_block(tile, fragment)
                self._copy_weights(block, fragment, step, place, full)

        machine.one_thread(exists & self.leads, copy_tokens)
        machine.one_thread(exists, copy_weights)

    def _copy_tokens(self, tile: Tile, step: Word, place: Word, full: Word) -> None:
        machine, config, product = self.machine, self.config, self.product
        for i in range(config.span):
            column = (step * config.span + i) * tiling.tile_inputs(product)
            here = place + i * self.stage.tile
            machine.copy_tokens(here, self.arrays.x, tile.token, column, config.tokens, full)
        if product.has_blocks:  # of all tokens, block after block, whole tiles of them
            tokens = self.tiles.columns * config.tokens
            source = machine.pointer(self.arrays.token_scale, step * tokens + tile.token)
            machine.copy_words(place + self.stage.token_scales, source, config.tokens, full)

    def _copy_weights(
        self, block: Word, fragment: int, step: Word, place: Word, full: Word
    ) -> None:
        machine, product, stage = self.machine, self.product, self.stage
        words = product.k // row_blocks.COLUMNS * stage.block  # of a row block
        source = self.pointer(self.arrays.codes, block * words + step * stage.row, words)
        if stage.plane is None:
            machine.copy_words(place + self.codes_place(fragment), source, stage.row, full)
        else:
            for i in range(stage.row // stage.block):
                here = place + (self.own[fragment] * stage.block + (stage.codes + i * stage.plane))
                source_of = source.advanced(machine.word(i), stage.block)
                machine.copy_words(here, source_of, stage.block, full)
        if stage.groups:
            pairs = (block * product.groups + self.group(step)) * 8
            for array, here in zip(self._pairs, self.pair_places(fragment), strict=True):
                source = self.pointer(array, pairs, product.groups * 8)
                machine.copy_words(place + here, source, stage.pairs, full)

    def pointer(self, array: Any, word: Word, each: int) -> Pointer:
        """A place in the layer's part of an array that has so many words for a row block."""
        rows = self.product.n // row_blocks.ROWS
        return self.arrays.pointer(self.machine, array, word, rows * each)

    @property
    def _pairs(self) -> list[Any]:
        """Arrays of scales, and of zeros if there are any."""
        return [self.arrays.scale] + ([self.arrays.zero] if self.product.has_zeros else [])

    def codes_place(self, fragment: int) -> Word:
        """Where the codes of a fragment of this warp lie in a stage, row block by row block."""
        return self.own[fragment] * self.stage.row + self.stage.codes

    def pair_places(self, fragment: int) -> list[Word]:
        """Where the scales of a fragment lie in a stage, and the zeros if there are any."""
        start, stage = self.own[fragment] * self.stage.pairs, self.stage
        all_pairs = stage.pairs * (self.config.outputs // row_blocks.ROWS)
        return [start + (stage.scales + all_pairs * i) for i in range(len(self._pairs))]

    def after(self, step: Word) -> Word:
        """The next step; after the last one there is none: that again, and nobody takes it."""
        return self.machine.minimum(step + 1, self.all_steps + 0xFFFFFFFF)

    def leave(self, step: Word, where: Word | None = None) -> None:
        """This warp has done with a step, if the condition holds; None: it has."""
        free, _ = self._turn(
            step + self.config.stages, self.free
        )  # of the step before the first, too
        self.machine.one_thread(where, lambda: self.machine.arrive(free))

    def wait(self, step: Word) -> None:
        """Waits for a step; once it was waited for, in no time."""
        self.machine.wait_for(*self._turn(step, self.full))
