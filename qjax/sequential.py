# SPDX-License-Identifier: Apache-2.0
"""Calibrated quantization block by block: each sees what the quantized ones before it make of the tokens.

One block's statistics are alive at a time, and the activations of the calibration tokens between two
blocks. Statistics of a block are taken while its own weights are still as they were.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from qjax import (
    assignment,
    layer_quantization,
    nnx_layers,
    observation,
    reconstruction,
    rescaling,
)
from qjax.algorithms import learned_rounding
from qjax.assignment import Assignment
from qjax.blockwise import Block, Blockwise
from qjax.layer_quantization import Inputs
from qjax.method import Method
from qjax.observation import Observed
from qjax.post_training import copied
from qjax.qtensor import QTensor
from qjax.ranges import RangeSearch
from qjax.report import LayerReport, QuantizationReport
from qjax.scheme import Recipe

Model = TypeVar("Model", bound=nnx.Module)


def quantize_sequentially(
    model: Model,
    chain: Callable[[Model, int], Blockwise],
    tokens: Int[np.ndarray, "n length"],
    recipe: str | Recipe,
    *,
    method: str | Method,
    search: RangeSearch | None = None,
    batch_size: int = 8,
    on_step: Callable[[str], None] = lambda what: None,
) -> tuple[Model, QuantizationReport]:
    """Quantizes a model block by block with calibration.

    Layers outside the blocks that the recipe names, embeddings and heads, are rounded to nearest.

    Args:
      model: left as it is.
      chain: what makes a :class:`qjax.blockwise.Blockwise` of it, given the length of the windows.
      tokens: calibration windows.
      recipe: which layers are held how; a scheme's name means that scheme everywhere.
      method: how weights are rounded, or its name.
      search: how the range of each tile is chosen, where ``method`` is a name; None: as suits it.
      batch_size: windows at once; results do not depend on it but for the order of sums.
      on_step: called with what was done, ``2 * blocks`` times; for progress bars.

    Returns:
      The quantized model and the report of every layer.

    Raises:
      ValueError: as :func:`qjax.quantize_model` does; or a layer has more inputs than there are
        calibration tokens, activations that are not finite, or too few windows to learn from.
    """
    recipe = Recipe.uniform(recipe) if isinstance(recipe, str) else recipe
    method = Method.parse(method, search, recipe) if isinstance(method, str) else method
    if method.learned is not None and len(tokens) < reconstruction.LEAST_WINDOWS:
        raise ValueError(
            f"{method.name} holds some calibration windows out to see what is learned: it needs "
            f"{reconstruction.LEAST_WINDOWS} or more, got {len(tokens)}; shorter windows are more"
        )
    result = copied(model)
    assigned = assignment.assign(result, recipe)
    blockwise = chain(result, tokens.shape[1])
    run = functools.partial(_run, apply=blockwise.apply, compute_dtype=_compute_dtype())
    batches = np.array_split(tokens, range(batch_size, len(tokens), batch_size))
    hidden = [_entered(blockwise, batch) for batch in batches]
    # What the unquantized model makes of the tokens: where learned rounding wants to get to.
    unquantized = hidden
    done: dict[str, LayerReport] = {}
    for block in blockwise.blocks:
        paths = [path for path in assigned.quantized if path.startswith(f"{block.path}/")]
        observed = _observed(block, hidden, paths, method, run)
        on_step(f"{block.path} observed")
        if method.learned is not None:
            unquantized = _outputs(block.module, block, unquantized, run)
        if observed is not None and method.rescaling is not None:
            observed = _rescaled(block, observed, hidden, assigned, method.rescaling, blockwise)
        plain = copied(block.module)
        known = _known(block, observed, method)
        reports = _quantize_block(paths, assigned, method, known)
        if method.learned is not None and paths:
            was = replace(block, module=plain)
            reports = _learn(
                was, block.module, reports, known, method.learned,
                inputs=hidden, targets=unquantized, apply=blockwise.apply,
            )  # fmt: skip
        done |= reports
        if block is not blockwise.blocks[-1]:
            hidden = _outputs(_simulated(plain, block.module), block, hidden, run)
        on_step(f"{block.path} quantized")
    for path in assigned.layers:
        if path not in done:
            done[path] = layer_quantization.quantize_layer(path, assigned, method)
    return result, QuantizationReport(
        layers=tuple(done[path] for path in assigned.layers),
        unmatched_rules=assigned.unmatched_rules,
    )


def _compute_dtype() -> Any:
    """What activations are computed in: on a CPU, which has no 16-bit products, float32."""
    return jnp.float32 if jax.default_backend() == "cpu" else None


def _entered(blockwise: Blockwise, batch: np.ndarray) -> Array:
    x = blockwise.enter(jnp.asarray(batch))
    return x.astype(_compute_dtype() or x.dtype)


def _outputs(
    module: nnx.Module, block: Block, hidden: list[Array], run: Callable[..., Any]
) -> list[Array]:
    """What a block gives for what reaches it."""
    graphdef, state = nnx.split(module)
    return [run(graphdef, state, x, block.context)[0] for x in hidden]


def _rescaled(
    block: Block,
    observed: Observed,
    hidden: list[Array],
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
    block: Block, hidden: list[Array], paths: list[str], method: Method, run: Callable[..., Any]
) -> Observed | None:
    """The statistics of a block's layers over all batches."""
    if not method.calibrated or not paths:
        return None
    wanted = tuple(path.removeprefix(f"{block.path}/") for path in paths)
    graphdef, state = nnx.split(block.module)
    total = None
    for x in hidden:
        _, observed = run(
            graphdef, state, x, block.context, wanted=wanted, hessians=method.needs_hessians
        )
        total = observation.merged(total, observed)
    return total


# The output is left out of the program where nobody takes it: what only it needs is not computed.
@functools.partial(
    jax.jit, static_argnames=("graphdef", "apply", "compute_dtype", "wanted", "hessians")
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
) -> tuple[Float[Array, "B T D"] | None, Observed]:
    module = nnx.merge(graphdef, state)
    result = []
    observed = observation.observe(
        module,
        lambda: result.append(apply(module, x, context)),
        hessians=hessians,
        compute_dtype=compute_dtype,
        wanted=wanted.__contains__,
    )
    return None if wanted else result[0], observed


def _known(block: Block, observed: Observed | None, method: Method) -> dict[str, Inputs]:
    if observed is None:
        return {}
    known = layer_quantization.inputs_of(observed, f"{block.path}/")
    _check(known, method)
    return known


def _quantize_block(
    paths: list[str], assigned: Assignment, method: Method, known: dict[str, Inputs]
) -> dict[str, LayerReport]:
    return {
        path: layer_quantization.quantize_layer(path, assigned, method, known.get(path))
        for path in paths
    }


def _learn(
    was: Block,
    quantized: nnx.Module,
    reports: dict[str, LayerReport],
    known: dict[str, Inputs],
    options: learned_rounding.Options,
    *,
    inputs: list[Array],
    targets: list[Array],
    apply: Callable[..., Any],
) -> dict[str, LayerReport]:
    """Trains the layers of a quantized block together, in place; the reports are those of the result.

    Args:
      was: the block before it was quantized, factors folded in.
      quantized: the block now.
      reports: of its layers.
      known: what they multiply.
      options: how to train.
      inputs: what reaches the block.
      targets: what it should give.
      apply: runs a block.
    """
    start = time.perf_counter()
    held = nnx_layers.quantized_layers(quantized)
    # A layer that shares another's weight changes with it.
    own = {path: q for path, q in held.items() if not reports[f"{was.path}/{path}"].reason}
    learned = reconstruction.reconstruct(
        was, own, inputs, targets, apply=apply, options=options, compute_dtype=_compute_dtype()
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
        # A layer that nothing was known of was rounded to nearest.
        method = "learned" if reports[name].method == "rtn" else reports[name].method
        reports[name] = replace(
            reports[name], method=method, relative_output_error=error,
            seconds=reports[name].seconds + seconds,
        )  # fmt: skip
    return reports


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


def _simulated(plain: nnx.Module, quantized: nnx.Module) -> nnx.Module:
    """A plain block with the values of the quantized one, where only weights are quantized.

    All blocks are one compiled program then. Where products quantize their activations, the QTensors
    themselves take the weights' places.
    """
    theirs = dict(nnx_layers.quantizable_layers(quantized))
    for path, layer in nnx_layers.quantizable_layers(plain):
        q = nnx_layers.weight_of(theirs[path])
        if isinstance(q, QTensor):
            rescaling.simulate(layer, q)
    return plain


def _samples(hidden: list[Array], most: int = 4096) -> Float[Array, "B T D"]:
    """Some windows, spread over all, of about so many tokens."""
    windows = jnp.concatenate(hidden)
    count = max(1, most // windows.shape[1])
    return windows[:: max(1, len(windows) // count)][:count]
