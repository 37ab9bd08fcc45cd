# SPDX-License-Identifier: Apache-2.0
"""Projections that share an input, joined into one weight: queries, keys and values; gate and up.

    [x Wq, x Wk, x Wv]  =  x [Wq, Wk, Wv],       W [inputs, outputs]

One product is one launch of a kernel instead of three, and quantizes its input once. The joined layers
are those of Phi-3, whose files have them so. Codes, scales and biases stay bit for bit what they were;
XLA on a CPU adds the float32 products of a wider weight in another order, so that results may differ by
their last bits there.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax import qtensor
from qjax.qtensor import QTensor
from qjax_models.decoder import Decoder
from qjax_models.experts import ExpertsBlock
from qjax_models.layers import Attention, GatedMLP

# What a layer has of its own besides its weights, which the joined one takes from the first.
_WAYS = ("dtype", "precision", "preferred_element_type", "dot_general", "promote_dtype")


def join_projections(model: Decoder) -> None:
    """Joins what shares an input, wherever one weight holds exactly what the separate ones do.

    It does where all are plain arrays of one dtype, or QTensors of one scheme whose scales belong to
    outputs or to blocks of whole outputs, with the same static input scale and the same order of inputs
    if they have any. Weights under one scale for all (`-tensor`, `nvfp4`), of different schemes, or
    arranged for a kernel already stay as they are, and so do layers that compute in different ways
    (`dtype`, `precision`, `dot_general=` and the like); attention and MLP of each layer are decided on by
    themselves.

    To be done when a model is loaded to be run, before `qjax.prepare`: files hold the separate weights,
    so a joined model is not saved (`is_joined`).

    Args:
        model: changed in place, layer by layer: never more than one layer's weights are held twice.

    Example:
        >>> from qjax_models import DecoderConfig
        >>> config = DecoderConfig(vocab_size=64, hidden_size=32, mlp_size=48, num_layers=2,
        ...                        num_heads=4, num_kv_heads=2, head_size=8, max_positions=128)
        >>> model = Decoder(config, rngs=nnx.Rngs(0))
        >>> join_projections(model)
        >>> model.model.layers[0].self_attn.qkv_proj.kernel.shape
        (32, 64)
    """
    for block in model.model.layers:
        _join_attention(block.self_attn)
        if not isinstance(block, ExpertsBlock):
            _join_mlp(block.mlp)


def is_joined(model: Decoder) -> bool:
    """Whether `join_projections` or `stack_experts` did anything: no file has such layers."""
    return not model.config.fused_projections and any(
        block.self_attn.fused
        or (block.sparse.stacked if isinstance(block, ExpertsBlock) else block.mlp.fused)
        for block in model.model.layers
    )


def _join_attention(attention: Attention) -> None:
    if attention.fused:
        return
    parts = attention.q_proj, attention.k_proj, attention.v_proj
    if _fit(parts):
        attention.qkv_proj, attention.fused = _joined(parts), True
        del attention.q_proj, attention.k_proj, attention.v_proj


def _join_mlp(mlp: GatedMLP) -> None:
    if mlp.fused:
        return
    parts = mlp.gate_proj, mlp.up_proj
    if _fit(parts):
        mlp.gate_up_proj, mlp.fused = _joined(parts), True
        del mlp.gate_proj, mlp.up_proj


def _fit(parts: Sequence[nnx.Linear]) -> bool:
    """Whether one layer can hold what these do."""
    kinds = {_kind(part.kernel.get_value()) for part in parts}
    biases = {part.bias is not None and part.bias.get_value().dtype for part in parts}
    # Compared, not hashed: jnp.bfloat16 is equal to its dtype and has another hash.
    alike = all(getattr(part, way) == getattr(parts[0], way) for part in parts for way in _WAYS)
    return alike and len(kinds) == len(biases) == 1 and None not in kinds


def _kind(weight: Any) -> Hashable:
    """What weights have alike that can be joined; None: this one cannot be joined with any."""
    if not isinstance(weight, QTensor):
        return weight.dtype
    if weight.layout is not None or weight.tensor_scale is not None:
        return None
    shared = weight.tile[-1]  # outputs under one scale
    in_blocks = weight.scheme.weights.granularity == "block" and weight.shape[-1] % shared == 0
    if shared > 1 and not in_blocks:
        return None
    # Layers of one input are regrouped alike, for their Hessian is the same.
    order = None if weight.order is None else tuple(weight.order.tolist())
    columns = None if weight.columns is None else tuple(weight.columns.tolist())
    # Calibration gives layers of one input one scale; trained ones may differ, and then stay apart.
    input_scale = None if weight.input_scale is None else weight.input_scale.tolist()
    return (
        weight.format, weight.axis, weight.tile, weight.dtype, weight.activations,
        weight.scale.dtype, weight.zero is None, order, columns, input_scale,
    )  # fmt: skip


def _joined(parts: Sequence[nnx.Linear]) -> nnx.Linear:
    """The first of the layers, which keeps its types and hooks, with the outputs of all."""
    first, *_ = parts
    kernel = _side_by_side([part.kernel.get_value() for part in parts])
    if first.bias is not None:
        biases = [part.bias.get_value() for part in parts if part.bias is not None]
        first.bias.set_value(_side_by_side(biases))
    # Until it is there the parts are held too; waiting keeps that to one layer at a time.
    first.kernel.set_value(jax.block_until_ready(kernel))
    first.out_features = sum(part.out_features for part in parts)
    return first


@jax.jit
def _side_by_side(parts: list[Any]) -> Any:
    """Arrays or QTensors of one kind, joined along their outputs, the last axis."""

    def joined(arrays: list[jax.Array]) -> jax.Array:
        return jnp.concatenate(arrays, axis=-1)

    first, *_ = parts
    if not isinstance(first, QTensor):
        return joined(parts)
    result = QTensor.from_codes(
        # Unpacked, because a part's outputs need not fill whole bytes.
        joined([qtensor.unpacked(part) for part in parts]),
        joined([part.scale for part in parts]),
        None if first.zero is None else joined([part.zero for part in parts]),
        order=first.order,
        format=first.format,
        axis=first.axis,
        tile=first.tile,
        dtype=first.dtype,
        activations=first.activations,
    ).replaced(input_scale=first.input_scale)
    if first.outliers is None:
        return result
    return result.replaced(
        columns=first.columns, outliers=joined([part.outliers for part in parts])
    )
