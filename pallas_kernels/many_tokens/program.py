# SPDX-License-Identifier: Apache-2.0
"""The program of a block for many tokens, which configurations fit it, and which one to begin with."""

import dataclasses
import itertools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.device import MULTIPROCESSORS
from pallas_kernels.machine import Machine, Word
from pallas_kernels.many_tokens import group_sums, running_sums, stream, tiling
from pallas_kernels.many_tokens.fragments import Fragments
from pallas_kernels.many_tokens.stream import Stream
from pallas_kernels.many_tokens.tile_output import TileOutput
from pallas_kernels.many_tokens.tiling import Config, Shared, Tiles
from pallas_kernels.product import MOST_RESULTS, SHARED_BYTES, Arrays, Product

# Of a thread that multiplies and one that loads, by the number of warpgroups that multiply.
_REGISTERS = {2: (240, 24), 3: (160, 32)}
_MOST_GROUP_SUMS = 128  # tokens of a tile: their sums of a group take registers of their own


def check(product: Product, config: Config) -> None:
    """Checks that a configuration fits a product.

    Raises:
      ValueError: it does not; with the numbers.
    """
    if config.stages < 3:
        raise ValueError(
            f"{config.stages=} must be at least 3: two are multiplied, one is copied into"
        )
    inputs = tiling.tile_inputs(product)
    if product.k // inputs % (config.parts * config.slices * config.span):
        raise ValueError(
            f"{product.k // inputs} times {inputs} inputs are not divisible by "
            f"{config.parts=} x {config.slices=} x {config.span=}"
        )
    _check_parts(product, config)
    if config.tokens % (8 * config.slices) or config.tokens > 256:
        raise ValueError(
            f"{config.tokens=} must be a multiple of 8 x {config.slices=}, and at most 256"
        )
    if product.is_whole and config.tokens > 32 and config.tokens % 16:
        raise ValueError(f"{config.tokens=} of int8 must be a multiple of 16 beyond 32")
    inputs, group = inputs * config.span, product.group_size
    if group is not None and inputs % group and group % inputs:
        raise ValueError(f"{config.span=}: steps of {inputs} inputs straddle groups of {group}")
    if product.has_group_sums and (config.span > 1 or config.tokens > _MOST_GROUP_SUMS):
        raise ValueError(
            f"{config.span=} and {config.tokens=} must be 1 and at most {_MOST_GROUP_SUMS} "
            "where the sums of groups are scaled"
        )
    if config.outputs > 512:
        raise ValueError(f"{config.outputs} outputs of a tile are more than 512")
    if config.threads > 1024:
        raise ValueError(f"{config.rows=} x {config.slices=} warpgroups are more than 1024 threads")
    if config.resident is not None and config.slices > 1:
        raise ValueError(f"{config.slices=} must be 1 where {config.resident=} blocks take turns")
    if config.loader and (config.slices > 1 or config.warpgroups not in _REGISTERS):
        raise ValueError(
            f"{config.rows=} must be 2 or 3 and {config.slices=} 1 where a loader copies for them"
        )
    if 4 * shared_words(product, config) > SHARED_BYTES:
        raise ValueError(f"{config} needs more than {SHARED_BYTES} bytes of shared memory")


def _check_parts(product: Product, config: Config) -> None:
    """Parts of the inputs: their sums must be exact where sums are, and as many as can be counted."""
    if config.parts > 1 and product.is_whole:
        raise ValueError(
            f"{config.parts=} must be 1 where sums are int32: those of parts are float32"
        )
    if config.parts * product.m * product.n > MOST_RESULTS:
        raise ValueError(
            f"{config.parts} parts of {product.m} x {product.n} results are more than {MOST_RESULTS}"
        )


def shared_words(product: Product, config: Config) -> int:
    """Words of shared memory."""
    return Shared.of(product, config).size


def grid(product: Product, config: Config) -> tuple[int, int]:
    """Blocks, in one row."""
    return Tiles.of(product, config).blocks, 1


def token_scales(
    product: Product, config: Config, token_scale: Float[Array, "m blocks"]
) -> Float[Array, "blocks tokens"]:
    """Scales of tokens by block as the kernel takes them: of whole tiles of tokens, block after block."""
    tokens = Tiles.of(product, config).columns * config.tokens
    return jnp.pad(token_scale.T, ((0, 0), (0, tokens - product.m)))


def default_config(product: Product, multiprocessors: int = MULTIPROCESSORS) -> Config:
    """A configuration that fits, for products that no table names.

    Up to 64 tokens reading counts: small tiles, steps of 256 bytes, and where even so multiprocessors are
    left over, slices of the inputs. Beyond, arithmetic does: tiles of 128 outputs x 256 tokens (128 where
    groups have sums), with a loader, smaller ones where there are too few; where each multiprocessor has
    more than two, by turns. Parts of the inputs for 16-bit tokens, whose weights cost the more the
    smaller tiles are, where they keep nine multiprocessors of ten busy: four or more up to 64 tokens, as
    other tiles are not so much worse there. Less of everything where shared memory ends.
    """
    if product.has_half_tokens and (parted := _parted(product, multiprocessors)):
        return parted
    if product.m <= 64:
        return _short(product, multiprocessors)
    most = _MOST_GROUP_SUMS if product.has_group_sums else 256
    sizes = [(2, most), (1, most), (1, 128), (1, 64)]
    cuts = [
        Config(rows=rows, tokens=tokens, loader=rows in _REGISTERS)
        for rows, tokens in sizes
        if tokens <= most
    ]
    cuts = [config for config in cuts if _fits(product, config)]
    config = next((c for c in cuts if _tiles(product, c) >= multiprocessors), cuts[-1])
    by_turns = dataclasses.replace(config, resident=multiprocessors)
    many = _tiles(product, config) > 2 * multiprocessors
    return by_turns if many and _fits(product, by_turns) else config


def _parted(product: Product, multiprocessors: int) -> Config | None:
    if product.m <= 64:
        config, least = Config(rows=2, tokens=64, span=2), 4
    else:
        config, least = Config(rows=2, tokens=256, loader=True), 2
    tiles = _tiles(product, config)
    parts = 1 << max(0, (multiprocessors // tiles).bit_length() - 1)
    config = dataclasses.replace(config, parts=parts)
    busy = parts >= least and 10 * parts * tiles >= 9 * multiprocessors
    return config if busy and _fits(product, config) else None


def _short(product: Product, multiprocessors: int) -> Config:
    outputs = -(-product.n // 64)
    if outputs >= 3 * multiprocessors:
        rows, slices = 2, 1
    else:
        rows, slices = 1, 2 if 3 * outputs >= 2 * multiprocessors else 4
    tokens = 64 if slices < 4 and product.m > 32 else 32
    span = 1 if product.has_group_sums else 2
    choices = itertools.product((span, 1), (4, 3), (slices, slices // 2 or 1, 1))
    cuts = [
        Config(rows=rows, slices=slices, tokens=tokens, span=span, stages=stages)
        for span, stages, slices in choices
    ]
    return next(config for config in cuts if _fits(product, config))


def _tiles(product: Product, config: Config) -> int:
    tiles = Tiles.of(product, config)
    return tiles.rows * tiles.columns


def _fits(product: Product, config: Config) -> bool:
    try:
        check(product, config)
    except ValueError:
        return False
    return True


def kernel(machine: Machine, arrays: Arrays, product: Product, config: Config) -> None:
    """One block: `rows` x `slices` warpgroups, and maybe a loader."""
    stream.start_arrivals(machine, product, config)

    def multiply(machine: Machine) -> None:
        _multiply_tiles(Stream.at(machine, product, config, arrays), arrays)

    def load(machine: Machine) -> None:
        Stream.of_loader(machine, product, config, arrays).begin_all()

    if config.loader:
        registers = _REGISTERS[config.warpgroups]
        machine.parted(128 * config.warpgroups, registers, multiply, load)
    else:
        multiply(machine)


def _multiply_tiles(own: Stream, arrays: Arrays) -> None:
    machine, product, config = own.machine, own.product, own.config
    weights = Fragments.of(own)
    output = TileOutput.of(machine, product, config, arrays)
    own.open()
    sums_of = group_sums if product.has_group_sums else running_sums

    def one_tile(turn: Word, carry: list[Any]) -> list[Any]:
        sums, carry = sums_of.of_tile(weights, turn, carry)
        tile = own.tiles.at(machine, turn)
        output.store(tile, weights.scaled(tile, sums))
        return carry

    carry = sums_of.begun(weights)
    if config.resident is None:
        one_tile(machine.word(0), carry)
    else:
        machine.loop(own.tiles.count(machine), carry, one_tile)
    machine.wait_for_copies_out()
