# SPDX-License-Identifier: Apache-2.0
"""How the kernel for many tokens finishes the sums of a tile and stores them.

Results of 16 bits leave by the copy engine, which turns a warpgroup's ``[64 outputs, tokens]`` around on
the way: ``stmatrix`` writes rows of 16 bytes of a token to shared memory. Nobody waits for them: a
warpgroup goes on with its next tile. float32 goes out straight from the registers, 32 bytes of a token by
eight lanes; so do the sums of parts of the inputs, part after part.
"""

from dataclasses import dataclass
from typing import cast

from pallas_kernels import epilogue, row_blocks
from pallas_kernels.machine import Half, Machine, Real, Sum, Word
from pallas_kernels.many_tokens.tiling import TILE_WORDS, Config, Shared, Tile
from pallas_kernels.product import Arrays, Product

_OUTPUTS = 64  # of a fragment: 128 bytes of a token


@dataclass(frozen=True)
class TileOutput:
    """What this thread finishes: of each fragment of its warpgroup, of some tokens of a tile."""

    machine: Machine
    product: Product
    config: Config
    arrays: Arrays
    shared: Shared
    output: Word  # the first of this warpgroup, in a tile
    token: Word  # the first that it finishes, in a tile

    @staticmethod
    def of(machine: Machine, product: Product, config: Config, arrays: Arrays) -> "TileOutput":
        """That of this thread's warpgroup: behind each other they finish different tokens."""
        row, piece = machine.warp // 4 % config.rows, machine.warp // 4 // config.rows
        return TileOutput(
            machine=machine,
            product=product,
            config=config,
            arrays=arrays,
            shared=Shared.of(product, config),
            output=row * config.own,
            token=piece * (config.tokens // config.slices),
        )

    def store(self, tile: Tile, sums: list[list[Sum]]) -> None:
        """Adds up what the warpgroups behind each other have, finishes it and stores it.

        Args:
          tile: of the result.
          sums: of each fragment those of all tokens of the tile, as ``wgmma`` leaves them.
        """
        machine, config = self.machine, self.config
        if config.resident is None:
            machine.barrier()  # the stages are used for something else now
        if config.slices > 1:
            sums = self._exchanged(sums)
        store = self._store_wide if self.product.out == "float32" else self._copy_out
        store(tile, sums)

    def _exchanged(self, sums: list[list[Sum]]) -> list[list[Sum]]:
        """Sums over all inputs, of the tokens that this warpgroup finishes; added in a fixed order."""
        machine, config, count = self.machine, self.config, len(sums[0])
        lane, row = machine.thread % 128, machine.warp // 4 % config.rows
        piece, mine = machine.warp // 4 // config.rows, count // config.slices
        size = self.shared.sums

        def start(piece: Word | int) -> Word:
            return (row + piece * config.rows) * size + lane

        for fragment, values in enumerate(sums):
            for i, value in enumerate(values):
                bits = epilogue.as_word(machine, self.product, value)
                machine.shared_store(start(piece), bits, 128 * (count * fragment + i))
        machine.barrier()
        return [
            [
                self._added(
                    [
                        machine.shared_load(
                            start(other) + piece * (128 * mine), 128 * (count * fragment + i)
                        )
                        for other in range(config.slices)
                    ]
                )
                for i in range(mine)
            ]
            for fragment in range(config.fragments)
        ]

    def _added(self, bits: list[Word]) -> Sum:
        total, *others = (epilogue.as_sum(self.machine, self.product, word) for word in bits)
        for other in others:
            total = epilogue.plus(self.machine, self.product, total, other)
        return total

    def _places(self, tile: Tile, fragment: int, i: int) -> tuple[Word, Word]:
        """Token and output of a sum."""
        lane, warp = self.machine.thread % 32, self.machine.warp % 4
        m = tile.token + self.token + lane % 4 * 2 + self._token(i)
        n = tile.row_block * row_blocks.ROWS + self.output + warp * row_blocks.ROWS + lane // 4
        return m, n + (_OUTPUTS * fragment + 8 * (i // 2 % 2))

    @staticmethod
    def _token(i: int) -> int:
        """Tokens from the first sum of a lane to another."""
        return 8 * (i // 4) + i % 2

    def _finished(self, tile: Tile, sums: list[list[Sum]], first: int) -> list[list[Real]]:
        """Results of sums that follow so many others of their fragment."""
        machine, product, arrays = self.machine, self.product, self.arrays
        token, _ = self._places(tile, 0, 0)
        offsets = [self._token(first + i) for i in range(len(sums[0])) if i % 4 < 2]
        of_tokens = epilogue.of_tokens(machine, product, arrays, token, offsets)
        result = []
        for fragment, values in enumerate(sums):
            of_outputs = [
                epilogue.of_output(machine, product, arrays, self._places(tile, fragment, i)[1])
                for i in (0, 2)
            ]
            result.append(
                [
                    epilogue.finished(
                        machine, product, arrays, value, *self._places(tile, fragment, first + i),
                        token_scale=of_tokens[i // 4 * 2 + i % 2], output=of_outputs[i // 2 % 2],
                    )
                    for i, value in enumerate(values)
                ]
            )  # fmt: skip
        return result

    def _store_wide(self, tile: Tile, sums: list[list[Sum]]) -> None:
        product = self.product
        for fragment, values in enumerate(self._finished(tile, sums, 0)):
            for i, value in enumerate(values):
                m, n = self._places(tile, fragment, i)
                inside = (m < product.m) & (n < product.n)
                place = (tile.part * product.m + m) * product.n + n
                self.machine.store(self.arrays.out, place, value, inside)

    def _copy_out(self, tile: Tile, sums: list[list[Sum]]) -> None:
        """Chunk after chunk of tokens: what their places in shared memory held before must be out."""
        machine, chunk = self.machine, self.shared.chunk
        each = chunk // 2  # sums of a fragment
        fragment_words = chunk * TILE_WORDS
        start = machine.warp // 4 * (self.config.fragments * fragment_words) + self.shared.results
        for first in range(0, len(sums[0]), each):
            values = self._finished(tile, [of[first : first + each] for of in sums], first)
            machine.wait_for_copies_out()
            machine.warpgroup_barrier()
            for fragment, of_fragment in enumerate(values):
                self._write(start + fragment * fragment_words, of_fragment)
            machine.warpgroup_barrier()
            token = tile.token + self.token + 2 * first
            output = tile.row_block * row_blocks.ROWS + self.output

            def copy(start: Word = start, token: Word = token, output: Word = output) -> None:
                for fragment in range(self.config.fragments):
                    here = start + fragment * fragment_words
                    machine.copy_out(
                        here, self.arrays.out, token, output + _OUTPUTS * fragment, chunk
                    )

            machine.one_thread(machine.warp % 4 < 1, copy)

    def _write(self, start: Word, values: list[Real]) -> None:
        """Values of a fragment as rows of tokens, as `copy_out` wants them."""
        machine, half = self.machine, cast(Half, self.product.out)
        pairs = [machine.half_pair(half, *values[i : i + 2]) for i in range(0, len(values), 2)]
        lane, warp = machine.thread % 32, machine.warp % 4
        for first in range(0, len(pairs), 4):
            # Pairs are of outputs 0 to 7 and 8 to 15 of eight tokens, then of the next eight.
            matrix = lane // 8
            token = matrix // 2 * 8 + lane % 8 + 4 * first
            sixteenth = (warp * 2 + matrix % 2) ^ (lane % 8)
            place = start + token * TILE_WORDS + sixteenth * 4
            machine.shared_store_matrices(place, pairs[first : first + 4])
