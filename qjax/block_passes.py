# SPDX-License-Identifier: Apache-2.0
"""The calibration tokens pass through a block: what its layers multiply on the way, and what leaves it.

A pass can halt at each input of the block's layers. The layers that take the input may change before it
goes on, and what was computed is not computed again: the input is kept, and in later programs it stands
where its layers would be called with what leads to it, which XLA then leaves out. So each product of a
block is taken once, but for the few beside the kept inputs, such as that of the attention's output, whose
sum with the stream both the next input and the end of the block need.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

from qjax import compilation, cpu, experts, observation
from qjax.blockwise import Block
from qjax.observation import ExpertTokens, Observed
from qjax.spilled import SpilledArrays

Activations = list[Array] | SpilledArrays  # the batches between two blocks

# Bytes of kept inputs, in those of the activations between two blocks: 1 + 1 + 3.5 of them in a block
# with a gated MLP 3.5 times as wide as the stream. What goes beyond, such as the inputs of many experts,
# is computed again.
_MOST_KEPT = 6


def compute_dtype(arriving: DTypeLike) -> Any:
    """What a block is computed in, given the dtype of what reaches it; None: what its layers say.

    On a CPU that is float32, but for bfloat16 where there are instructions for it: a pass takes half as
    long with them, and without them no less time than in float32.
    """
    if jax.default_backend() != "cpu":
        return None
    return None if arriving == jnp.bfloat16 and cpu.multiplies_bfloat16() else jnp.float32


def windows_at_once(length: int, devices: int) -> int:
    """How many windows pass through a block at once.

    On a CPU they are no more than 4096 tokens, or one window for each device: what a product of more
    gives is over 32 MiB in float32 where it is 2048 wide, and memory of that size glibc takes anew from
    the system each time, page by page.

    Args:
      length: tokens of a window.
      devices: that the windows are spread over.

    Example:
      >>> [windows_at_once(length, 1) for length in (256, 1024, 1300, 8192)]  # on a CPU
      [8, 4, 3, 1]
      >>> [windows_at_once(length, 2) for length in (256, 1024, 1300, 8192)]
      [8, 4, 2, 2]
    """
    if jax.default_backend() != "cpu":
        return 8
    return min(8, devices * max(1, 4096 // (devices * length)))


@dataclass(frozen=True, kw_only=True)
class BlockPass:
    """All batches pass through one block.

    Attributes:
      block: where it is in the model, and what it needs beside the batches.
      hidden: what reaches it, batch by batch.
      apply: runs a block; see :class:`qjax.blockwise.Blockwise`.
      experts: what an expert is calibrated with.
      kept: inputs of layers that are not computed again, by the layers' paths.
    """

    block: Block
    hidden: Activations
    apply: Callable[..., Any]
    experts: ExpertTokens = "routed"
    kept: dict[tuple[str, ...], Activations] = field(default_factory=dict)

    def halts(self, wanted: Sequence[str]) -> list[tuple[str, ...]]:
        """The layers of each input, of those that are wanted, in the order in which they are called."""
        graphdef, state = nnx.split(self.block.module)
        found: list[tuple[str, ...]] = []

        def trace(state: Any, x: Any, context: Any) -> None:
            module = nnx.merge(graphdef, state)
            run = functools.partial(self.apply, module, x, context)
            found.extend(observation.layers_by_input(module, run))

        jax.eval_shape(trace, state, self.hidden[0], self.block.context)
        halts = (tuple(path for path in layers if path in wanted) for layers in found)
        return [layers for layers in halts if layers]

    def observed(
        self, module: nnx.Module, wanted: Sequence[str], *, hessians: bool, keep: bool = False
    ) -> tuple[Observed, dict[str, int]]:
        """The statistics of what some layers multiply over all batches.

        Args:
          module: the block, or what stands for it.
          wanted: paths of the layers in the block.
          hessians: whether to take Hessians too.
          keep: whether the layers, which share one input, will not change what leads to it any more: it
            is kept.

        Returns:
          Them, and how many tokens those had that were filled up (:mod:`qjax.experts`).
        """

        def over_batches(
            paths: Sequence[str], experts: ExpertTokens, keep: bool = False
        ) -> Observed:
            options = {"hessians": hessians, "wanted": tuple(paths), "experts": experts}
            total, inputs, parts = None, _empty_like(self.hidden), nnx.split(module)
            for i, x in enumerate(self.hidden):
                passed = self._run(parts, i, x, keep=keep, **options)
                total = observation.merged(total, passed.observed)
                if keep:
                    inputs.append(passed.input)
            if keep:
                self.keep(tuple(paths), inputs)
            assert total is not None
            return total

        every = functools.partial(over_batches, experts="all")
        return experts.filled_up(over_batches(wanted, self.experts, keep), every)

    def keep(self, layers: tuple[str, ...], inputs: Any) -> None:
        """Keeps the input of some layers, batch by batch, or its shape, if there is room for it."""
        kept = [_bytes(some[0]) for some in self.kept.values()]
        if sum(kept) + _bytes(inputs[0]) <= _MOST_KEPT * _bytes(self.hidden[0]):
            self.kept[layers] = inputs

    def finish(self, module: nnx.Module) -> None:
        """Replaces the activations before the block by those after it."""
        parts = nnx.split(module)
        for i, x in enumerate(self.hidden):
            self.hidden[i] = self._run(parts, i, x).output
        self.kept.clear()

    def traced(self, module: nnx.Module, **options: Any) -> jax.stages.Traced:
        """The program of one batch, to be compiled; options as those of :meth:`observed`."""
        graphdef, state = nnx.split(module)
        given = self._given(0)
        x = self.hidden[0]
        how = self._how(x) | options
        return _run.trace(graphdef, state, x, self.block.context, *given, **how)

    def _run(self, parts: tuple[Any, Any], i: int, x: Array, **options: Any) -> "_Passed":
        graphdef, state = parts
        how = self._how(x) | options
        return _run(graphdef, state, x, self.block.context, *self._given(i), **how)

    def _given(self, i: int) -> tuple[tuple[Any, ...], tuple[tuple[str, ...], ...]]:
        return tuple(inputs[i] for inputs in self.kept.values()), tuple(self.kept)

    def _how(self, x: Array) -> dict[str, Any]:
        return {
            "apply": self.apply,
            "compute_dtype": compute_dtype(x.dtype),
            "experts": self.experts,
        }


class _Passed(NamedTuple):
    output: Any  # None where something is watched: what only it needs is not computed then
    observed: Observed
    input: Any  # of the layers that are watched, where it is to be kept


@functools.partial(
    jax.jit,
    static_argnames=(
        "graphdef", "given_to", "apply", "compute_dtype", "wanted", "hessians", "experts", "keep",
    ),
    compiler_options=compilation.WITHOUT_TRIALS,
)  # fmt: skip
def _run(
    graphdef: Any,
    state: Any,
    x: Float[Array, "B T D"],
    context: Any,
    given: tuple[Num[Array, "..."], ...],
    given_to: tuple[tuple[str, ...], ...],
    *,
    apply: Callable[..., Any],
    compute_dtype: Any,
    experts: ExpertTokens,
    wanted: tuple[str, ...] = (),
    hessians: bool = False,
    keep: bool = False,
) -> _Passed:
    module = nnx.merge(graphdef, state)
    output, inputs = [], []
    observed = observation.observe(
        module,
        lambda: output.append(apply(module, x, context)),
        hessians=hessians,
        compute_dtype=compute_dtype,
        wanted=wanted.__contains__,
        experts=experts,
        given={path: a for paths, a in zip(given_to, given, strict=True) for path in paths},
        on_input=inputs.append,
    )
    return _Passed(None if wanted else output[0], observed, inputs[0] if keep else None)


def input_shape(traced: jax.stages.Traced) -> jax.ShapeDtypeStruct:
    """Of what a program with ``keep=True`` gives to be kept: its last result."""
    last = traced.jaxpr.out_avals[-1]
    return jax.ShapeDtypeStruct(last.shape, last.dtype)


def _empty_like(hidden: Activations) -> Activations:
    return hidden.beside() if isinstance(hidden, SpilledArrays) else []


def _bytes(x: Any) -> int:
    return x.size * x.dtype.itemsize
