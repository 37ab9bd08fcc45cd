# SPDX-License-Identifier: Apache-2.0
"""Calibrated quantization block by block: each sees what the quantized ones before it make of the tokens.

One block's weights and statistics are alive at a time where a :class:`qjax.storage.Storage` holds the
others outside, and one set of activations of the calibration tokens, in memory or in a file; two where
rounding is learned, which wants to get to what the unquantized blocks make of the tokens. Statistics of a
block are taken while its own weights are still as they were.

The report names an expert that fewer tokens reach than it has inputs; :mod:`qjax.experts` says what it is
calibrated with.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from qjax import (
    assignment,
    block_passes,
    block_quantization,
    folding,
    layer_quantization,
    reconstruction,
    rescaling,
    rotating,
)
from qjax.assignment import Assignment
from qjax.block_passes import Activations
from qjax.block_quantization import Task
from qjax.blockwise import Block, Blockwise
from qjax.method import Method
from qjax.nnx_layers import QuantizableLayer, named_variables
from qjax.observation import ExpertTokens
from qjax.post_training import copied
from qjax.ranges import RangeSearch
from qjax.report import LayerReport, QuantizationReport
from qjax.scheme import Recipe
from qjax.spilled import SpilledArrays
from qjax.storage import Originals, Storage

Model = TypeVar("Model", bound=nnx.Module)


def quantize_sequentially(
    model: Model,
    chain: Callable[[Model, int], Blockwise],
    tokens: Int[np.ndarray, "n length"],
    recipe: str | Recipe,
    *,
    method: str | Method,
    search: RangeSearch | None = None,
    batch_size: int | None = None,
    experts: ExpertTokens = "routed",
    true_sequential: bool = False,
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
        scheme is static, its input scale of the inputs' largest magnitude, or the model keeps keys and
        values by static scales.
      recipe: which layers are held how; a scheme's name means that scheme everywhere.
      method: how weights are rounded, or its name.
      search: how the range of each tile is chosen, where ``method`` is a name; None: as suits it.
      batch_size: windows at once; None: 8, or those of 4096 tokens on a CPU, if these are fewer
        (:func:`qjax.block_passes.windows_at_once`). Results do not depend on it but for the order of
        sums. Where the model's arrays lie on a mesh (``NamedSharding``), the windows of a batch are
        spread over its devices, if they are a multiple of these.
      experts: what an expert is calibrated with: ``"routed"``, the tokens that are sent to it, or
        ``"all"``.
      true_sequential: whether the layers of one input of a block are quantized before the statistics of
        the next are taken. The tokens pass through each block once then, not twice, but for a method that
        rescales or learns, or a quantized cache; up to six times as many activations are kept.
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
    looks_at_inputs = method.looks_at_inputs(recipe) or blockwise.cache is not None
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
    task = Task(
        assigned=assigned,
        method=method,
        apply=blockwise.apply,
        experts=experts,
        true_sequential=true_sequential,
        cache=blockwise.cache,
    )
    hidden, unquantized = (SpilledArrays(spill) if spill else [] for _ in range(2))
    unfinished = [block for block in blockwise.blocks if storage.finished(block.path) is None]
    if looks_at_inputs and unfinished:
        for wanted in (hidden, unquantized) if method.learned else (hidden,):
            _enter(wanted, tokens, batch_size, blockwise, storage, modules)
    done: dict[str, LayerReport] = {}
    for block in blockwise.blocks:
        reports = _through(
            block,
            hidden,
            unquantized,
            storage,
            task,
            is_first=bool(unfinished) and block is unfinished[0],
            is_last=block is blockwise.blocks[-1],
            on_step=on_step,
        )
        done |= {report.path: report for report in reports}
    for path, layer in assigned.layers.items():
        if path not in done:
            done[path] = _outside_the_blocks(path, layer, assigned, method, storage)
    if rotated is not None:
        _pass_on(rotated.norm, modules[rotated.norm], rotated)
    return result, QuantizationReport(
        layers=tuple(done[path] for path in assigned.layers),
        unmatched_rules=assigned.unmatched_rules,
    )


def _through(
    block: Block,
    hidden: Activations,
    unquantized: Activations,
    storage: Storage,
    task: Task,
    *,
    is_first: bool,
    is_last: bool,
    on_step: Callable[[str], None],
) -> tuple[LayerReport, ...]:
    """Quantizes a block, unless that is done already, and takes the activations through it.

    Args:
      block: shapes in place of arrays where the storage has them; so again afterwards.
      hidden: what reaches it behind quantized blocks, none where nobody looks; changed in place.
      unquantized: behind blocks as they were, where rounding is learned; likewise.
      storage: where the weights come from and go to.
      task: how.
      is_first: whether no block was quantized before, in this process.
      is_last: whether nothing follows that would look at what leaves it.
      on_step: as for :func:`quantize_sequentially`.
    """
    blank = copied(block.module)
    reports = storage.finished(block.path)
    begun = reports is None
    if begun or len(unquantized):
        storage.load(block.path, block.module)
    if is_first and len(hidden):
        block_quantization.compile_ahead(block, hidden[0], task)
    task.passing(block, unquantized).finish(block.module)
    passing = task.passing(block, hidden)
    if reports is None:
        reports = block_quantization.quantize_block(passing, unquantized, task)
        block_quantization.find_cache_scales(block, hidden, task)
        storage.keep(block.path, block.module, reports)
    on_step(f"{block.path} quantized")
    if len(hidden) and not is_last:
        storage.recall(block.path, block.module)
        simulated = rescaling.simulated(blank, block.module)
        block_quantization.pass_on(passing, simulated, task, begun=begun)
    del blank, passing  # the only other holder of a block's weights
    storage.release(block.path, block.module)
    on_step(f"{block.path} passed")
    return reports


def _enter(
    hidden: Activations,
    tokens: Int[np.ndarray, "n length"],
    batch_size: int | None,
    blockwise: Blockwise,
    storage: Storage,
    modules: dict[str, nnx.Module],
) -> None:
    """Makes the activations that the first block takes."""
    for path in blockwise.entrance:
        storage.load(path, modules[path])
    mesh = _mesh_of(modules)
    devices = 1 if mesh is None else mesh.size
    size = batch_size or block_passes.windows_at_once(tokens.shape[1], devices)
    for batch in np.array_split(tokens, range(size, len(tokens), size)):
        x = blockwise.enter(_over_the_mesh(jnp.asarray(batch), mesh))
        hidden.append(x.astype(block_passes.compute_dtype(x.dtype) or x.dtype))
    for path in blockwise.entrance:
        storage.release(path, modules[path])


def _mesh_of(modules: Mapping[str, nnx.Module]) -> Mesh | None:
    """The mesh that a model lies on, if it does."""
    values = (
        v.get_value() for module in modules.values() for v in named_variables(module).values()
    )
    shardings = (getattr(value, "sharding", None) for value in values)
    meshes = (sharding.mesh for sharding in shardings if isinstance(sharding, NamedSharding))
    return next((mesh for mesh in meshes if isinstance(mesh, Mesh)), None)


def _over_the_mesh(batch: Int[Array, "B T"], mesh: Mesh | None) -> Int[Array, "B T"]:
    """A batch whose windows are spread over a mesh.

    What follows from it is so, too, and each device runs through its own windows. A batch that does not
    divide goes to all of them.
    """
    if mesh is None or len(batch) % mesh.size:
        return batch
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec(mesh.axis_names)))


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


def _check_tokens(tokens: Int[np.ndarray, "n length"], method: Method, recipe: Recipe) -> None:
    if tokens.size:
        return
    scheme = recipe.static_scheme
    if method.calibrated:
        raise ValueError(
            f"{method.name} looks at what the layers multiply: it needs tokens, got none"
        )
    what = f"{scheme.name} has input" if scheme is not None else "a quantized cache has"
    raise ValueError(f"{what} scales from calibration: it needs tokens, got none")


def _check_static(assigned: Assignment, blockwise: Blockwise) -> None:
    """Refuses static scales of inputs that nobody will see, before any work is done."""
    blocks = tuple(f"{block.path}/" for block in blockwise.blocks)
    for path in assigned.layers:
        if assigned.is_static(path) and not path.startswith(blocks):
            raise ValueError(
                f"{path}: a static scheme has an input scale from calibration, which sees what layers in "
                "blocks multiply, not this one; a scheme without -static needs none"
            )
