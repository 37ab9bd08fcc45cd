# SPDX-License-Identifier: Apache-2.0
"""A model's residual stream in a rotated basis, part by part as the weights come in.

    x -> x Q:   table Q,    Q^T diag(g) W of what reads the stream behind a norm of factors g,
                W Q and b Q of what writes it,    and all g become ones

The model computes what it did, but for rounding; what changes is that no channel of the stream is much
larger than the others. Likewise each head of values is rotated by a matrix H of its size, and the layer
that multiplies them takes it back.
"""

import contextlib
from collections.abc import Iterator, Mapping

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from qjax import folding, nnx_layers
from qjax.algorithms import rotation
from qjax.blockwise import Blockwise, Fold, Stream
from qjax.qtensor import QTensor
from qjax.report import LayerReport
from qjax.storage import Storage


class RotatedStorage(Storage):
    """Brings each part of a model rotated; what is kept is kept where the other storage keeps it.

    Args:
      inner: where the parts come from, as they were, and go to.
      model: whose parts they are.
      chain: the model as a chain of blocks.
      options: how to rotate.

    Raises:
      ValueError: no rotation passes through the model; later, a part is quantized already (named).
    """

    def __init__(
        self, inner: Storage, model: nnx.Module, chain: Blockwise, options: rotation.Options
    ):
        if chain.stream is None:
            raise ValueError(
                "rotation: none passes through the residual stream of this model as it is; "
                "qjax_models.rotatable makes a decoder of those that have another form"
            )
        self._inner = inner
        self._stream = chain.stream
        self._blocks = {block.path for block in chain.blocks}
        self._norm = folding.modules_of(model)[self.norm]
        self._seed = options.seed

    @property
    def norm(self) -> str:
        """Path of the norm that ends the stream: a part that is rotated and no layer."""
        return self._stream.head.producer.path

    def finished(self, path: str) -> tuple[LayerReport, ...] | None:
        """What the other storage says."""
        return self._inner.finished(path)

    def load(self, path: str, module: nnx.Module) -> None:
        """Brings a part as it was, and rotates it."""
        self._inner.load(path, module)
        _check_plain(path, module)
        head = self._stream.head
        if path in self._blocks:
            rotate_block(module, self._stream, self._seed)
        elif path == self._stream.table:
            with _wide({"": module}) as layers:
                _turn_outputs(layers[""], self._seed)
        elif path in head.consumers:
            self._inner.load(self.norm, self._norm)
            factors = folding.norm_factors(self._norm, head)
            self._inner.release(self.norm, self._norm)
            with _wide({"": module}) as layers:
                _turn_inputs(layers[""], factors, self._seed)
        elif path == self.norm:
            _make_neutral(module, head)

    def keep(self, path: str, module: nnx.Module, reports: tuple[LayerReport, ...]) -> None:
        """Hands a part on."""
        self._inner.keep(path, module, reports)

    def recall(self, path: str, module: nnx.Module) -> None:
        """Brings a part as it was kept, which is rotated."""
        self._inner.recall(path, module)

    def release(self, path: str, module: nnx.Module) -> None:
        """Lets a part go."""
        self._inner.release(path, module)


def rotate_block(block: nnx.Module, stream: Stream, seed: int) -> None:
    """Rotates the stream around a block and the heads inside it, in place.

    Args:
      block: its layers hold plain arrays. Each is changed in float32 and rounded once.
      stream: where the block meets it.
      seed: of the rotation, the same for all parts of a model.
    """
    modules = folding.modules_of(block)
    readers = {path: where for where in stream.readers for path in where.consumers}
    heads = stream.values
    with _wide({p: modules[p] for p in (*readers, *stream.writers)}) as layers:
        for path, where in readers.items():
            factors = folding.norm_factors(modules[where.producer.path], where)
            _turn_inputs(layers[path], factors, seed)
        for path in stream.writers:
            _turn_outputs(layers[path], seed)
        if heads is not None and heads.head_size is not None:
            _turn_heads_of_outputs(layers[heads.producer.path], heads, heads.head_size)
            for path in heads.consumers:
                _turn_heads_of_inputs(layers[path], heads.head_size)
    for where in stream.readers:
        _make_neutral(modules[where.producer.path], where)


def _turn_inputs(layer: nnx.Module, factors: Float[Array, " k"], seed: int) -> None:
    """Lets a linear layer take rotated channels of a norm that has no factors any more."""
    assert isinstance(layer, nnx.Linear)
    kernel = layer.kernel.get_value()
    layer.kernel.set_value(rotation.turned(kernel * factors[:, None], axis=0, seed=seed))


def _turn_outputs(layer: nnx.Module, seed: int) -> None:
    """Lets a linear layer, or a table, write rotated channels."""
    for variable in _weights(layer):
        variable.set_value(rotation.turned(variable.get_value(), axis=-1, seed=seed))


def _turn_heads_of_outputs(layer: nnx.Module, where: Fold, head_size: int) -> None:
    """Rotates each head of values that a layer makes."""
    for variable in _weights(layer):
        whole = variable.get_value()
        values = whole[..., where.producer.slice]
        heads = values.reshape(*values.shape[:-1], -1, head_size)
        turned = rotation.turned(heads, axis=-1).reshape(values.shape)
        variable.set_value(whole.at[..., where.producer.slice].set(turned))


def _turn_heads_of_inputs(layer: nnx.Module, head_size: int) -> None:
    """Lets a layer take heads of rotated values, all by the same matrix, whichever query mixed them."""
    assert isinstance(layer, nnx.Linear)
    kernel = layer.kernel.get_value()
    heads = kernel.reshape(-1, head_size, kernel.shape[-1])
    layer.kernel.set_value(rotation.turned(heads, axis=1).reshape(kernel.shape))


def _make_neutral(norm: nnx.Module, where: Fold) -> None:
    """Lets a norm multiply by ones: its factors are in the layers behind it."""
    folding.set_norm_factors(norm, where, jnp.ones_like(folding.norm_factors(norm, where)))


def _weights(layer: nnx.Module) -> list[nnx.Variable]:
    """The weight of a linear layer or a table, and the bias if there is one."""
    if isinstance(layer, nnx.Embed):
        return [layer.embedding]
    assert isinstance(layer, nnx.Linear)
    return [layer.kernel] if layer.bias is None else [layer.kernel, layer.bias]


@contextlib.contextmanager
def _wide(layers: Mapping[str, nnx.Module]) -> Iterator[Mapping[str, nnx.Module]]:
    """Layers that hold float32 for a while, and are rounded to what they held at its end."""
    variables = [variable for layer in layers.values() for variable in _weights(layer)]
    dtypes = [variable.get_value().dtype for variable in variables]
    for variable in variables:
        variable.set_value(variable.get_value().astype(jnp.float32))
    yield layers
    for variable, dtype in zip(variables, dtypes, strict=True):
        variable.set_value(variable.get_value().astype(dtype))


def _check_plain(path: str, module: nnx.Module) -> None:
    for name, variable in nnx_layers.named_variables(module, f"{path}/").items():
        value = variable.get_value()
        if isinstance(value, QTensor):
            raise ValueError(
                f"{name.rpartition('/')[0]}: already quantized to {value.format.name}; start from the "
                "original"
            )
