# SPDX-License-Identifier: Apache-2.0
"""Quantization-aware training of a language model, one step at a time.

A step is a pure function of a :class:`State` and a batch of windows: Adam, under rates that rise over the
first steps and fall to nothing with a cosine. They are relative: a parameter moves by a share of its
array's root mean square, a learned scale by a share of its size. Then, for every weight ``w`` of a layer
that is going to be quantized, ``w'`` being what it will be worth and ``t`` of ``T`` steps done,

    w <- clip(w, just inside the ends of its grid)
    w <- w + dampening * (t / T)**2 * (w' - w)

The first line is there because LSQ gives what lies at an end no gradient, and with four codes a third of
all weights lie there. (BinaryConnect keeps its weights within their two codes the same way.) The second
ends what Nagel and others describe: a weight whose best value lies between two codes swings from one to
the other, and where it stops is chance. They add ``|w' - w|**2`` to the loss, with a growing factor; here
its step is taken beside Adam's, as decoupled weight decay is, so that Adam does not rescale it.

References:
  Courbariaux, Bengio, David, BinaryConnect, NeurIPS 2015, https://arxiv.org/abs/1511.00363.
  Loshchilov, Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, ICLR 2017,
  https://arxiv.org/abs/1608.03983.
  Nagel, Fournarakis, Bondarenko, Blankevoort, Overcoming Oscillations in Quantization-Aware Training,
  ICML 2022, https://arxiv.org/abs/2203.11086.
  Shazeer, Stern, Adafactor (relative step sizes), ICML 2018, https://arxiv.org/abs/1804.04235.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from qjax import nnx_layers, tiles
from qjax.qat import form, language_model, lsq
from qjax.qat.fake_quantizer import FakeQuantizer, LearnedScale

_INSIDE = 0.01  # of the way between two codes: how far inside its grid a weight is kept
# Sizes below which steps no longer shrink with a parameter or a scale: zeros have to move, too.
_LEAST_SIZE, _LEAST_SCALE = 1e-3, 1e-12


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a model is trained; a run is a function of these, the model, the teacher and the windows.

    Attributes:
      steps: optimizer steps, at least 1.
      batch: windows of a step.
      rate: highest rate of weights, norms and embeddings, as a share of the root mean square of each
        array. The fewer the bits, the higher it wants to be.
      scale_rate: highest rate of learned scales, as a share of their size.
      dampening: share of its way to a code that a weight is drawn there in the last step.
      warmup: steps over which rates rise; of a short run its first tenth.
      distillation: share of the teacher in the loss, in [0, 1]; needs one if above 0.
      clip: longest gradient, in its global norm.
      seed: of the order of windows.
    """

    steps: int
    batch: int = 16
    rate: float = 4e-3
    scale_rate: float = 5e-5
    dampening: float = 0.01
    warmup: int = 20
    distillation: float = 1.0
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self):  # noqa: D105
        if self.steps < 1 or self.batch < 1 or self.warmup < 0 or self.seed < 0:
            raise ValueError(
                f"need steps and a batch of 1 or more, no negative warmup or seed; got {self}"
            )
        if not 0 <= self.distillation <= 1:
            raise ValueError(f"distillation is a share in [0, 1], got {self.distillation=}")
        if not 0 <= self.dampening <= 1:
            raise ValueError(f"dampening is a share in [0, 1], got {self.dampening=}")
        if min(self.rate, self.scale_rate, self.clip) <= 0:
            raise ValueError(f"rates and the clip are positive, got {self}")


class State(NamedTuple):
    """All that changes in training; a pytree of arrays.

    Attributes:
      parameters: of the model: those of learned scales, and all others.
      optimizer: its state.
      step: how many steps have been taken.
    """

    parameters: dict[str, Any]
    optimizer: Any
    step: Int[Array, ""]


class Trainer:
    """A model that trains with fake quantization, its teacher and the settings.

    Args:
      model: with the hooks of :func:`qjax.fake_quant` or :func:`qjax.trainable`; from tokens to logits.
      settings: how to train it.
      teacher: gives the distributions to learn; None: the text alone does.

    Raises:
      ValueError: the settings want a teacher and there is none, or the model trains no layer with fake
        quantization.
    """

    def __init__(
        self,
        model: nnx.Module,
        settings: Settings,
        teacher: Callable[[Int[Array, "B T"]], Float[Array, "B T V"]] | None = None,
    ):
        if settings.distillation and teacher is None:
            raise ValueError(f"{settings.distillation=} needs a teacher")
        if not any(_hooked(model)):
            raise ValueError(
                "no layer of the model trains with fake quantization: qjax.fake_quant first"
            )
        self.settings = settings
        graphdef, scales, others, rest = nnx.split(model, LearnedScale, nnx.Param, ...)
        self._graphdef, self._rest = graphdef, rest
        self._first = {"scales": scales, "others": others}
        self._teacher = nnx.split(teacher) if isinstance(teacher, nnx.Module) else None
        self._optimizer = optimizer(settings)

    def start(self) -> State:
        """The state before the first step."""
        # Copies: a step gives its state's buffers up, and the teacher may share some.
        first = jax.tree.map(jnp.copy, self._first)
        return State(first, self._optimizer.init(first), jnp.int32(0))

    def step(self, state: State, tokens: Int[np.ndarray, "B T"]) -> tuple[State, Float[Array, ""]]:
        """One step.

        Args:
          state: given up: its buffers become the result's.
          tokens: windows; :func:`qjax.qat.windows.batch` chooses them.

        Returns:
          The new state, and the loss before it.
        """
        return _step(
            state, jnp.asarray(tokens), self._rest, self._teacher_state, graphdef=self._graphdef,
            teacher=self._teacher_graph, settings=self.settings,
        )  # fmt: skip

    def model(self, state: State) -> Any:
        """The model with the parameters of a state."""
        return nnx.merge(
            self._graphdef, state.parameters["scales"], state.parameters["others"], self._rest
        )

    @property
    def _teacher_graph(self) -> Any:
        return None if self._teacher is None else self._teacher[0]

    @property
    def _teacher_state(self) -> Any:
        return None if self._teacher is None else self._teacher[1]


def optimizer(settings: Settings) -> optax.GradientTransformation:
    """Adam over ``{"scales": ..., "others": ...}``, with the rates of the module's docstring."""
    warmup = min(settings.warmup, settings.steps // 10)

    def rate(peak: float) -> optax.Schedule:
        return optax.warmup_cosine_decay_schedule(peak / (warmup + 1), peak, warmup, settings.steps)

    def relative_adam(peak: float, least: float) -> optax.GradientTransformation:
        return optax.chain(
            optax.scale_by_adam(b2=0.99),
            optax.scale_by_param_block_rms(least),
            optax.scale_by_learning_rate(rate(peak)),
        )

    return optax.chain(
        optax.clip_by_global_norm(settings.clip),
        optax.partition(
            {
                "others": relative_adam(settings.rate, _LEAST_SIZE),
                "scales": relative_adam(settings.scale_rate, _LEAST_SCALE),
            },
            {"scales": "scales", "others": "others"},
        ),
    )


def put_inside(model: nnx.Module) -> None:
    """Moves weights beyond the ends of a grid of their own to just inside it, in place."""
    for layer, hook in _hooked(model):
        grid, held = hook.grid, hook.form
        if grid is None:
            continue
        variable = nnx_layers.variable_of(layer)
        w, fmt, tile = variable.get_value(), held.scheme.weights.format, held.tile
        factors, zeros = lsq.in_use(grid, fmt, held.scale_dtype)
        step = tiles.spread(factors, tile, held.shape)
        zero = 0.0 if zeros is None else tiles.spread(zeros, tile, held.shape)
        low, high = (fmt.low + _INSIDE - zero) * step, (fmt.high - _INSIDE - zero) * step
        variable.set_value(jnp.clip(w, low, high).astype(w.dtype))


def dampen(model: nnx.Module, share: Float[Array, ""] | float) -> None:
    """Moves weights a share of the way to what they will be worth once quantized, in place."""
    for layer, hook in _hooked(model):
        variable = nnx_layers.variable_of(layer)
        w = variable.get_value()
        worth = form.fake_quantize(w, hook.form, hook.grid)
        variable.set_value(w + jnp.asarray(share, w.dtype) * (worth - w))


def _hooked(model: nnx.Module):
    """The layers of a model that train with fake quantization, each weight once, and their hooks."""
    seen = set()
    for _, layer in nnx_layers.quantizable_layers(model):
        hook, variable = layer.promote_dtype, nnx_layers.variable_of(layer)
        if isinstance(hook, FakeQuantizer) and id(variable) not in seen:
            seen.add(id(variable))
            yield layer, hook


@functools.partial(
    jax.jit, static_argnames=("graphdef", "teacher", "settings"), donate_argnames="state"
)
def _step(
    state: State, tokens: Int[Array, "B T"], rest: Any, teacher_state: Any, *, graphdef: Any,
    teacher: Any, settings: Settings,
) -> tuple[State, Float[Array, ""]]:  # fmt: skip
    share = settings.distillation
    targets = nnx.merge(teacher, teacher_state)(tokens) if share else jnp.zeros(())

    def model_of(parameters: Any) -> Any:
        return nnx.merge(graphdef, parameters["scales"], parameters["others"], rest)

    def loss(parameters: dict[str, Any]) -> Float[Array, ""]:
        logits = model_of(parameters)(tokens)
        learned = language_model.distillation_loss(logits, targets) if share else jnp.zeros(())
        read = language_model.cross_entropy(logits, tokens) if share < 1 else jnp.zeros(())
        return share * learned + (1 - share) * read

    value, gradients = jax.value_and_grad(loss)(state.parameters)
    updates, optimizer_state = optimizer(settings).update(
        gradients, state.optimizer, state.parameters
    )
    moved = model_of(optax.apply_updates(state.parameters, updates))
    put_inside(moved)
    dampen(moved, settings.dampening * jnp.square(state.step / settings.steps))
    _, scales, others, _ = nnx.split(moved, LearnedScale, nnx.Param, ...)
    return State({"scales": scales, "others": others}, optimizer_state, state.step + 1), value
