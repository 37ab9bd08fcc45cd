# SPDX-License-Identifier: Apache-2.0
"""Calibrated quantization block by block: each sees what the quantized ones before it make of the tokens.

One block's weights and statistics are alive at a time where a :class:`qjax.storage.Storage` holds the
others outside, and one set of activations of the calibration tokens, in memory or in a file; two where
rounding is learned, which wants to get to what the unquantized blocks make of the tokens. Statistics of a
block are taken while its own weights are still as they were.

The report names an expert that fewer tokens reach than it has inputs; :mod:`qjax.experts` says what it is
calibrated with.
"""

import concurrent.futures
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from qjax import (
    assignment,
    compilation,
    experts,
    folding,
    layer_quantization,
    nnx_layers,
    observation,
    reconstruction,
    rescaling,
    rotating,
)
from qjax.assignment import Assignment
from qjax.blockwise import Block, Blockwise
from qjax.layer_quantization import Inputs
from qjax.method import Method
from qjax.nnx_layers import QuantizableLayer
from qjax.observation import ExpertTokens, Observed
from qjax.post_training import copied
from qjax.ranges import RangeSearch
from qjax.report import LayerReport, QuantizationReport
from qjax.scheme import Recipe
from qjax.spilled import SpilledArrays
from qjax.storage import Originals, Storage

Model = TypeVar("Model", bound=nnx.Module)
Activations = list[Array] | SpilledArrays  # the batches between two blocks


def quantize_sequentially(
    model: Model,
    chain: Callable[[Model, int], Blockwise],
    tokens: Int[np.ndarray, "n length"],
    recipe: str | Recipe,
    *,
    method: str | Method,
    search: RangeSearch | None = None,
    batch_size: int = 8,
    experts: ExpertTokens = "routed",
    storage: Storage | None = None,
    spill: Path | None = None,
    on_step: Callable[[str], None] = lambda what: None,
) -> tuple[Model, QuantizationReport]:
    """Quantizes a model block by block with calibration.

    Layers outside the blocks that the recipe names, embeddings and heads, are rounded to nearest.

    Args:
      model: left as it is. With a storage that holds the weights outside, shapes in place of arrays.
      chain: what makes a :class:`qjax.blockwise.Blockwise` of it, given the length of the windows.
      tokens: calibration windows; a method that looks at no activations takes none of them, unless a
        scheme is static: its input scale is of the inputs' largest magnitude.
      recipe: which layers are held how; a scheme's name means that scheme everywhere.
      method: how weights are rounded, or its name.
      search: how the range of each tile is chosen, where ``method`` is a name; None: as suits it.
      batch_size: windows at once; results do not depend on it but for the order of sums.
      experts: what an expert is calibrated with: ``"routed"``, the tokens that are sent to it, or
        ``"all"``.
      storage: where the weights come from and go to, part by part; None: they are in the model. Parts
        that it has finished are not quantized again: the activations are taken through them.
      spill: a directory for a file that holds the activations between two blocks; None: they are in
        memory.
      on_step: called with what was done, ``2 * blocks`` times; for progress bars.

    Returns:
      The quantized model, with shapes in place of arrays where a storage has them, and the report of
      every layer.

    Raises:
      ValueError: as :func:`qjax.quantize_model` does; or there are no tokens to calibrate on, a static
        scheme for a layer outside the blocks, a layer with more inputs than there are calibration tokens,
        activations that are not finite, too few windows to learn from, or a model that no rotation passes
        through.
    """
    recipe = Recipe.uniform(recipe) if isinstance(recipe, str) else recipe
    method = Method.parse(method, search, recipe) if isinstance(method, str) else method
    method.check(recipe)
    if method.learned is not None and len(tokens) < reconstruction.LEAST_WINDOWS:
        raise ValueError(
            f"{method.name} holds some calibration windows out to see what is learned: it needs "
            f"{reconstruction.LEAST_WINDOWS} or more, got {len(tokens)}; shorter windows are more"
        )
    result = copied(model)
    assigned = assignment.assign(result, recipe)
    blockwise = chain(result, tokens.shape[1])
    looks_at_inputs = method.looks_at_inputs(recipe)
    if looks_at_inputs:
        _check_tokens(tokens, method, recipe)
        _check_static(assigned, blockwise)
    modules = folding.modules_of(result)
    rotated = None
    if method.rotated is not None:
        storage = rotated = rotating.RotatedStorage(
            Originals(model) if storage is None else storage, result, blockwise, method.rotated
        )
    storage = Storage() if storage is None else storage
    run = functools.partial(
        _run, apply=blockwise.apply, compute_dtype=_compute_dtype(), experts=experts
    )
    hidden, unquantized = (SpilledArrays(spill) if spill else [] for _ in range(2))
    if looks_at_inputs and any(storage.finished(b.path) is None for b in blockwise.blocks):
        batches = np.array_split(tokens, range(batch_size, len(tokens), batch_size))
        for wanted in (hidden, unquantized) if method.learned else (hidden,):
            _enter(wanted, batches, blockwise, storage, modules)
    done: dict[str, LayerReport] = {}
    compiled = False
    for block in blockwise.blocks:
        blank = copied(block.module)
        reports = storage.finished(block.path)
        if reports is None or len(unquantized):
            storage.load(block.path, block.module)
        if reports is None and len(hidden) and not compiled:
            _compile_ahead(block, hidden[0], assigned, method, run)
            compiled = True
        _advance(unquantized, block.module, block, run)
        if reports is None:
            reports = _quantize_block(block, hidden, unquantized, assigned, method, blockwise, run)
            storage.keep(block.path, block.module, reports)
        done |= {report.path: report for report in reports}
        on_step(f"{block.path} quantized")
        if len(hidden) and block is not blockwise.blocks[-1]:
            storage.recall(block.path, block.module)
            _advance(hidden, rescaling.simulated(blank, block.module), block, run)
        del blank  # the only other holder of a block's weights
        storage.release(block.path, block.module)
        on_step(f"{block.path} passed")
    for path, layer in assigned.layers.items():
        if path not in done:
            done[path] = _outside_the_blocks(path, layer, assigned, method, storage)
    if rotated is not None:
        _pass_on(rotated.norm, modules[rotated.norm], rotated)
    return result, QuantizationReport(
        layers=tuple(done[path] for path in assigned.layers),
        unmatched_rules=assigned.unmatched_rules,
    )


def _compute_dtype() -> Any:
    """What activations are computed in: on a CPU, which has no 16-bit products, float32."""
    return jnp.float32 if jax.default_backend() == "cpu" else None


def _enter(
    hidden: Activations,
    batches: list[np.ndarray],
    blockwise: Blockwise,
    storage: Storage,
    modules: dict[str, nnx.Module],
) -> None:
    """Makes the activations that the first block takes."""
    for path in blockwise.entrance:
        storage.load(path, modules[path])
    for batch in batches:
        x = blockwise.enter(jnp.asarray(batch))
        hidden.append(x.astype(_compute_dtype() or x.dtype))
    for path in blockwise.entrance:
        storage.release(path, modules[path])


def _advance(
    hidden: Activations, module: nnx.Module, block: Block, run: Callable[..., Any]
) -> None:
    """Replaces the activations before a block by those after it, batch by batch."""
    graphdef, state = nnx.split(module)
    for i in range(len(hidden)):
        output, _ = run(graphdef, state, hidden[i], block.context)
        assert output is not None  # of a run in which nothing is watched
        hidden[i] = output


def _compile_ahead(
    block: Block,
    x: Float[Array, "B T D"],
    assigned: Assignment,
    method: Method,
    run: functools.partial[Any],
) -> None:
    """Compiles what a block takes all at once, not one by one where it is called, which finds it then."""
    wanted = [path for path in _paths(block, assigned) if assigned.scheme(path) is not None]
    lowered = layer_quantization.programs(wanted, assigned, method)
    if not lowered:  # of other methods none takes long
        return
    graphdef, state = nnx.split(block.module)
    lower = functools.partial(_run.lower, graphdef, state, x, block.context, **run.keywords)
    lowered.append(lower())
    if method.rescaling is None:
        names = tuple(path.removeprefix(f"{block.path}/") for path in wanted)
        lowered.append(lower(wanted=names, hessians=method.needs_hessians))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(lambda program: program.compile(), lowered))


def _paths(block: Block, assigned: Assignment) -> list[str]:
    """The layers of a block."""
    return [path for path in assigned.layers if path.startswith(f"{block.path}/")]


def _rescaled(
    block: Block,
    observed: Observed,
    hidden: Activations,
    assigned: Assignment,
    options: rescaling.Rescaling,
    blockwise: Blockwise,
) -> Observed:
    schemes = {
        path: assigned.scheme(f"{block.path}/{path}")
        for layers in observed.layers
        for path in layers
    }
    return rescaling.rescale(
        block, observed, schemes, options, _samples(hidden), blockwise.apply, _compute_dtype()
    )


def _observed(
    block: Block,
    hidden: Activations,
    wanted: Sequence[str],
    run: Callable[..., Any],
    **options: Any,
) -> Observed:
    """The statistics of some of a block's layers over all batches."""
    graphdef, state = nnx.split(block.module)
    total = None
    for x in hidden:
        _, observed = run(graphdef, state, x, block.context, wanted=tuple(wanted), **options)
        total = observation.merged(total, observed)
    assert total is not None
    return total


# The output is left out of the program where nobody takes it: what only it needs is not computed.
@functools.partial(
    jax.jit,
    static_argnames=("graphdef", "apply", "compute_dtype", "wanted", "hessians", "experts"),
    compiler_options=compilation.WITHOUT_TRIALS,
)
def _run(
    graphdef: Any,
    state: Any,
    x: Float[Array, "B T D"],
    context: Any,
    *,
    apply: Callable[..., Any],
    compute_dtype: Any,
    wanted: tuple[str, ...] = (),
    hessians: bool = False,
    experts: ExpertTokens = "routed",
) -> tuple[Float[Array, "B T D"] | None, Observed]:
    module = nnx.merge(graphdef, state)
    result = []
    observed = observation.observe(
        module,
        lambda: result.append(apply(module, x, context)),
        hessians=hessians,
        compute_dtype=compute_dtype,
        wanted=wanted.__contains__,
        experts=experts,
    )
    return None if wanted else result[0], observed


def _quantize_block(
    block: Block,
    hidden: Activations,
    targets: Activations,
    assigned: Assignment,
    method: Method,
    blockwise: Blockwise,
    run: Callable[..., Any],
) -> tuple[LayerReport, ...]:
    """Quantizes the layers of a block in place; those that no rule names are reported too."""
    paths = _paths(block, assigned)
    wanted = [path for path in paths if assigned.scheme(path) is not None]
    known: dict[str, Inputs] = {}
    static = any(map(assigned.is_static, wanted))
    if (method.calibrated or static) and wanted:
        observe = functools.partial(
            _observed, block, hidden, run=run, hessians=method.needs_hessians
        )
        observed = observe([path.removeprefix(f"{block.path}/") for path in wanted])
        observed, few = experts.filled_up(observed, functools.partial(observe, experts="all"))
        if method.rescaling is not None:
            observed = _rescaled(block, observed, hidden, assigned, method.rescaling, blockwise)
        known = layer_quantization.inputs_of(observed, f"{block.path}/", few)
        _check(known, method)
    # Where nothing is learned, each weight may go as soon as its codes are there.
    was = block if method.learned is None else replace(block, module=copied(block.module))
    reports = {
        path: layer_quantization.quantize_layer(
            path, assigned, method, known.get(path), _fallback(known.get(path))
        )
        for path in paths
    }
    if method.learned is not None and wanted:
        reports |= _learn(
            was, block.module, reports, known, method,
            inputs=list(hidden), targets=list(targets), apply=blockwise.apply,
        )  # fmt: skip
    return tuple(reports.values())


def _learn(
    was: Block,
    quantized: nnx.Module,
    reports: dict[str, LayerReport],
    known: dict[str, Inputs],
    method: Method,
    *,
    inputs: Sequence[Array],
    targets: Sequence[Array],
    apply: Callable[..., Any],
) -> dict[str, LayerReport]:
    """Trains the layers of a quantized block together, in place; the reports are those of the result.

    Args:
      was: the block before it was quantized, factors folded in.
      quantized: the block now.
      reports: of its layers.
      known: what they multiply.
      method: whose last link says how to train.
      inputs: what reaches the block.
      targets: what it should give.
      apply: runs a block.
    """
    start = time.perf_counter()
    assert method.learned is not None
    held = nnx_layers.quantized_layers(quantized)
    # A layer that shares another's weight changes with it.
    own = {path: q for path, q in held.items() if not reports[f"{was.path}/{path}"].reason}
    learned = reconstruction.reconstruct(
        was,
        own,
        inputs,
        targets,
        apply=apply,
        options=method.learned,
        compute_dtype=_compute_dtype(),
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


def _outside_the_blocks(
    path: str, layer: QuantizableLayer, assigned: Assignment, method: Method, storage: Storage
) -> LayerReport:
    reports = storage.finished(path)
    if reports is None:
        storage.load(path, layer)
        reports = (layer_quantization.quantize_layer(path, assigned, method),)
        storage.keep(path, layer, reports)
        storage.release(path, layer)
    (report,) = reports
    return report


def _pass_on(path: str, module: nnx.Module, storage: Storage) -> None:
    """Takes a part that is no layer from where it comes to where it goes."""
    if storage.finished(path) is None:
        storage.load(path, module)
        storage.keep(path, module, ())
        storage.release(path, module)


def _fallback(inputs: Inputs | None) -> str:
    """For the report: what was done about an expert that fewer tokens reach than it has inputs."""
    if inputs is None or inputs.few is None or not inputs.shortage:
        return ""
    return f"{inputs.shortage}: filled up with the average of all tokens"


def _check_tokens(tokens: Int[np.ndarray, "n length"], method: Method, recipe: Recipe) -> None:
    if tokens.size:
        return
    scheme = recipe.static_scheme
    if method.calibrated or scheme is None:
        raise ValueError(
            f"{method.name} looks at what the layers multiply: it needs tokens, got none"
        )
    raise ValueError(f"{scheme.name} has input scales from calibration: it needs tokens, got none")


def _check_static(assigned: Assignment, blockwise: Blockwise) -> None:
    """Refuses static scales of inputs that nobody will see, before any work is done."""
    blocks = tuple(f"{block.path}/" for block in blockwise.blocks)
    for path in assigned.layers:
        if assigned.is_static(path) and not path.startswith(blocks):
            raise ValueError(
                f"{path}: a static scheme has an input scale from calibration, which sees what layers in "
                "blocks multiply, not this one; a scheme without -static needs none"
            )


def _check(known: dict[str, Inputs], method: Method) -> None:
    """Refuses what no method can work with, before any work is done on it."""
    for path, inputs in known.items():
        found = inputs.statistics
        if not bool(jnp.isfinite(found.magnitude).all()):
            raise ValueError(
                f"{path}: its inputs are not finite: weights before it are damaged or overflow"
            )
        if method.needs_hessians and int(found.rows) < len(found.magnitude):
            raise ValueError(
                f"{path}: {int(found.rows)} calibration tokens for {len(found.magnitude)} inputs; a "
                f"Hessian of that many needs at least as many tokens, better ten times more"
            )


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
