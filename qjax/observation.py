# SPDX-License-Identifier: Apache-2.0
"""Watching what the layers of a model multiply, while it runs under jit.

Every stock Flax layer passes its input through the hook ``promote_dtype=`` before it multiplies; for
the time of one trace a hook that keeps statistics of the input stands there. Layers that are handed
the same array share one entry: queries, keys and values; gate and up.

A model that lets each of its experts compute every token says with :func:`rows_that_count` which of them
the expert is for. Statistics are of those, or of all (``ExpertTokens``).
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
from flax import nnx
from jaxtyping import Array, Bool, Num

from qjax import nnx_layers, statistics
from qjax.nnx_layers import QuantizableLayer
from qjax.statistics import InputStatistics

# What an expert is calibrated with: the tokens that are routed to it, or all.
ExpertTokens = Literal["routed", "all"]

_COUNTED: ContextVar[Any] = ContextVar("rows that count", default=None)


@contextlib.contextmanager
def rows_that_count(counted: Bool[Array, "*batch"]) -> Iterator[None]:
    """Says which rows of their input layers are meant for, if they are called in this context.

    It changes nothing that is computed, and costs nothing where nobody observes.

    Args:
      counted: an entry for each row of what the layers multiply.
    """
    token = _COUNTED.set(counted)
    try:
        yield
    finally:
        _COUNTED.reset(token)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["inputs"], meta_fields=["layers", "routed"]
)
@dataclass(frozen=True, kw_only=True)
class Observed:
    """What the layers of a model multiplied.

    Attributes:
      layers: the layers of each input by their paths, in the order in which the model reached them.
      inputs: the statistics of each input.
      routed: whether they are of some rows alone, those that were meant for the layers.
    """

    layers: tuple[tuple[str, ...], ...]
    inputs: tuple[InputStatistics, ...]
    routed: tuple[bool, ...]

    def __getitem__(self, path: str) -> InputStatistics:
        """The statistics of the input of a layer."""
        for layers, inputs in zip(self.layers, self.inputs, strict=True):
            if path in layers:
                return inputs
        raise KeyError(path)

    def __contains__(self, path: str) -> bool:
        """Whether the layer was reached."""
        return any(path in layers for layers in self.layers)


def observe(
    module: nnx.Module,
    run: Callable[[], Any],
    *,
    hessians: bool,
    compute_dtype: Any = None,
    wanted: Callable[[str], bool] = lambda path: True,
    experts: ExpertTokens = "routed",
    given: Mapping[str, Array] = {},  # noqa: B006  not changed
    on_input: Callable[[Array], None] = lambda x: None,
) -> Observed:
    """Runs a model and keeps statistics of what its layers multiply.

    To be called under a trace that the module's arrays belong to: its layers' hooks are replaced, and
    stay so.

    Args:
      module: whose layers to watch; to be thrown away afterwards.
      run: calls the module.
      hessians: whether to take Hessians too.
      compute_dtype: what layers compute in; None: what they would.
      wanted: which layers to watch, by path.
      experts: which rows count, of layers that some of the rows are meant for.
      given: what some layers multiply in place of what they are handed, by path.
      on_input: called with each input that is watched, once for all its layers.

    Raises:
      ValueError: a layer is called twice, or multiplies a batch of weights.
    """
    seen: dict[tuple[int, int], _Seen] = {}
    for path, layer in nnx_layers.quantizable_layers(module):
        if isinstance(layer, nnx.Embed):
            continue
        watch = _Watch(path, layer, seen, hessians, experts, on_input) if wanted(path) else None
        hook = functools.partial(
            _promote, watch=watch, compute_dtype=compute_dtype, given=given.get(path)
        )
        setattr(layer, "promote_dtype", hook)  # noqa: B010  Flax declares it with a type of its own
    run()
    return Observed(
        layers=tuple(tuple(entry.paths) for entry in seen.values()),
        inputs=tuple(entry.found for entry in seen.values()),
        routed=tuple(entry.counted is not None for entry in seen.values()),
    )


def computed(module: nnx.Module, run: Callable[[], Any], *, compute_dtype: Any) -> Any:
    """What a model gives when its layers compute in another dtype; see :func:`observe`."""
    result = []
    observe(
        module,
        lambda: result.append(run()),
        hessians=False,
        compute_dtype=compute_dtype,
        wanted=lambda path: False,
    )
    return result[0]


def layers_by_input(module: nnx.Module, run: Callable[[], Any]) -> tuple[tuple[str, ...], ...]:
    """The layers of a model, those that are handed the same array together, in the order of their calls.

    A layer that is called more than once goes by its first call; one that is never called is not there.

    Args:
      module: as for :func:`observe`.
      run: calls the module.
    """
    seen: dict[int, tuple[Any, list[str]]] = {}
    called: set[str] = set()
    for path, layer in nnx_layers.quantizable_layers(module):
        if not isinstance(layer, nnx.Embed):
            hook = functools.partial(_note_input, path=path, seen=seen, called=called)
            setattr(layer, "promote_dtype", hook)  # noqa: B010  Flax declares it with a type of its own
    run()
    return tuple(tuple(paths) for _, paths in seen.values() if paths)


def merged(a: Observed | None, b: Observed) -> Observed:
    """What both saw of the same layers."""
    if a is None:
        return b
    return replace(a, inputs=_merged(a.inputs, b.inputs))


@jax.jit
def _merged(
    a: tuple[InputStatistics, ...], b: tuple[InputStatistics, ...]
) -> tuple[InputStatistics, ...]:
    return tuple(statistics.merged(x, y) for x, y in zip(a, b, strict=True))


@dataclass(frozen=True, kw_only=True)
class _Seen:
    x: Any  # the arrays are kept, so that their ids stay their own
    counted: Any
    paths: list[str]
    found: InputStatistics


@dataclass(frozen=True)
class _Watch:
    path: str
    layer: QuantizableLayer
    seen: dict[tuple[int, int], _Seen]
    hessians: bool
    experts: ExpertTokens
    on_input: Callable[[Array], None]

    def __call__(self, x: Num[Array, "..."]) -> None:
        if any(self.path in entry.paths for entry in self.seen.values()):
            raise ValueError(
                f"{self.path}: is called twice in one pass; calibration takes a layer's input once"
            )
        counted = _COUNTED.get() if self.experts == "routed" else None
        key = id(x), id(counted)
        if key in self.seen:
            self.seen[key].paths.append(self.path)
            return
        if all(x is not entry.x for entry in self.seen.values()):
            self.on_input(x)
        found = statistics.of_rows(
            nnx_layers.rows_of(self.layer, x),
            hessian=self.hessians,
            counted=None if counted is None else counted.reshape(-1),
        )
        self.seen[key] = _Seen(x=x, counted=counted, paths=[self.path], found=found)


def _promote(
    args: tuple[Any, ...],
    *,
    dtype: Any = None,
    inexact: bool = True,
    watch: _Watch | None,
    compute_dtype: Any,
    given: Any,
) -> tuple[Any, ...]:
    if given is not None:
        args = (given, *args[1:])
    if watch is not None:
        watch(args[0])
    return nnx_layers.promote(args, dtype=compute_dtype or dtype, inexact=inexact)


def _note_input(
    args: tuple[Any, ...],
    *,
    dtype: Any = None,
    inexact: bool = True,
    path: str,
    seen: dict[int, tuple[Any, list[str]]],
    called: set[str],
) -> tuple[Any, ...]:
    # The array is kept too, so that its id stays its own.
    _, paths = seen.setdefault(id(args[0]), (args[0], []))
    if path not in called:
        called.add(path)
        paths.append(path)
    return nnx_layers.promote(args, dtype=dtype, inexact=inexact)
