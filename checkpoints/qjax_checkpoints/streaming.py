# SPDX-License-Identifier: Apache-2.0
"""Quantizing a model that need not fit into memory: its parts come from one directory and go to another.

The files of the output are laid out before the work, so each tensor has its place in them; a finished
part is written there, and read from there by what runs through it. A part is finished when its tensors
and its report are on the disk.
"""

import contextlib
import gc
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Int

import qjax
from qjax.budget import Choice
from qjax.method import Method
from qjax.nnx_layers import named_variables
from qjax.observation import ExpertTokens
from qjax.report import LayerReport, QuantizationReport
from qjax.scheme import Recipe
from qjax.storage import Storage
from qjax_checkpoints.atomic import check_space, flush
from qjax_checkpoints.compressed_tensors.config import read_config
from qjax_checkpoints.compressed_tensors.read import fill_compressed
from qjax_checkpoints.compressed_tensors.write import compressed, encoded
from qjax_checkpoints.directory import CONFIG_FILE, ModelDirectory, fingerprint, open_directory
from qjax_checkpoints.json_file import read_json, write_json
from qjax_checkpoints.outline import outline, shapes
from qjax_checkpoints.parameters import check_values, fill, original_tensors, stored_name
from qjax_checkpoints.save import REPORT_FILE, copy_companions, plain_config
from qjax_checkpoints.shards import (
    SHARD_BYTES,
    PendingTensor,
    lay_out_weights,
    pending_array,
    write_tensors,
)
from qjax_checkpoints.unfinished import UnfinishedRun, partial_path, unfinished_run
from qjax_models import Decoder


class StreamedStorage(Storage):
    """Keeps the parts of a model in directories; `streamed_output` makes one.

    Args:
        source: the model as it was, plain.
        run: where its output grows, its files laid out.
        recipe: how its layers are going to be held.
        choice: why so, where a budget decided.

    Attributes:
        recipe: as given.
        choice: as given.
    """

    def __init__(
        self, source: ModelDirectory, run: UnfinishedRun, recipe: Recipe, choice: Choice | None
    ):
        self._source = source
        self._run = run
        self.recipe, self.choice = recipe, choice
        self._output = open_directory(run.model)
        quantization = self._output.config["quantization_config"]
        self._config = read_config(quantization, str(run.model))

    @property
    def has_finished_parts(self) -> bool:
        """Says whether a run that ends now leaves something to go on with."""
        return self._run.has_finished_parts

    def finished(self, path: str) -> tuple[LayerReport, ...] | None:
        """Returns the reports of a part that is on the disk."""
        note = self._run.finished(_dotted(path))
        return None if note is None else tuple(map(LayerReport.from_json, note["layers"]))

    def load(self, path: str, module: nnx.Module) -> None:
        """Reads a part of the source."""
        wanted = original_tensors(module, f"{path}/")
        fill(named_variables(module, f"{path}/"), self._source, wanted=wanted, dtype=None)

    def keep(self, path: str, module: nnx.Module, reports: tuple[LayerReport, ...]) -> None:
        """Writes a part to its places in the output."""
        tensors, _ = encoded(module, f"{path}/")
        self._write(tensors)
        self._run.finish(_dotted(path), {"layers": list(map(asdict, reports))})

    def recall(self, path: str, module: nnx.Module) -> None:
        """Reads a part of the output."""
        fill_compressed(module, self._output, self._config, prefix=f"{path}/")

    def release(self, path: str, module: nnx.Module) -> None:
        """Leaves shapes in place of a part's arrays."""
        del path
        for variable in named_variables(module).values():
            variable.set_value(shapes(variable.get_value()))
        # Taking a module apart leaves a cycle of references in Flax, and the arrays alive with it.
        gc.collect()

    def complete(self, report: Mapping[str, Any]) -> None:
        """Writes what belongs to no part, as it is in the source, and the report."""
        parts = tuple(f"{part}." for part in self._run.finished_parts)
        rest = {}
        for name in self._output:
            if not name.startswith(parts):
                stored = self._source.tensor(name)
                array = stored.astype(self._output.entry(name).dtype, copy=False)
                rest[name] = pending_array(array)
        self._write(rest)
        write_json(self._run.model / REPORT_FILE, dict(report))

    def _write(self, tensors: Mapping[str, PendingTensor]) -> None:
        by_file: dict[Path, dict[str, PendingTensor]] = {}
        for name, tensor in tensors.items():
            by_file.setdefault(self._output.files[name].path, {})[name] = tensor
        for members in by_file.values():
            write_tensors(self._output.files[next(iter(members))], members)


@contextlib.contextmanager
def streamed_output(
    source: ModelDirectory,
    model: Decoder,
    recipe: Recipe | Callable[[], Choice],
    out: Path,
    identity: Mapping[str, str],
    *,
    resume: bool,
    shard_bytes: int = SHARD_BYTES,
) -> Iterator[StreamedStorage]:
    """Hands out the storage of a run whose output becomes `out` when the block ends well.

    Args:
        source: an open directory of plain tensors.
        model: with their shapes, as `abstract_plain` makes it; a tied head may have been untied.
        recipe: how its layers are going to be held; or what chooses that, which is called when the run is
            ours and has not chosen yet.
        out: the compressed-tensors directory to make; it must not exist.
        identity: what decides the result, as `identify` says it.
        resume: whether to go on with the unfinished run of the same identity, if there is one.
        shard_bytes: size above which the weights are split.

    Raises:
        ValueError: as `unfinished_run` does; a tensor of the source is missing or holds NaN; the format
            does not hold a layer (named); the disk is too small.
    """
    tensors, quantization = {}, {}
    if isinstance(recipe, Recipe):  # refuses before there is a run
        tensors, quantization = compressed(outline(model, recipe))
    with unfinished_run(out, identity, resume=resume) as run:
        choice = None
        if not isinstance(recipe, Recipe):
            choice = _choice(run, recipe)
            recipe = choice.recipe
        if not run.has_finished_parts:
            if choice is not None:
                tensors, quantization = compressed(outline(model, recipe))
            # Now, not when their turn has come.
            check_values(
                source,
                dict.fromkeys(stored_name(source, name) for name in original_tensors(model)),
            )
            check_space(out, sum(tensor.nbytes for tensor in tensors.values()))
            copy_companions(source.path, run.model)
            config = plain_config(model, source.config) | {"quantization_config": quantization}
            write_json(run.model / CONFIG_FILE, config)
            lay_out_weights(run.model, tensors, shard_bytes=shard_bytes)
            flush(run.model)
        # Each part that is released is looked for among what was made since: all that the process had
        # before would take half a second a part, and in one that has done much, several.
        gc.freeze()
        try:
            yield StreamedStorage(source, run, recipe, choice)
        finally:
            gc.unfreeze()


def _choice(run: UnfinishedRun, choose: Callable[[], Choice]) -> Choice:
    """What a run's finished parts were chosen to be, or what is chosen for it now."""
    kept = run.choice() if run.has_finished_parts else None
    if kept is not None:
        return Choice.from_json(kept)
    choice = choose()
    run.choose(choice.as_json())
    return choice


def identify(
    source: ModelDirectory,
    recipe: Recipe | str,
    method: Method,
    tokens: Int[np.ndarray, "n length"],
    *,
    experts: ExpertTokens = "routed",
    true_sequential: bool = False,
    kv_cache: str | None = None,
) -> dict[str, str]:
    """Returns in words all that decides the bytes of an output, each under what it is called.

    Args:
        source: the model.
        recipe: how its layers are going to be held, or by what that is going to be chosen.
        method: how weights are rounded.
        tokens: what is calibrated on, and measured for a choice.
        experts: which tokens an expert is calibrated with.
        true_sequential: whether layers of a block see those before them quantized.
        kv_cache: how keys and values are kept.
    """
    if isinstance(recipe, Recipe):
        rules = [[rule.pattern, rule.scheme.name if rule.scheme else None] for rule in recipe.rules]
        recipe = json.dumps(rules)
    windows, length = tokens.shape
    return {
        "source": fingerprint(source.path),
        "recipe": recipe,
        "method": method.name,
        "exact method": repr(method),
        "calibration": f"{windows} windows of {length} tokens ({_hash(tokens.tobytes())})",
        "tokens of experts": experts,
        "true-sequential": str(true_sequential),
        "kv-cache": str(kv_cache),
        "qjax": qjax.__version__,
        "jax": jax.__version__,
        "device": f"{jax.default_backend()} ({jax.devices()[0].device_kind})",
    }


def completed(out: Path, identity: Mapping[str, str]) -> QuantizationReport | None:
    """Returns the report of an output that a run of this identity has made; None: there is none.

    A run that is killed after it has made its output may leave a directory beside it, which goes.
    """
    path = out / REPORT_FILE
    if not path.is_file():
        return None
    report = read_json(path)
    if report.get("run") != identity:
        return None
    shutil.rmtree(partial_path(out), ignore_errors=True)
    return QuantizationReport.from_json(report)


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def _dotted(path: str) -> str:
    return path.replace("/", ".")
