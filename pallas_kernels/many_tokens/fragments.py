# SPDX-License-Identifier: Apache-2.0
"""How a warp of the kernel for many tokens comes by the A operands of its products."""

from dataclasses import dataclass
from typing import Any

from pallas_kernels import operands, row_blocks
from pallas_kernels.machine import Machine, Real, Rows, Sum, Word
from pallas_kernels.many_tokens import tiling
from pallas_kernels.many_tokens.stream import Stream
from pallas_kernels.many_tokens.tiling import PRODUCTS, Config, Tile
from pallas_kernels.product import BLOCK, Product


@dataclass(frozen=True)
class Fragments:
    """The weights of a warp: of each of its fragments 16 outputs."""

    machine: Machine
    product: Product
    config: Config
    stream: Stream
    lanes_out: list[Word]  # which row a lane names to each ldmatrix of a block

    @staticmethod
    def of(stream: Stream) -> "Fragments":
        """The weights that a stream brings."""
        lane = stream.machine.thread % 32
        rows = _matrix_rows(stream.product, lane)
        return Fragments(stream.machine, stream.product, stream.config, stream, rows)

    def no_sums(self) -> list[list[Sum]]:
        """Zeros."""
        nothing = self.machine.word(0) if self.product.is_whole else self.machine.real(0.0)
        return [[nothing] * (self.config.tokens // 2) for _ in range(self.config.fragments)]

    def flat(self, sums: list[list[Sum]]) -> list[Sum]:
        """Sums of all fragments in one list."""
        return [value for of_fragment in sums for value in of_fragment]

    def by_fragment(self, flat: list[Sum]) -> list[list[Sum]]:
        """What :meth:`flat` made a list of."""
        count = self.config.tokens // 2
        return [flat[count * i :][:count] for i in range(self.config.fragments)]

    def multiplied(
        self,
        step: Word,
        i: int,
        operands: list[list[Word]] | list[Rows],
        sums: list[list[Sum]] | None,
    ) -> list[list[Sum]]:
        """Sums and product i of a step, under way; no sums: the product."""
        place = self.stream.place(step) + i // PRODUCTS * self.stream.stage.tile
        return self.machine.wgmma(
            self.product.tokens, operands, place, i % PRODUCTS, sums, self.config.tokens
        )

    def rows(self, step: Word, i: int) -> list[Rows]:
        """A of product i of a step where it lies, for each fragment."""
        stage, config = self.stream.stage, self.config
        assert stage.plane is not None
        first = self.machine.warp // 4 % config.rows * (4 * config.fragments * stage.block)
        place = self.stream.place(step) + first
        plane = stage.codes + i // 2 * stage.plane
        return [Rows(place, plane + 4 * f * stage.block, i % 2) for f in range(config.fragments)]

    @property
    def code_words(self) -> int:
        """Of :meth:`codes`."""
        return 0 if self.are_operands else self.config.fragments * 4 * self._code_loads

    @property
    def _code_loads(self) -> int:
        """For a fragment, of 128 bytes of each token."""
        blocks = tiling.tile_inputs(self.product) // row_blocks.COLUMNS
        return blocks * len(self.lanes_out)

    def codes(self, step: Word, tile: int) -> list[Word]:
        """The codes of 128 bytes of each token, for each fragment, where they are to be unpacked."""
        if self.are_operands:
            return []
        blocks = tiling.tile_inputs(self.product) // row_blocks.COLUMNS
        return [
            word
            for fragment in range(self.config.fragments)
            for block in range(blocks * tile, blocks * (tile + 1))
            for part in range(len(self.lanes_out))
            for word in self._matrices(step, block, fragment, part)
        ]

    @property
    def are_operands(self) -> bool:
        """Whether codes are multiplied as they are."""
        return self.product.weights == self.product.tokens

    def _matrices(self, step: Word, block: int, fragment: int, part: int) -> list[Word]:
        """Four words of a lane, of one of the blocks of a step."""
        place = self.stream.codes_place(fragment) + self.lanes_out[part]
        place = place + self.stream.stage.block * block
        return self.machine.shared_load_matrices(self.stream.place(step) + place)

    def scales(self, step: Word) -> list[Word]:
        """For each fragment what its codes need in a step: scales, then zeros, of its groups.

        Or the scale of its block of 128 x 128; or the zeros that all inputs share.
        """
        if self.product.has_blocks:
            return [self._block_scale(step, fragment) for fragment in range(self.config.fragments)]
        groups = self.stream.stage.groups
        if not groups:
            zeros = [self.stream.arrays.zero] if self.product.has_zeros else []
            tile, _ = self.stream.tile_of(step)
            fragments = range(self.config.fragments)
            return [self._pair_of_all(array, tile, f) for f in fragments for array in zeros]
        place, g = self.stream.place(step), self.machine.thread % 32 // 4
        return [
            self.machine.shared_load(place + here + g + 8 * i)
            for fragment in range(self.config.fragments)
            for here in self.stream.pair_places(fragment)
            for i in range(groups)
        ]

    def _block_scale(self, step: Word, fragment: int) -> Word:
        machine, stream = self.machine, self.stream
        tile, step = stream.tile_of(step)
        columns = -(-self.product.n // BLOCK)
        block = stream.row_block(tile, fragment) // (BLOCK // row_blocks.ROWS)
        place, words = step * columns + block, self.product.groups * columns
        return stream.arrays.pointer(machine, stream.arrays.scale, place, words).load(0, 1)[0]

    def operands(
        self, step: Word, i: int, codes: list[Word], scales: list[Word]
    ) -> list[list[Word]]:
        """A of product i of a step, for each fragment."""
        count = self.config.fragments
        if self.are_operands:
            # Not loaded ahead: where they are carried on, the assembler lets no products overlap.
            return [self._matrices(step, i // 2, f, i % 2) for f in range(count)]
        size, scale_size = len(codes) // count, len(scales) // count
        return [
            self._unpacked(codes[size * f :][:size], scales[scale_size * f :][:scale_size], i)
            for f in range(count)
        ]

    def _unpacked(self, codes: list[Word], scales: list[Word], i: int) -> list[Word]:
        machine, product, part = self.machine, self.product, i % PRODUCTS
        if not product.has_half_tokens:
            convert = operands.int8_operand if product.is_whole else operands.e4m3_operand
            return convert(machine, product.weights, codes[2 * part :][:2])
        words = [codes[part]] if product.weights == "int4" else codes[2 * part :][:2]
        groups = self.stream.stage.groups
        group = i * groups // (PRODUCTS * self.config.span)
        offsets = self._offsets(scales[groups + group] if product.has_zeros else None)
        values = operands.half_operand(machine, product.weights, product.half, words, offsets)
        if not groups:
            return values
        factors = operands.each_twice(machine, scales[group])
        return [
            machine.half_pair_times(product.half, value, factors[r % 2])
            for r, value in enumerate(values)
        ]

    def _offsets(self, zeros: Word | None) -> tuple[Word | None, Word | None]:
        """What is subtracted from the codes of rows g and g + 8, in both halves of a word."""
        if zeros is not None:
            return operands.each_twice(self.machine, zeros)
        same = operands.constant_offset(self.machine, self.product.weights, self.product.half)
        return same, same

    def _pair_of_all(self, array: Any, tile: Tile, fragment: int) -> Word:
        """What all inputs share, of the two outputs of this lane."""
        place = self.stream.row_block(tile, fragment) * 8 + self.machine.thread % 32 // 4
        return self.stream.pointer(array, place, 8).load(0, 1)[0]

    def factors(self, step: Word, scales: list[Word]) -> list[list[Real]]:
        """For each fragment what the sums of a step are multiplied with, by group.

        Those of one eight tokens; or, where tokens have scales by block, of all.
        """
        machine, product = self.machine, self.product
        if not product.has_blocks:
            unit = machine.real(1 / operands.INT4_IN_E4M3)
            pairs = [
                [machine.half_as_real(product.pair, pair, which) for which in ("low", "high")]
                for pair in scales
            ]
            wide = [[machine.times(value, unit) for value in pair] for pair in pairs]
            return [[low, low, high, high] for low, high in wide]
        quad = self.machine.thread % 4
        place = self.stream.place(step) + self.stream.stage.token_scales + quad * 2
        eights = [machine.shared_load_row(place, 2, 8 * i) for i in range(self.config.tokens // 8)]
        return [
            [
                machine.times(machine.as_real(token), machine.as_real(scale))
                for eight in eights
                for token in (*eight, *eight)
            ]
            for scale in scales
        ]

    def scaled(self, tile: Tile, sums: list[list[Sum]]) -> list[list[Sum]]:
        """Sums over all inputs, times what codes count and the scale of the output if it is in a pair."""
        machine, product, result = self.machine, self.product, []
        if product.group_size is not None or product.is_whole or self.are_operands:
            return sums
        for fragment, values in enumerate(sums):
            if product.has_half_tokens:
                pair = self._pair_of_all(self.stream.arrays.scale, tile, fragment)
                both = [
                    machine.half_as_real(product.half, pair, which) for which in ("low", "high")
                ]
            else:
                both = [machine.real(1 / operands.INT4_IN_E4M3)] * 2
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
