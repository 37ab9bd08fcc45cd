# SPDX-License-Identifier: Apache-2.0
"""A decoder's parameters under their Hugging Face names: read from a directory, handed to a writer.

On the way in a tensor goes from the mapped file straight into its place on the device, transposed if
it is a linear layer's; then its pages of the file are given back. So loading holds the model and one
tensor, never a second copy.
"""

import dataclasses
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Shaped

from qjax import QTensor, kv_cache, nnx_layers
from qjax.kv_cache import CacheScale
from qjax.nnx_layers import named_variables
from qjax.qtensor import plain
from qjax_checkpoints.directory import ModelDirectory
from qjax_checkpoints.shards import PendingTensor, pending
from qjax_models import Decoder, DecoderConfig, config_from_hf
from qjax_models.names import Layout, hf_tensors

_TOKEN_TABLE = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"
# Buffers that older releases saved; they follow from the configuration.
_DERIVED = ".rotary_emb.inv_freq"


def read_decoder_config(config: Mapping[str, Any], *, where: Path) -> DecoderConfig:
    """Returns the decoder's shape that a `config.json` describes.

    Raises:
        ValueError: no supported architecture, or an incomplete configuration.
    """
    try:
        return config_from_hf(dict(config))
    except ValueError as error:  # it knows the key, not the file
        raise ValueError(f"{where}: {error}") from error


def abstract_model(
    directory: ModelDirectory, dtype: DTypeLike | None, kv_cache: str | None = None
) -> Decoder:
    """Returns the decoder that a directory describes, without arrays.

    Args:
        directory: the open directory.
        dtype: of parameters and activations; None: that of the stored token table.
        kv_cache: how it keeps keys and values.
    """
    config = read_decoder_config(directory.config, where=directory.path)
    config = dataclasses.replace(config, kv_cache=kv_cache)
    if dtype is None:
        # Without 64-bit mode JAX holds float64 tensors in float32.
        dtype = jax.dtypes.canonicalize_dtype(directory.entry(_TOKEN_TABLE).dtype)
    return Decoder.abstract(config, dtype)


def abstract_plain(directory: ModelDirectory) -> Decoder:
    """Returns the decoder of a directory of plain tensors, each parameter in its stored dtype.

    Raises:
        ValueError: tensors are missing, unexpected, or of a shape that the configuration forbids.
    """
    model = abstract_model(directory, None)
    check_stored(model, directory, wanted=hf_tensors(model), names=list(directory))
    variables = named_variables(model)
    for name, (path, _) in hf_tensors(model).items():
        dtype = jax.dtypes.canonicalize_dtype(directory.entry(name).dtype)
        variables[path].set_value(jax.ShapeDtypeStruct(variables[path].get_value().shape, dtype))
    return model


def load_plain(directory: ModelDirectory, dtype: DTypeLike | None) -> Decoder:
    """Loads a model whose tensors are all plain arrays.

    Args:
        directory: the open directory.
        dtype: what every tensor is cast to; None leaves each as it is stored.

    Raises:
        ValueError: tensors are missing, unexpected, of a shape that the configuration forbids, or
            hold NaN.
    """
    model = abstract_model(directory, dtype)
    wanted = hf_tensors(model)
    check_stored(model, directory, wanted=wanted, names=list(directory))
    fill(named_variables(model), directory, wanted=wanted, dtype=dtype)
    return model


def fill(
    variables: Mapping[str, nnx.Variable],
    directory: ModelDirectory,
    *,
    wanted: Mapping[str, tuple[str, Layout]],
    dtype: DTypeLike | None,
) -> None:
    """Puts plain tensors of a directory into variables.

    Args:
        variables: of a model or a part of one, by path; changed in place.
        directory: where the tensors are, as `check_stored` wants them.
        wanted: the parameters to fill, as `hf_tensors` gives them.
        dtype: what every tensor is cast to; None leaves each as it is stored.

    Raises:
        ValueError: NaN.
    """
    for name, (path, layout) in wanted.items():
        name = stored_name(directory, name)
        what = f"{directory.path}: tensor {name}"
        if isinstance(variables[path], CacheScale):
            array = _on_device(directory.tensor(name), layout, jnp.float32).reshape(1)
            check_positive(array, what)
        else:
            array = _on_device(directory.tensor(name), layout, dtype)
            check_numbers(array, what)
        variables[path].set_value(array)
        directory.release(name)


def original_tensors(module: nnx.Module, prefix: str = "") -> dict[str, tuple[str, Layout]]:
    """Returns what `hf_tensors` does but for what calibration finds: the tensors of a plain directory."""
    found = kv_cache.scales_of(module, prefix)
    named = hf_tensors(module, prefix)
    return {name: value for name, value in named.items() if value[0] not in found}


def stored_name(directory: ModelDirectory, name: str) -> str:
    """Returns the name of the tensor that a parameter is read from: a head that is tied is the table."""
    return _TOKEN_TABLE if name == _HEAD and name not in directory else name


def check_values(directory: ModelDirectory, names: Iterable[str]) -> None:
    """Reads plain tensors, one at a time, and checks that they are numbers.

    Raises:
        ValueError: NaN.
    """
    for name in names:
        check_numbers(directory.tensor(name), f"{directory.path}: tensor {name}")
        directory.release(name)


def check_stored(
    model: Decoder,
    directory: ModelDirectory,
    *,
    wanted: Mapping[str, tuple[str, Layout]],
    names: Collection[str],
) -> None:
    """Checks that a directory has the parameters of a model in their shapes, and nothing else.

    Args:
        model: with shapes where the arrays will be.
        directory: where the tensors are.
        wanted: the parameters to be filled, as `hf_tensors` gives them.
        names: the tensors of the directory that are meant to fill them, all of them.

    Raises:
        ValueError: tensors are missing, unexpected, or of a shape that the configuration forbids.
    """
    _check_names(directory, wanted, names)
    variables = named_variables(model)
    for name, (path, layout) in wanted.items():
        if isinstance(variables[path], CacheScale):
            _check_one_number(directory, name)
        else:
            _check_shape(directory, name, layout, variables[path].get_value().shape)


def stored_values(module: nnx.Module, prefix: str = "") -> Iterator[tuple[str, Layout, Any]]:
    """Yields what a model or a part of it holds: Hugging Face name, layout there, array or plain QTensor.

    Args:
        module: a decoder or a module of one; shapes in place of arrays will do.
        prefix: the module's path and a slash; empty for a decoder.
    """
    variables = named_variables(module, prefix)
    for name, (path, layout) in hf_tensors(module, prefix).items():
        value = variables[path].get_value()
        yield name, layout, plain(value) if isinstance(value, QTensor) else value


def pending_parameter(array: jax.Array | jax.ShapeDtypeStruct, layout: Layout) -> PendingTensor:
    """Returns an array as it goes into a file: a linear kernel transposed."""
    return pending(jnp.transpose if layout == "linear" else _same, array)


def _same(array: jax.Array) -> jax.Array:
    return array


def place(layer: nnx_layers.QuantizableLayer, weight: nnx.Variable, q: QTensor) -> None:
    """Puts a QTensor into a layer of an abstract model.

    Args:
        layer: the layer.
        weight: the layer's kernel or embedding.
        q: of the weight's shape.
    """
    weight.set_value(q)  # `install` reads what is there, and cannot read an abstract array
    nnx_layers.install(layer, q)


def check_numbers(value: jax.Array | np.ndarray | QTensor, what: str) -> None:
    """Checks that an array, or the codes and scales of a QTensor, are numbers.

    Here and not where they are used: a model with one NaN answers everything with nonsense, and only
    the loader still knows which tensor of the directory is at fault.

    Raises:
        ValueError: NaN; the message begins with `what`.
    """
    floats = [x for x in jax.tree.leaves(value) if jnp.issubdtype(x.dtype, jnp.floating)]
    if any(map(_has_nan, floats)):
        raise ValueError(f"{what}: NaN among the values; a number is needed everywhere")


def check_found(name: str, value: Any) -> None:
    """Checks that a parameter is there: a scale of the cache is not, before calibration.

    Raises:
        ValueError: it is not; the message names it.
    """
    if value is None:
        raise ValueError(
            f"{name}: keys and values are to be kept by a scale that has not been found: "
            "qjax.quantize_sequentially finds it"
        )


def check_positive(scale: jax.Array, what: str) -> None:
    """Checks that a scale is one.

    Raises:
        ValueError: it is not; the message begins with `what`.
    """
    if not bool((jnp.isfinite(scale) & (scale > 0)).all()):
        raise ValueError(f"{what}: must be a positive number, it is {scale.tolist()}")


def _has_nan(array: jax.Array | np.ndarray) -> bool:
    """Looks where the numbers are; on a CPU without a program to compile for each shape."""
    if isinstance(array, np.ndarray) or _on_cpu(array):
        return bool(np.isnan(np.asarray(array)).any())
    return bool(_has_nan_on_device(array))


def _on_cpu(array: jax.Array) -> bool:
    return array.is_fully_addressable and all(d.platform == "cpu" for d in array.devices())


@jax.jit
def _has_nan_on_device(array: Shaped[Array, "..."]) -> Bool[Array, ""]:
    return jnp.isnan(array.astype(jnp.float32)).any()


def _on_device(tensor: np.ndarray, layout: Layout, dtype: DTypeLike | None) -> jax.Array:
    """Copies a mapped tensor to the device, in the model's layout."""
    source = tensor.T if layout == "linear" else tensor
    if source.flags.c_contiguous:
        # A CPU device would take the mapped file itself for its buffer, and the model would change
        # or crash with the file.
        source = source.copy()
    array = jax.device_put(source)
    return array if dtype is None else array.astype(dtype)


def _check_names(
    directory: ModelDirectory, wanted: Mapping[str, object], names: Collection[str]
) -> None:
    """Checks that the directory holds the model's parameters and nothing else."""
    present = set(names)
    if missing := [name for name in wanted if name not in present]:
        raise ValueError(
            f"{directory.path}: {len(missing)} tensors are missing: {_listed(missing)}"
        )
    extra = [name for name in names if name not in wanted and not name.endswith(_DERIVED)]
    if _HEAD in extra:
        _check_tied_head(directory)
        extra.remove(_HEAD)
    if extra:
        raise ValueError(
            f"{directory.path}: {len(extra)} tensors are not part of the model that config.json "
            f"describes: {_listed(extra)}"
        )


def _check_tied_head(directory: ModelDirectory) -> None:
    """Checks that an output head stored although it is tied is the token table."""
    head, table = directory.tensor(_HEAD), directory.tensor(_TOKEN_TABLE)
    same = head.dtype == table.dtype and head.shape == table.shape
    if not same or not np.array_equal(_words(head), _words(table)):
        raise ValueError(
            f"{directory.path}: config.json ties the output head to the token table, "
            f"but {_HEAD} differs from {_TOKEN_TABLE}; set tie_word_embeddings to false"
        )
    directory.release(_HEAD)


def _words(tensor: np.ndarray) -> np.ndarray:
    """The bits of a tensor as integers: equal also where it has NaN."""
    return tensor.view(f"u{tensor.dtype.itemsize}")


def _check_shape(
    directory: ModelDirectory, name: str, layout: Layout, shape: tuple[int, ...]
) -> None:
    """Checks a tensor's shape against the parameter's."""
    stored = directory.entry(name).shape
    expected = shape[::-1] if layout == "linear" else shape
    if stored != expected:
        raise ValueError(
            f"{directory.path}: tensor {name} has shape {list(stored)}, "
            f"config.json asks for {list(expected)}"
        )


def _check_one_number(directory: ModelDirectory, name: str) -> None:
    """Checks the shape of a scale, which others write as `[]` or `[1]`."""
    stored = directory.entry(name).shape
    if math.prod(stored) != 1:
        raise ValueError(
            f"{directory.path}: tensor {name} has shape {list(stored)}, it must be one number"
        )


def _listed(names: Iterable[str]) -> str:
    """The first few names and how many more there are."""
    names = list(names)
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
