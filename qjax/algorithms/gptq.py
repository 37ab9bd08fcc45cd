# SPDX-License-Identifier: Apache-2.0
"""GPTQ: weights are rounded input by input, and the inputs still to come make up for the error.

    minimize over W'  in the grid of the scheme    tr((W - W')^T H (W - W')),        H = X^T X + damping

Inputs are taken in an order; when input ``i`` has been rounded, its error moves the weights of every
later input ``j`` by ``-U_ij / U_ii`` times it, which is where the least squares put them.

==============  ==============================================================================
paper           here
==============  ==============================================================================
W               ``w`` transposed: a column of the paper is a row ``[n]``, an input, here
H               ``hessian``, ``[k, k]``, as calibration sums it: without the factor of two
H^-1            never formed; ``upper`` is its Cholesky factor, ``H^-1 = upper^T upper``
quant(w)        the nearest value of the input's tile, ``(codes - zero) * scale``
E               ``errors``, ``(w - quant(w)) / upper_ii``
B               ``BLOCK`` inputs, after which the errors reach the rest in one product: the loop is
                :mod:`qjax.algorithms.compensated_rounding`
lambda          ``damping``, a share of the mean of H's diagonal, which is added to all of it
act-order       ``Order``: inputs of large ``H_ii`` first; with groups made of that order, "regrouped"
g_idx           ``QTensor.order``: ``g_idx[order[i]] = i // group_size``
==============  ==============================================================================

``upper`` comes from one factorization and one triangular inverse: of the Hessian with its inputs in
reverse, ``R H R = L L^T``, it is ``R L^-1 R``. The authors' code takes three factorizations.

References:
  Frantar, Ashkboos, Hoefler, Alistarh, GPTQ: Accurate Post-Training Quantization for Generative
  Pre-trained Transformers, ICLR 2023, https://arxiv.org/abs/2210.17323, algorithm 1; the order and the
  damping are those of the authors' code, https://github.com/IST-DASLab/gptq.
"""

import contextlib
import functools
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from qjax import compilation, input_order, kernel_rounding, ranges, tiles
from qjax.algorithms import round_nearest
from qjax.algorithms.compensated_rounding import BLOCK, Nearest, Steps, filled, rounded
from qjax.qtensor import QTensor
from qjax.ranges import Grid, RangeSearch
from qjax.scheme import Scheme

_MOST_DAMPING = 1e4  # a multiple of the identity by then: plain rounding, of a Hessian of garbage

Order = Literal["as-is", "by-activity", "by-group", "regrouped"]
Grids = Literal["original", "updated"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How GPTQ is run.

    Attributes:
      damping: what is added to the Hessian's diagonal, as a share of its mean; doubled until the
        Hessian can be factorized.
      order: of the inputs: as they stand; those of large mean square first; or the groups of large
        mean square first, and in a group likewise. An input stays in the group of its place, so that
        nothing more has to be stored ("static" act-order; GPTQModel calls the last group-aware).
        Or "regrouped": those of large mean square first, and each group is a run of that order, inputs
        that matter alike. It is what the authors' code does under ``act_order`` without static groups,
        what files call ``desc_act`` and compressed-tensors ``actorder: group``. Which inputs are in a
        group has to be stored (their ``g_idx``, here ``QTensor.order``), products take their input in
        that order, and no current release of compressed-tensors or vLLM reads it. Where one scale
        serves all inputs it is the same as "by-activity".
      grids: whether a tile's scale and zero come from the original weights, or from what the weights
        have become when the first input of the tile is reached, as in the paper. The second is for
        groups and channels, in an order that takes the inputs of a group one after the other.
      exact_peer: to round as llm-compressor 0.14 does: the rounded weight that an error is measured
        from is itself rounded to the weight's dtype, and so is each step to an asymmetric scale and
        zero; inputs that calibration never saw other than zero lose their weights. The factor is computed
        in float64 then: that of float32 is further from the exact one than llm-compressor's, and weights
        that nearly tie fall the other way with it (``docs/gptq.md``).
    """

    damping: float = 0.01
    order: Order = "by-activity"
    grids: Grids = "original"
    exact_peer: bool = False

    def __post_init__(self):  # noqa: D105
        if not 0 < self.damping < 1:
            raise ValueError(f"damping is a share of the diagonal in (0, 1), got {self.damping=}")
        if self.order not in get_args(Order) or self.grids not in get_args(Grids):
            raise ValueError(
                f"order is one of {get_args(Order)}, grids of {get_args(Grids)}; got "
                f"{self.order=} {self.grids=}"
            )
        if self.grids == "updated" and self.order == "by-activity":
            raise ValueError(
                "grids of updated weights need the inputs of a group to follow each other: "
                "order 'as-is', 'by-group' or 'regrouped'"
            )


class Factor(NamedTuple):
    """A Hessian made ready for any number of weights that share it.

    Attributes:
      hessian: as it was summed, inputs in their own order.
      upper: ``[k, k]``, of the inverse of the damped Hessian, inputs in ``order``.
      order: ``[k]``, the input that is taken at each step.
      dead: ``[k]``, inputs that were zero in every row; not in ``order``.
      damping: the share that was needed.
    """

    hessian: Float[Array, "k k"]
    upper: Float[Array, "k k"]
    order: Int[Array, " k"]
    dead: Bool[Array, " k"]
    damping: Float[Array, ""]


@functools.partial(jax.jit, static_argnames=("options", "group_size"))
def factor(
    hessian: Float[Array, "k k"],
    options: Options = Options(),  # noqa: B008  frozen
    group_size: int | None = None,
) -> Factor:
    """Factorizes the inverse of a Hessian.

    Args:
      hessian: ``sum x x^T``.
      options: order and damping.
      group_size: inputs that share a scale, for the order by groups; None: all of them.

    Returns:
      The factor. Its ``damping`` is NaN where no damping helps, because the Hessian is not finite.
    """
    diagonal = jnp.diagonal(hessian)
    dead = diagonal == 0
    living = hessian + jnp.diag(dead.astype(jnp.float32))
    diagonal = jnp.where(dead, 1.0, diagonal)
    order = _order(diagonal, options.order, group_size or len(diagonal))
    reverse = living[order][:, order][::-1, ::-1]
    double = options.exact_peer
    with jax.enable_x64(True) if double else contextlib.nullcontext():
        wide = reverse.astype(jnp.float64 if double else jnp.float32)
        inverse, damping = _inverse_factor(wide, options.damping)
        inverse, damping = inverse.astype(jnp.float32), damping.astype(jnp.float32)
    return Factor(
        hessian=hessian, upper=inverse[::-1, ::-1], order=order, dead=dead, damping=damping
    )


def _inverse_factor(
    hessian: Float[Array, "k k"], damping: float
) -> tuple[Float[Array, "k k"], Float[Array, ""]]:
    """The inverse of the Cholesky factor of a damped Hessian, and the damping that was needed or NaN."""
    identity = jnp.eye(len(hessian), dtype=hessian.dtype)
    mean = jnp.mean(jnp.diagonal(hessian))

    def factorized(damping: Float[Array, ""]) -> Float[Array, "k k"]:
        return jnp.linalg.cholesky(hessian + damping * mean * identity)

    def failed(state) -> Bool[Array, ""]:
        damping, lower = state
        return ~jnp.isfinite(lower).all() & (damping < _MOST_DAMPING)

    def harder(state):
        damping = 2 * state[0]
        return damping, factorized(damping)

    first = jnp.asarray(damping, hessian.dtype)
    needed, lower = lax.while_loop(failed, harder, (first, factorized(first)))
    inverse = lax.linalg.triangular_solve(lower, identity, left_side=True, lower=True)
    return inverse, jnp.where(jnp.isfinite(lower).all(), needed, jnp.nan)


def _order(diagonal: Float[Array, " k"], order: Order, size: int) -> Int[Array, " k"]:
    """The input that is taken at each step."""
    if order == "as-is":
        return jnp.arange(len(diagonal), dtype=jnp.int32)
    if order in ("by-activity", "regrouped"):
        return jnp.argsort(-diagonal).astype(jnp.int32)
    k = len(diagonal)
    group = jnp.arange(k) // size  # the last of a block's may be a shorter one
    padded = jnp.pad(diagonal, (0, -k % size), constant_values=jnp.nan).reshape(-1, size)
    return jnp.lexsort((-diagonal, group, -jnp.nanmean(padded, axis=1)[group])).astype(jnp.int32)


def quantize(
    w: Float[Array, "..."],
    scheme: str | Scheme,
    factor: Factor,
    *,
    axis: int | tuple[int, ...] = -2,
    search: RangeSearch = RangeSearch(),  # noqa: B008  frozen
    options: Options = Options(),  # noqa: B008  frozen
    name: str = "array",
) -> QTensor:
    """Quantizes a weight by GPTQ.

    Args:
      w: the weight, any float dtype.
      scheme: how to hold it, or the scheme's name.
      factor: of the Hessian of the inputs that the weight is multiplied with, flattened if it has
        several contraction axes.
      axis: what a product sums over.
      search: how the range of each tile is chosen.
      options: the ones that the factor was made with.
      name: what errors call the array.

    Returns:
      The QTensor, scales in ``w``'s dtype unless the scheme says otherwise.

    Raises:
      ValueError: NaN or infinities in ``w``, a Hessian of another size, or one that is not finite; a
        group size that does not divide the contraction axis; ``grids="updated"`` of a scheme whose
        scales are not a group's or a channel's; the order "regrouped" of a weight with several
        contraction axes.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (512, 64))
      >>> w = jax.random.normal(jax.random.key(1), (64, 32))
      >>> quantize(w, "w4a16-g32", factor(x.T @ x)).scale.shape
      (2, 32)
    """
    parsed = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
    axes = round_nearest.contraction(w.ndim, axis, name)
    tile = _tile(w.shape, parsed, axes, options, name)
    k = math.prod(w.shape[a] for a in axes)
    if k != len(factor.order):
        raise ValueError(f"{name}: {k} inputs, but the Hessian is of {len(factor.order)}")
    weights = parsed.weights
    if options.grids == "updated" and (
        weights.granularity not in ("group", "channel") or weights.scale_format == "e4m3"
    ):
        raise ValueError(
            f"{name}: grids of updated weights need scales of groups or channels that stand for "
            f"themselves; {parsed.name} has others"
        )
    if not bool(_all_finite(w)):
        raise ValueError(f"{name}: NaN or an infinity among the weights; numbers are needed")
    if not math.isfinite(float(factor.damping)):
        raise ValueError(f"{name}: the Hessian of its inputs is not finite; are the activations?")
    kernel = kernel_rounding.is_there(w)
    return _quantize(w, parsed, factor, axes, tile, search, options, kernel=kernel)


def programs(
    w: Float[Array, "..."],
    scheme: Scheme,
    *,
    axis: tuple[int, ...],
    search: RangeSearch,
    options: Options,
    name: str = "array",
) -> tuple[list[jax.stages.Lowered], QTensor]:
    """What :func:`factor` and :func:`quantize` are going to run, for compiling it beside other programs.

    Args:
      w: the weight, or its shape.
      scheme: how to hold it.
      axis: what a product sums over.
      search: how the range of each tile is chosen.
      options: of both.
      name: what errors call the array.

    Returns:
      The programs, and the result with shapes in place of arrays.

    Raises:
      ValueError: a group size that does not divide the contraction axis, or the order "regrouped" and
        several such axes.
    """
    axes = round_nearest.contraction(w.ndim, axis, name)
    tile = _tile(w.shape, scheme, axes, options, name)
    k = math.prod(w.shape[i] for i in axes)
    hessian, size = jax.ShapeDtypeStruct((k, k), jnp.float32), scheme.weights.group_size
    known = jax.eval_shape(functools.partial(factor, options=options, group_size=size), hessian)
    given = scheme, known, axes, tile, search, options
    kernel = kernel_rounding.is_there(w)
    return [
        _all_finite.lower(w),
        factor.lower(hessian, options, size),
        _quantize.lower(w, *given, kernel=kernel),
    ], _quantize.eval_shape(w, *given, kernel=kernel)


def _tile(
    shape: tuple[int, ...], scheme: Scheme, axes: tuple[int, ...], options: Options, name: str
) -> tuple[int, ...]:
    """What shares a scale."""
    tile = round_nearest.tile_of(shape, scheme.weights, axes, name)
    if _is_regrouped(shape, tile, axes, options) and len(axes) > 1:
        raise ValueError(
            f"{name}: inputs are regrouped along one axis, this weight is summed over {axes}; another "
            "order than 'regrouped' takes it"
        )
    return tile


def _is_regrouped(
    shape: tuple[int, ...], tile: tuple[int, ...], axes: tuple[int, ...], options: Options
) -> bool:
    """Whether it has to be stored which inputs share a scale: not where all of them do."""
    return options.order == "regrouped" and any(tile[a] < shape[a] for a in axes)


@jax.jit
def _all_finite(w: Float[Array, "..."]) -> Bool[Array, ""]:
    return jnp.isfinite(w).all()


@functools.partial(
    jax.jit,
    static_argnames=("scheme", "axes", "tile", "search", "options", "kernel"),
    compiler_options=compilation.WITHOUT_TRIALS,
)
def _quantize(
    w: Float[Array, "..."],
    scheme: Scheme,
    factor: Factor,
    axes: tuple[int, ...],
    tile: tuple[int, ...],
    search: RangeSearch,
    options: Options,
    *,
    kernel: bool,
) -> QTensor:
    weights, order = scheme.weights, None
    if _is_regrouped(w.shape, tile, axes, options):
        # With its inputs in that order it is a weight whose inputs are taken as they are.
        order = factor.order
        w = input_order.gathered(w, order, axes[0])
        factor = factor._replace(
            hessian=factor.hessian[order][:, order],
            order=jnp.arange(len(order), dtype=order.dtype),
            dead=factor.dead[order],
        )
    rows = as_inputs(w, axes).astype(jnp.float32)
    if options.exact_peer:
        rows = jnp.where(factor.dead[:, None], 0.0, rows)
    dtype = jnp.dtype(w.dtype if options.exact_peer else jnp.float32)
    # The kernel does not round what codes stand for.
    nearest = Nearest(fmt=weights.format, dtype=dtype, kernel=kernel and dtype == jnp.float32)
    if options.grids == "original":
        grid = ranges.find_grid(w, weights, tile, search, factor.hessian, arithmetic=dtype)
        step, zero = (leaf[factor.order] for leaf in _steps(grid, w.shape, tile, axes))
        steps = Steps(filled(step, BLOCK, 1.0), filled(zero, BLOCK, 0.0))

        def fixed(start: Int[Array, ""], rows: Float[Array, "b n"]) -> tuple[Steps, None]:
            return Steps(
                *(lax.dynamic_slice_in_dim(leaf, start, len(rows)) for leaf in steps)
            ), None

        codes, _ = rounded(rows[factor.order], factor.upper, BLOCK, fixed, nearest)
    else:
        size = weights.group_size or len(rows)

        def updated(start: Int[Array, ""], rows: Float[Array, "b n"]) -> tuple[Steps, Grid]:
            members = lax.dynamic_slice_in_dim(factor.order, start, size)
            hessian = factor.hessian[members][:, members]
            grid = ranges.find_grid(
                rows.astype(w.dtype), weights, (size, 1), search, hessian, arithmetic=dtype
            )
            return _steps(grid, rows.shape, (size, 1), (-2,)), grid

        codes, grids = rounded(rows[factor.order], factor.upper, size, updated, nearest)
        counts, place = tiles.counts(w.shape, tile), jnp.argsort(factor.order[::size])
        grid = jax.tree.map(lambda leaf: from_inputs(leaf[place, 0], counts, axes), grids)
    codes = codes[jnp.argsort(factor.order)]
    return QTensor.from_codes(
        from_inputs(codes, w.shape, axes), grid.scale, grid.zero, grid.tensor_scale, order=order,
        format=weights.format, axis=axes, tile=tile, dtype=w.dtype, activations=scheme.activations,
    )  # fmt: skip


def _steps(
    grid: Grid, shape: tuple[int, ...], tile: tuple[int, ...], axes: tuple[int, ...]
) -> Steps:
    """The grid of each weight, input by input."""
    zero = jnp.zeros_like(grid.step) if grid.zero is None else grid.zero.astype(jnp.float32)
    spread = (tiles.spread(leaf, tile, shape) for leaf in (grid.step, zero))
    return Steps(*(as_inputs(jnp.broadcast_to(leaf, shape), axes) for leaf in spread))


def as_inputs(w: Shaped[Array, "..."], axes: tuple[int, ...]) -> Shaped[Array, "k n"]:
    """An array with what a product sums over in front, flattened, and all else behind.

    >>> as_inputs(jnp.zeros((2, 3, 5)), (-3, -2)).shape
    (6, 5)
    """
    front = jnp.moveaxis(w, axes, range(len(axes)))
    return front.reshape(math.prod(front.shape[: len(axes)]), -1)


def from_inputs(
    rows: Shaped[Array, "k n"], shape: tuple[int, ...], axes: tuple[int, ...]
) -> Shaped[Array, "..."]:
    """The array of ``shape`` that :func:`as_inputs` made rows of."""
    contracted = [a % len(shape) for a in axes]
    free = [n for i, n in enumerate(shape) if i not in contracted]
    front = rows.reshape(*(shape[a] for a in axes), *free)
    return jnp.moveaxis(front, range(len(axes)), axes)
