# SPDX-License-Identifier: Apache-2.0
"""One block of a model: what its layers multiply, their weights to QTensors, and what leaves the block.

All layers of a block are calibrated on what its original weights make of the tokens, in one pass, and a
second takes the tokens through the quantized block. With ``true_sequential``, as the code of Frantar et
al. calls it, one pass halts at each input, that of queries, keys and values, of the output, of gate and
up, of down, and goes on through the layers that were quantized there.
"""

import concurrent.futures
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from qjax import (
    activations,
    block_passes,
    kv_cache,
    layer_quantization,
    nnx_layers,
    observation,
    reconstruction,
    rescaling,
)
from qjax.assignment import Assignment
from qjax.block_passes import Activations, BlockPass
from qjax.blockwise import Block, Cache
from qjax.layer_quantization import Inputs
from qjax.method import Method, Rescaling
from qjax.observation import ExpertTokens, Observed
from qjax.post_training import copied
from qjax.report import LayerReport


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is done to every block.

    Attributes:
      assigned: which layers of the model are held how.
      method: how weights are rounded.
      apply: runs a block; see :class:`qjax.blockwise.Blockwise`.
      experts: what an expert is calibrated with.
      true_sequential: whether the layers of one input are quantized before the statistics of the next are
        taken.
      cache: what every block keeps in few bits; None: nothing.
    """

    assigned: Assignment
    method: Method
    apply: Callable[..., Any]
    experts: ExpertTokens = "routed"
    true_sequential: bool = False
    cache: Cache | None = None

    def paths(self, block: Block) -> list[str]:
        """The layers of a block."""
        return [path for path in self.assigned.layers if path.startswith(f"{block.path}/")]

    def wanted(self, block: Block) -> list[str]:
        """Those of them that are quantized."""
        return [path for path in self.paths(block) if self.assigned.scheme(path) is not None]

    def names(self, block: Block) -> tuple[str, ...]:
        """Those that are quantized by their paths in the block."""
        return tuple(path.removeprefix(f"{block.path}/") for path in self.wanted(block))

    def looks_at_inputs(self, block: Block) -> bool:
        """Whether it matters what the layers of a block multiply."""
        wanted = self.wanted(block)
        static = any(map(self.assigned.is_static, wanted))
        return (self.method.calibrated or static) and bool(wanted)

    def goes_on(self, block: Block) -> bool:
        """Whether the pass that statistics are taken in can go on to the end of the block.

        Not where the block is changed behind it: by learning, or by a cache in few bits.
        """
        changed = self.method.learned is not None or self.cache is not None
        return self.true_sequential and not changed and self.looks_at_inputs(block)

    def passing(self, block: Block, hidden: Activations) -> BlockPass:
        """A pass through a block."""
        return BlockPass(block=block, hidden=hidden, apply=self.apply, experts=self.experts)


def compile_ahead(block: Block, x: Float[Array, "B T D"], task: Task) -> None:
    """Compiles what a block takes all at once, not one by one where it is called, which finds it then.

    Each is compiled while the next ones are traced.
    """
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(lambda program: program.compile(), _programs(block, x, task)))


def _programs(block: Block, x: Float[Array, "B T D"], task: Task) -> Iterator[jax.stages.Lowered]:
    wanted, method = task.wanted(block), task.method
    takes_long = False
    for program in layer_quantization.programs(wanted, task.assigned, method):
        takes_long = True
        yield program
    if not takes_long:
        return
    passing, names = task.passing(block, [x]), task.names(block)
    module, hessians = block.module, {"hessians": method.needs_hessians}
    if task.true_sequential:
        for i, layers in enumerate(passing.halts(names)):
            options = hessians | {"wanted": layers, "keep": i > 0}
            traced = passing.traced(module, **options)
            yield traced.lower()
            if i:
                passing.keep(layers, [block_passes.input_shape(traced)])
        if not task.goes_on(block):
            passing.kept.clear()
    else:
        yield passing.traced(module, wanted=names, keep=False, **hessians).lower()
    finished = copied(block.module)
    kv_cache.expect(finished)
    yield passing.traced(finished).lower()


def quantize_block(passing: BlockPass, targets: Activations, task: Task) -> tuple[LayerReport, ...]:
    """Quantizes the layers of a block in place.

    Args:
      passing: a pass through the block, whose weights are there. It has come as far as
        :func:`pass_on` wants it.
      targets: what the block should give, where something is learned.
      task: how.

    Returns:
      The reports of its layers, also of those that no rule names.

    Raises:
      ValueError: as :func:`qjax.quantize_sequentially` does.
    """
    block, hidden = passing.block, passing.hidden
    wanted, method = task.wanted(block), task.method
    known: dict[str, Inputs] = {}
    in_turn = task.true_sequential and task.looks_at_inputs(block)
    if task.looks_at_inputs(block) and (not in_turn or method.rescaling is not None):
        observed, few = passing.observed(
            block.module, task.names(block), hessians=method.needs_hessians
        )
        if method.rescaling is not None:
            observed = _rescaled(block, observed, hidden, method.rescaling, task)
        known = layer_quantization.inputs_of(observed, f"{block.path}/", few)
        _check(known, method)
    # Where nothing is learned, each weight may go as soon as its codes are there.
    was = block if method.learned is None else replace(block, module=copied(block.module))
    reports = _in_turn(passing, known, task) if in_turn else {}
    if not task.goes_on(block):
        passing.kept.clear()
    paths = task.paths(block)
    reports |= _rounded([path for path in paths if path not in reports], known, task)
    if method.learned is not None and wanted:
        reports |= _learn(was, block.module, reports, known, list(hidden), list(targets), task)
    return tuple(reports[path] for path in paths)


def pass_on(passing: BlockPass, module: nnx.Module, task: Task, *, begun: bool) -> None:
    """Replaces the activations before a block by those after it.

    Args:
      passing: a pass through the block.
      module: what stands for the quantized block.
      task: how it was quantized.
      begun: whether :func:`quantize_block` did it in this pass. If it was done before, the pass halts
        where that one did, so that the same programs give the same bits.
    """
    if task.goes_on(passing.block) and not begun:
        for _ in _at_each_halt(passing, module, task):
            pass
    passing.finish(module)


def find_cache_scales(block: Block, hidden: Activations, task: Task) -> None:
    """Finds by what scales a quantized block keeps keys and values, in place; without a cache, none.

    Args:
      block: whose layers are quantized: what they give is what will be kept.
      hidden: what reaches it.
      task: how.

    Raises:
      ValueError: what it keeps is not finite.
    """
    if task.cache is None:
        return
    graphdef, state = nnx.split(block.module)
    largest = np.zeros(len(task.cache.scales), np.float32)
    for x in hidden:
        found = _largest_kept(
            graphdef,
            state,
            x,
            block.context,
            kept=task.cache.kept,
            compute_dtype=block_passes.compute_dtype(x.dtype),
        )
        largest = np.maximum(largest, np.asarray(found))
    scales = kv_cache.scales_of(block.module)
    for path, absmax in zip(task.cache.scales, largest, strict=True):
        if not np.isfinite(absmax):
            raise ValueError(
                f"{block.path}/{path}: keys or values are not finite: weights before them are damaged or "
                "overflow"
            )
        scale = activations.static_scale(jnp.asarray(absmax), task.cache.scheme.activations)
        scales[path].set_value(scale[None])


@functools.partial(jax.jit, static_argnames=("graphdef", "kept", "compute_dtype"))
def _largest_kept(
    graphdef: Any,
    state: Any,
    x: Float[Array, "B T D"],
    context: Any,
    *,
    kept: Callable[..., tuple[Float[Array, "..."], ...]],
    compute_dtype: Any,
) -> Float[Array, " scales"]:
    module = nnx.merge(graphdef, state)
    found = observation.computed(
        module, lambda: kept(module, x, context), compute_dtype=compute_dtype
    )
    return jnp.stack([jnp.max(jnp.abs(array)).astype(jnp.float32) for array in found])


def _rescaled(
    block: Block, observed: Observed, hidden: Activations, options: Rescaling, task: Task
) -> Observed:
    schemes = {
        path: task.assigned.scheme(f"{block.path}/{path}")
        for layers in observed.layers
        for path in layers
    }
    samples = _samples(hidden)
    dtype = block_passes.compute_dtype(samples.dtype)
    return rescaling.rescale(block, observed, schemes, options, samples, task.apply, dtype)


def _samples(hidden: Activations, most: int = 4096) -> Float[Array, "B T D"]:
    """Some windows, spread over all, of about so many tokens."""
    sizes = [x.shape[:2] for x in hidden]
    windows, length = sum(size for size, _ in sizes), sizes[0][1]
    count = max(1, most // length)
    chosen = np.arange(windows)[:: max(1, windows // count)][:count]
    ends = np.cumsum([size for size, _ in sizes])
    rows = (
        x[chosen[(end - len(x) <= chosen) & (chosen < end)] - (end - len(x))]
        for end, x in zip(ends, hidden, strict=True)
    )
    return jnp.concatenate(list(rows))


def _in_turn(passing: BlockPass, known: dict[str, Inputs], task: Task) -> dict[str, LayerReport]:
    """Quantizes layers one input after the other, each seeing what the quantized ones before it give.

    Args:
      passing: through the block, which is changed in place.
      known: of the inputs while nothing is quantized; brought up to date.
      task: how.
    """
    block, reports = passing.block, {}
    plain = copied(block.module)
    for layers, observed, few in _at_each_halt(passing, plain, task):
        found = layer_quantization.inputs_of(observed, f"{block.path}/", few)
        _check(found, task.method)
        known |= found
        reports |= _rounded([f"{block.path}/{path}" for path in layers], known, task)
        rescaling.simulated(plain, block.module)
    return reports


def _at_each_halt(
    passing: BlockPass, module: nnx.Module, task: Task
) -> Iterator[tuple[tuple[str, ...], Observed, dict[str, int]]]:
    """The layers of each input of a block, their statistics, and how few tokens some had."""
    # The first input is a norm away from what reaches the block: to keep it saves nothing.
    for i, layers in enumerate(passing.halts(task.names(passing.block))):
        observed, few = passing.observed(
            module, layers, hessians=task.method.needs_hessians, keep=i > 0
        )
        yield layers, observed, few


def _rounded(paths: Sequence[str], known: dict[str, Inputs], task: Task) -> dict[str, LayerReport]:
    return {
        path: layer_quantization.quantize_layer(
            path, task.assigned, task.method, known.get(path), _fallback(known.get(path))
        )
        for path in paths
    }


def _fallback(inputs: Inputs | None) -> str:
    """For the report: what was done about an expert that fewer tokens reach than it has inputs."""
    if inputs is None or inputs.few is None or not inputs.shortage:
        return ""
    return f"{inputs.shortage}: filled up with the average of all tokens"


def _check(known: dict[str, Inputs], method: Method) -> None:
    """Refuses what no method can work with, before any work is done on it."""
    for path, inputs in known.items():
        found = inputs.statistics
        if not np.isfinite(np.asarray(found.magnitude)).all():
            raise ValueError(
                f"{path}: its inputs are not finite: weights before it are damaged or overflow"
            )
        if method.needs_hessians and int(found.rows) < len(found.magnitude):
            raise ValueError(
                f"{path}: {int(found.rows)} calibration tokens for {len(found.magnitude)} inputs; a "
                f"Hessian of that many needs at least as many tokens, better ten times more"
            )


def _learn(
    was: Block,
    quantized: nnx.Module,
    reports: dict[str, LayerReport],
    known: dict[str, Inputs],
    inputs: Sequence[Array],
    targets: Sequence[Array],
    task: Task,
) -> dict[str, LayerReport]:
    """Trains the layers of a quantized block together, in place; the reports are those of the result.

    Args:
      was: the block before it was quantized, factors folded in.
      quantized: the block now.
      reports: of its layers.
      known: what they multiply.
      inputs: what reaches the block.
      targets: what it should give.
      task: whose method's last link says how to train.
    """
    start, method = time.perf_counter(), task.method
    assert method.learned is not None
    held = nnx_layers.quantized_layers(quantized)
    # A layer that shares another's weight changes with it.
    own = {path: q for path, q in held.items() if not reports[f"{was.path}/{path}"].reason}
    learned = reconstruction.reconstruct(
        was,
        own,
        inputs,
        targets,
        apply=task.apply,
        options=method.learned,
        compute_dtype=block_passes.compute_dtype(inputs[0].dtype),
    )
    layers = dict(nnx_layers.quantizable_layers(quantized))
    before = dict(nnx_layers.quantizable_layers(was.module))
    seconds = (time.perf_counter() - start) / max(1, len(own))
    for path, q in learned.weights.items():
        nnx_layers.variable_of(layers[path]).set_value(q)
        name = f"{was.path}/{path}"
        error, _ = layer_quantization.compared(
            nnx_layers.weight_of(before[path]), q, known.get(name)
        )
        links = method if name in known else replace(method.without_inputs, learned=method.learned)
        reports[name] = replace(
            reports[name], method=links.name, relative_output_error=error,
            seconds=reports[name].seconds + seconds,
        )  # fmt: skip
    return reports
