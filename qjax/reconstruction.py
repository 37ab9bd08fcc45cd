# SPDX-License-Identifier: Apache-2.0
"""A quantized block trained as a whole to give what the full-precision one gave.

    minimize    mean (block(x; W'_1 ... W'_n) - y)^2        by :mod:`qjax.algorithms.learned_rounding`

``x`` is what reaches the block in the quantized model, ``y`` what left it in the unquantized one, on
inputs of its own: so a block makes up for errors of those before it, too. (A small Llama at w4a16-g128
lost 0.14 of perplexity so, and 0.19 when ``y`` was what the full-precision block makes of ``x``.) Norms
and biases stay.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from qjax import activations, nnx_layers, qtensor
from qjax.algorithms import learned_rounding
from qjax.algorithms.learned_rounding import Anchor, Options, Parameters
from qjax.blockwise import Block
from qjax.nnx_layers import QuantizableLayer
from qjax.qtensor import QTensor

LEAST_WINDOWS = 2  # one to train on, one to measure on
_CHECKS = 10  # how often, in a training, its loss is measured
_HELD_OUT = 8  # one window in as many is for measuring, not for training


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """What training made of a block.

    Attributes:
      weights: the new QTensor of each layer, by its path in the block.
      before: mean squared error of the block's output on held-out windows, with the QTensors given.
      after: the same with the new ones; never more.
    """

    weights: dict[str, QTensor]
    before: float
    after: float


def reconstruct(
    block: Block,
    start: Mapping[str, QTensor],
    inputs: Sequence[Float[Array, "_ T D"]],
    targets: Sequence[Float[Array, "_ T D"]],
    *,
    apply: Callable[[Any, Float[Array, "B T D"], Any], Float[Array, "B T D"]],
    options: Options = Options(),  # noqa: B008  frozen
    compute_dtype: Any = None,
) -> Reconstruction:
    """Trains the codes, scales and zeros of a block's layers.

    Every eighth window is held out. Of the parameters at the start and at ten points of the training
    those are kept that do best on them.

    Args:
      block: with its original weights; left as it is.
      start: what another method made of each layer's weight, by its path in the block.
      inputs: calibration windows as they reach the block, in batches of any sizes.
      targets: what the block should give for them.
      apply: runs a block, as :class:`qjax.blockwise.Blockwise` says. Blocks of one structure, with
        QTensors of one form and the same number of windows, are one compiled program.
      options: how to train.
      compute_dtype: what layers compute in; None: what they would.

    Returns:
      The new QTensors, and the losses.

    Raises:
      ValueError: there is no layer of a path, it holds a QTensor itself or a weight of another shape;
        fewer than two windows; or the loss at the start is not finite.
    """
    x, y = jnp.concatenate(inputs), jnp.concatenate(targets)
    if len(x) < LEAST_WINDOWS or len(x) != len(y):
        raise ValueError(
            f"{block.path}: {LEAST_WINDOWS} windows or more are needed, and a target for each; got "
            f"{len(x)} and {len(y)}"
        )
    graphdef, state = nnx.split(block.module)
    problem = _Problem(
        graphdef=graphdef, state=state, anchors=_anchors(block, start), x=x, y=y,
        context=block.context, apply=apply, options=options, compute_dtype=compute_dtype,
    )  # fmt: skip
    params = {path: learned_rounding.parameters(anchor) for path, anchor in problem.anchors.items()}
    held_out, order = _windows(len(x), options)
    before = after = float(_held_out_loss(problem, params, held_out))
    if not np.isfinite(before):
        raise ValueError(
            f"{block.path}: the loss before training is not finite; are weights and activations?"
        )
    weights, state_of_optimizer = dict(start), learned_rounding.optimizer(options).init(params)
    check_every = max(1, options.steps // _CHECKS)
    for number, rows in enumerate(order, start=1):
        if before == 0:
            break
        params, state_of_optimizer = _step(problem, params, state_of_optimizer, rows, before)
        if number % check_every and number < options.steps:
            continue
        loss = float(_held_out_loss(problem, params, held_out))
        if loss < after:
            after, weights = loss, _hard(problem.anchors, params)
    return Reconstruction(weights=weights, before=before, after=after)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["state", "anchors", "x", "y", "context"],
    meta_fields=["graphdef", "apply", "options", "compute_dtype"],
)
@dataclass(frozen=True, kw_only=True)
class _Problem:
    """All that stays the same while a block is trained; what is static is the same for all blocks."""

    state: Any
    anchors: dict[str, Anchor]
    x: Any
    y: Any
    context: Any
    graphdef: Any
    apply: Callable[..., Any]
    options: Options
    compute_dtype: Any


def _anchors(block: Block, start: Mapping[str, QTensor]) -> dict[str, Anchor]:
    layers = dict(nnx_layers.quantizable_layers(block.module))
    anchors = {}
    for path, q in start.items():
        if path not in layers:
            raise ValueError(f"{block.path}: has no layer {path}; there are {', '.join(layers)}")
        w = nnx_layers.weight_of(layers[path])
        if isinstance(w, QTensor):
            raise ValueError(f"{block.path}/{path}: is quantized; its original weight is needed")
        try:
            anchors[path] = _anchored(w, q)
        except ValueError as error:
            raise ValueError(f"{block.path}/{path}: {error}") from error
    return anchors


_anchored = jax.jit(learned_rounding.anchored)


def _windows(count: int, options: Options) -> tuple[np.ndarray, np.ndarray]:
    """The windows that are held out, and those of each step."""
    rng = np.random.default_rng(options.seed)
    shuffled = rng.permutation(count)
    held_out, rest = np.split(shuffled, [max(1, count // _HELD_OUT)])
    wanted = options.steps * options.batch
    rounds = [rng.permutation(rest) for _ in range(-(-wanted // len(rest)))]
    return held_out, np.concatenate(rounds)[:wanted].reshape(options.steps, options.batch)


@jax.jit
def _step(
    problem: _Problem,
    params: dict[str, Parameters],
    state_of_optimizer: Any,
    rows: Int[Array, " batch"],
    unit: Float[Array, ""],
) -> tuple[dict[str, Parameters], Any]:
    """One step down the loss, measured in units in which it begins at about one."""

    def loss(params: dict[str, Parameters]) -> Float[Array, ""]:
        weights = {
            path: learned_rounding.soft(problem.anchors[path], p) for path, p in params.items()
        }
        # Adam's epsilon has a size of its own; gradients must not become small beside it.
        return _loss(problem, weights, rows) / unit

    gradients = jax.grad(loss)(params)
    updates, state_of_optimizer = learned_rounding.optimizer(problem.options).update(
        gradients, state_of_optimizer, params
    )
    return jax.tree.map(jnp.add, params, updates), state_of_optimizer


@jax.jit
def _held_out_loss(
    problem: _Problem, params: dict[str, Parameters], rows: Int[Array, " n"]
) -> Float[Array, ""]:
    """The loss of the QTensors that parameters stand for, one window at a time to save memory."""
    weights = {path: qtensor.dequantize(q) for path, q in _hard(problem.anchors, params).items()}
    return jnp.mean(lax.map(lambda row: _loss(problem, weights, row[None]), rows))


@jax.jit
def _hard(anchors: dict[str, Anchor], params: dict[str, Parameters]) -> dict[str, QTensor]:
    return {path: learned_rounding.hard(anchors[path], p) for path, p in params.items()}


def _loss(
    problem: _Problem, weights: dict[str, Float[Array, "..."]], rows: Int[Array, " batch"]
) -> Float[Array, ""]:
    y = _output(problem, weights, problem.x[rows]).astype(jnp.float32)
    return jnp.mean(jnp.square(y - problem.y[rows].astype(jnp.float32)))


def _output(
    problem: _Problem, weights: dict[str, Float[Array, "..."]], x: Float[Array, "B T D"]
) -> Float[Array, "B T D"]:
    """What the block gives with other weights, and with activations quantized where theirs are."""
    # Variables of their own: those of an outer trace must not be written to.
    module = nnx.merge(problem.graphdef, jax.tree.map(lambda leaf: leaf, problem.state))
    for path, layer in nnx_layers.quantizable_layers(module):
        if path in weights:
            nnx_layers.variable_of(layer).set_value(weights[path])
        if isinstance(layer, nnx.Embed):
            continue
        anchor = problem.anchors.get(path)
        hook = functools.partial(
            _promote,
            layer=layer,
            held=None if anchor is None else anchor.start,
            compute_dtype=problem.compute_dtype,
        )
        setattr(layer, "promote_dtype", hook)  # noqa: B010  Flax declares it with a type of its own
    return problem.apply(module, x, problem.context)


def _promote(
    args: tuple[Any, ...],
    *,
    dtype: Any = None,
    inexact: bool = True,
    layer: QuantizableLayer,
    held: QTensor | None,
    compute_dtype: Any,
) -> tuple[Any, ...]:
    """A layer's hook: what it multiplies, rounded as its QTensor says, straight through."""
    x, *others = nnx_layers.promote(args, dtype=compute_dtype or dtype, inexact=inexact)
    if held is not None and held.activations is not None:
        summed = nnx_layers.summed_axes(layer, x.ndim)
        x = activations.fake_quantize(x, held.activations, summed, held.input_scale)
    return (x, *others)
