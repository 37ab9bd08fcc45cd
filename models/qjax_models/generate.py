# SPDX-License-Identifier: Apache-2.0
"""Generation: prompts are read in one pass, then tokens follow one by one on the device.

Prompts are padded to a power of two, so that few lengths are ever compiled. The decode loop takes its
number of steps as a value: one program serves every length of answer. It comes back after a chunk of
tokens, so that text can be shown as it comes.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qjax_models.decode_loop import LARGEST_CHUNK, DecodePrograms, DecodeState
from qjax_models.decoder import Decoder
from qjax_models.sampling import GREEDY, Sampling

SMALLEST_BUCKET = 16  # tokens; shorter prompts are padded to it

Rows = list[list[int]]  # token ids, one list per row of the batch


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What generation took; compilation is counted apart."""

    prefill_tokens: int = 0  # prompt tokens of all rows, without padding
    prefill_seconds: float = 0.0
    decode_tokens: int = 0  # handed out, but for each row's first, which the prefill chooses
    decode_seconds: float = 0.0
    compile_seconds: float = 0.0

    @property
    def prefill_tokens_per_second(self) -> float:
        """Speed of reading, all rows together."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Speed of writing, all rows together."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What came since the last one."""

    new_tokens: Rows  # a row that has stopped gets no more
    timing: Timing  # since the start


@dataclass(frozen=True, kw_only=True)
class Generation:
    """The answers to a batch of prompts."""

    tokens: Rows  # without the stop token
    stopped: list[bool]  # per row: a stop token ended it, not the limit
    timing: Timing


class Generator:
    """Generates with one model; compiled programs are kept from call to call.

    Example:
        >>> from qjax_models import DecoderConfig
        >>> config = DecoderConfig(vocab_size=64, hidden_size=32, mlp_size=48, num_layers=2,
        ...                        num_heads=4, num_kv_heads=2, head_size=8, max_positions=128)
        >>> generator = Generator(Decoder(config, rngs=nnx.Rngs(0)), capacity=32)
        >>> answer = generator.generate([[1, 2, 3], [4]], max_new=5)
        >>> [len(row) for row in answer.tokens]
        [5, 5]
    """

    def __init__(
        self,
        model: Decoder,
        *,
        capacity: int,
        sampling: Sampling = GREEDY,
        stop_tokens: Sequence[int] = (),
    ):
        """Compiles nothing yet: each program is compiled when it is first needed.

        Args:
            model: a decoder, quantized or not.
            capacity: the most tokens of prompt and answer together, per row; memory is taken for it.
            sampling: how tokens are chosen.
            stop_tokens: ids that end a row.
        """
        self.capacity = capacity
        self.vocab_size = model.config.vocab_size
        self.stop_tokens = tuple(stop_tokens)
        graph, self._params = nnx.split(model)
        programs = DecodePrograms(
            graph=graph, capacity=capacity, sampling=sampling, stop_tokens=self.stop_tokens
        )
        self._prefill = _Compiled(programs.prefill)
        self._decode = _Compiled(programs.decode, donate="state")

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new: int, *, seed: int = 0
    ) -> Generation:
        """Answers all prompts.

        Args:
            prompts: token ids, one non-empty list per row.
            max_new: the most tokens a row may get.
            seed: row r draws from the stream of seed + r, whatever the other rows are.

        Raises:
            ValueError: an empty prompt, an id outside the vocabulary, or more tokens than fit.
        """
        tokens: Rows = [[] for _ in prompts]
        timing = Timing()
        for progress in self.stream(prompts, max_new, seed=seed, chunk=LARGEST_CHUNK):
            for row, new in zip(tokens, progress.new_tokens, strict=True):
                row.extend(new)
            timing = progress.timing
        stopped = [len(row) < max_new for row in tokens]
        return Generation(tokens=tokens, stopped=stopped, timing=timing)

    def stream(
        self, prompts: Sequence[Sequence[int]], max_new: int, *, seed: int = 0, chunk: int = 8
    ) -> Iterator[Progress]:
        """The same, handed out as it comes: every row's first token, then `chunk` tokens at a time."""
        self._check(prompts, max_new, chunk)
        if max_new == 0:
            return
        state, timing = self._read(prompts, seed)
        block, is_open, count = np.asarray(state.tokens)[:, None].tolist(), [True] * len(prompts), 0
        while True:
            new_tokens, is_open = _until_stop(block, is_open, self.stop_tokens)
            if count > 0:
                handed_out = sum(map(len, new_tokens))
                timing = replace(timing, decode_tokens=timing.decode_tokens + handed_out)
            yield Progress(new_tokens=new_tokens, timing=timing)
            count += len(block[0])
            if count == max_new or not any(is_open):
                return
            state, block, timing = self._write(state, min(chunk, max_new - count), timing)

    def _check(self, prompts: Sequence[Sequence[int]], max_new: int, chunk: int) -> None:
        if not prompts:
            raise ValueError("no prompts: need at least one row of token ids")
        if max_new < 0:
            raise ValueError(f"max_new={max_new} must not be negative")
        if not 1 <= chunk <= LARGEST_CHUNK:
            raise ValueError(f"chunk={chunk} must be in 1..{LARGEST_CHUNK}")
        for index, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"prompt {index} is empty: need at least one token id")
            if len(prompt) + max_new > self.capacity:
                raise ValueError(
                    f"prompt {index} of {len(prompt)} tokens and {max_new} new ones exceed the "
                    f"capacity of {self.capacity} tokens"
                )
            outside = [token for token in prompt if not 0 <= token < self.vocab_size]
            if outside:
                raise ValueError(
                    f"prompt {index} holds token id {outside[0]}, but the model knows "
                    f"0 to {self.vocab_size - 1}"
                )

    def _read(self, prompts: Sequence[Sequence[int]], seed: int) -> tuple[DecodeState, Timing]:
        """Prefills a batch and chooses every row's first token."""
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        tokens = np.zeros((len(prompts), self._bucket(int(lengths.max()))), np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = prompt
        keys = jax.vmap(jax.random.key)(seed + jnp.arange(len(prompts)))
        state, run_seconds, compile_seconds = self._prefill(self._params, tokens, lengths, keys)
        timing = Timing(
            prefill_tokens=int(lengths.sum()),
            prefill_seconds=run_seconds,
            compile_seconds=compile_seconds,
        )
        return state, timing

    def _write(
        self, state: DecodeState, steps: int, timing: Timing
    ) -> tuple[DecodeState, Rows, Timing]:
        """Decodes up to `steps` tokens per row; fewer when all rows have stopped."""
        result, run_seconds, compile_seconds = self._decode(self._params, state, np.int32(steps))
        state, chunk, taken = result
        timing = replace(
            timing,
            decode_seconds=timing.decode_seconds + run_seconds,
            compile_seconds=timing.compile_seconds + compile_seconds,
        )
        return state, np.asarray(chunk)[:, : int(taken)].tolist(), timing

    def _bucket(self, length: int) -> int:
        """The padded length: a power of two, or the capacity if that is less."""
        return min(max(SMALLEST_BUCKET, 1 << (length - 1).bit_length()), self.capacity)


class _Compiled:
    """A jitted function that tells running from compiling."""

    def __init__(self, function: Callable, donate: str | None = None):
        self._jitted = jax.jit(function, donate_argnames=donate)
        self._compiled_shapes: set[Any] = set()

    def __call__(self, *arguments: Any) -> tuple[Any, float, float]:
        """The result, the seconds it ran, and the seconds spent on compiling first."""
        start = time.perf_counter()
        shapes = tuple(jax.tree.map(np.shape, jax.tree.leaves(arguments)))
        if shapes not in self._compiled_shapes:
            # Only to take the time: the jitted function finds the program again. Called itself, the
            # program would refuse int4 arrays that are committed to a CPU device (jax 0.10.2).
            self._jitted.lower(*arguments).compile()
            self._compiled_shapes.add(shapes)
        compiled = time.perf_counter()
        result = jax.block_until_ready(self._jitted(*arguments))
        return result, time.perf_counter() - compiled, compiled - start


def _until_stop(
    block: Rows, is_open: list[bool], stop_tokens: tuple[int, ...]
) -> tuple[Rows, list[bool]]:
    """The tokens of open rows before their first stop token, and which rows stay open."""
    ends = [
        next((i for i, token in enumerate(row) if token in stop_tokens), len(row)) for row in block
    ]
    new = [row[:end] if open_ else [] for row, end, open_ in zip(block, ends, is_open, strict=True)]
    still = [o and end == len(row) for row, end, o in zip(block, ends, is_open, strict=True)]
    return new, still
