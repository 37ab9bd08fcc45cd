# SPDX-License-Identifier: Apache-2.0
"""Which products :mod:`pallas_kernels.few_tokens` takes, and how their work is cut up.

Configurations are tuned on a GPU and committed in `few_tokens.json`, keyed by device, kind of product and
shape; `scripts/tune_few_tokens.py` fills it.
"""

import functools
import importlib.resources
import json
from dataclasses import dataclass
from typing import Any, Literal, cast

import jax

from pallas_kernels import operands, row_blocks
from pallas_kernels.machine import Half
from pallas_kernels.operands import Weights

CHUNK = 128  # inputs that a warp takes in one step
MOST_TOKENS = 32  # that a block multiplies; more are further blocks, which read the weights again
GROUP_SIZES = (32, 64, 128)
BUCKETS = (8, 16, 32, 64)  # of tokens, in the table
BLOCK = 128  # inputs and outputs that share a scale where 8-bit floats meet; inputs of a token, too

Tokens = Literal["bfloat16", "float16", "int8", "float8_e4m3fn"]
TOKENS: tuple[Tokens, ...] = ("bfloat16", "float16", "int8", "float8_e4m3fn")
_BYTE_TOKENS: dict[Weights, tuple[Tokens, ...]] = {
    "int4": ("int8", "float8_e4m3fn"), "int8": ("int8",), "float8_e4m3fn": ("float8_e4m3fn",),
}  # fmt: skip
_MOST_INPUTS = (
    2**17
)  # of integers: 2**17 products of two int8 are the first that may not fit an int32

_SHARED_BYTES = 227 * 1024  # of a block on Hopper
_NEAREST_DEVICE = "NVIDIA H100 80GB HBM3"  # for Hopper GPUs that have no table of their own


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
      weights: dtype of the codes.
      tokens: dtype of the tokens.
      has_zeros: whether groups have a zero of their own, instead of 0.
      one_scale: whether one scale serves all outputs; with 8-bit tokens only.
      one_token_scale: whether one serves all tokens; likewise.
    """

    m: int
    k: int
    n: int
    group_size: int | None
    weights: Weights = "int4"
    tokens: Tokens = "bfloat16"
    has_zeros: bool = False
    one_scale: bool = False
    one_token_scale: bool = False

    @property
    def columns(self) -> int:
        """Tokens of one block, a multiple of 8."""
        return 8 * -(-min(self.m, MOST_TOKENS) // 8)

    @property
    def groups(self) -> int:
        """Scales of an output."""
        return 1 if self.group_size is None else self.k // self.group_size

    @property
    def half(self) -> Half:
        """Dtype of 16-bit tensor-core operands: 8-bit floats are multiplied as float16, exactly."""
        return "bfloat16" if self.tokens == "bfloat16" else "float16"

    @property
    def has_half_tokens(self) -> bool:
        """Whether tokens have 16 bits; the scales of weights then come in pairs of their dtype."""
        return self.tokens == self.half

    @property
    def has_blocks(self) -> bool:
        """Whether tokens and weights have float32 scales for each 128 inputs."""
        return not self.has_half_tokens and self.group_size is not None

    @property
    def is_whole(self) -> bool:
        """Whether sums are int32."""
        return self.tokens == "int8"

    @property
    def step(self) -> int:
        """Inputs of a tensor-core product."""
        return 32 if self.is_whole else 16

    @property
    def span(self) -> int:
        """Inputs of one load of tokens: in each of 4 lanes 8 neighbours, or 16 where all have 8 bits."""
        return 32 if self.has_half_tokens or self.weights == "int4" else 64


def why_not(
    m: int, k: int, n: int, *, weights: str, tokens: str, group_size: int | None, has_zeros: bool
) -> str | None:
    """Why the kernel cannot take a product, in words with the numbers; None if it can."""
    if weights not in operands.WEIGHTS:
        return f"weights are {weights}, must be one of {', '.join(operands.WEIGHTS)}"
    halves = TOKENS[:2]
    allowed = (*halves, *_BYTE_TOKENS[cast(Weights, weights)])
    if tokens not in allowed:
        return f"tokens are {tokens}, must be {' or '.join(allowed)} for {weights} weights"
    if k % CHUNK:
        return f"{k=} must be divisible by {CHUNK}"
    if n % row_blocks.ROWS:
        return f"{n=} must be divisible by {row_blocks.ROWS}"
    if tokens == "int8" and k >= _MOST_INPUTS:
        return f"{k=} must be below {_MOST_INPUTS}, or the sum of products may not fit an int32"
    sizes = GROUP_SIZES if tokens in halves else (BLOCK,) if tokens == weights != "int8" else ()
    if group_size is not None and group_size not in sizes:
        needed = f"one of {sizes}, or a scale a channel" if sizes else "None: a scale a channel"
        return f"{group_size=} must be {needed}, with {tokens} tokens and {weights} weights"
    if has_zeros and (weights not in ("int4", "int8") or tokens not in halves):
        return f"zeros go with integer weights and 16-bit tokens, these are {weights} and {tokens}"
    return None if m and k and n else f"there are no tokens, inputs or outputs: {m=}, {k=}, {n=}"


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
    if 4 * shared_words(product, config) > _SHARED_BYTES:
        raise ValueError(f"{config} needs more than {_SHARED_BYTES} bytes of shared memory")


def shared_words(product: Product, config: Config) -> int:
    """Words of shared memory: the sums of every warp."""
    return config.threads // 32 * product.columns * row_blocks.ROWS * config.blocks


def config_for(product: Product, device: str | None = None) -> Config:
    """The tuned configuration of the nearest product in the device's table, else the default one.

    Nearest: the same ``k`` and ``n``, the same codes, tokens of as many bits, and their number in the
    same bucket of `BUCKETS`; a configuration that does not fit this very product is passed over.

    Args:
      product: what is to be computed.
      device: as JAX names its kind; None: the default device.
    """
    kind = jax.devices()[0].device_kind if device is None else device
    tokens = "bfloat16" if product.has_half_tokens else product.tokens
    bucket = next((b for b in BUCKETS if product.m <= b), BUCKETS[-1])
    wanted = (product.weights, tokens, bucket, product.k, product.n)
    for entry in tuned().get(kind, tuned()[_NEAREST_DEVICE]):
        if tuple(entry[key] for key in ("weights", "tokens", "m", "k", "n")) == wanted:
            config = Config(**entry["config"])
            try:
                check(product, config)
            except ValueError:
                continue
            return config
    return default_config(product)


@functools.cache
def tuned() -> dict[str, list[dict[str, Any]]]:
    """The committed table: device kind to entries."""
    text = importlib.resources.files("pallas_kernels").joinpath("few_tokens.json").read_text()
    return json.loads(text)["devices"]


def product_of(entry: dict[str, Any]) -> Product:
    """The product that an entry of the table was tuned for: groups of 128 where there are any."""
    has_groups = entry["tokens"] in TOKENS[:2]
    return Product(
        m=entry["m"], k=entry["k"], n=entry["n"], group_size=128 if has_groups else None,
        weights=cast(Weights, entry["weights"]), tokens=cast(Tokens, entry["tokens"]),
    )  # fmt: skip


def default_config(product: Product, multiprocessors: int = 132) -> Config:
    """A configuration that fits, for products that no table names.

    One block for each multiprocessor, with the outputs that fall to it, and as many slices as make 16
    warps: that many hide the latency of memory and leave 128 registers to a thread. The sums of more
    than 16 tokens need more registers: 8 warps.
    """
    warps = 16 if product.columns <= 16 else 8
    row_count = -(-product.n // (row_blocks.ROWS * multiprocessors))
    blocks = 2 if product.m > 8 and row_count > 1 else 1
    rows = min(-(-row_count // blocks), warps)
    chunks = product.k // CHUNK
    slices = max(s for s in range(1, warps // rows + 1) if chunks % s == 0)
    depth = 2 if blocks == 1 and chunks // slices % 2 == 0 else 1
    return Config(rows=rows, slices=slices, blocks=blocks, depth=depth)
