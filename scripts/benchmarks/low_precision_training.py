# SPDX-License-Identifier: Apache-2.0
"""What training in 8 and 16 bits costs in loss, and what it saves in time.

    python scripts/benchmarks/low_precision_training.py loss --tokens tokens.npy --steps 600 --seeds 2
    python scripts/benchmarks/low_precision_training.py step --layers 4 --batch 4

``loss``: the shipped model's configuration from scratch (scripts/shipped_model_training: network, Muon,
schedule, windows), the same seeds and tokens for each variant: bfloat16; FP8 with current and delayed
scaling, of all layers and of some; float16 with loss scaling; then Adam and Adam with 8-bit moments, both
in bfloat16. ``loss`` is the mean of the last 5 % of the steps; ``held_out`` that on 256 windows from
everywhere in the text that are kept out of training, both in the variant's own numbers; ``of_weights``
the last read in bfloat16. FP8 runs end twice, from a copy of their state before the last tenth of the
steps: ``ended_loss`` and ``ended_held_out`` are of the run that ends in bfloat16. TOKENS is one row of
uint16 or int32, such as `prepare` writes.

``step``: milliseconds of a whole train step of some Llama layers 4096 wide, in bfloat16 and FP8, and of
their matrix products alone: what is left bounds the gain. ``--size tiny`` runs either on any machine.
Prints one JSON object a line, as it is measured.
"""

import argparse
import collections
import datetime
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax

from qjax import Recipe, formats
from qjax.low_precision import (
    AmaxHistory,
    adamw_8bit,
    dynamic_loss_scaling,
    loss_scale,
    train_in_fp8,
)
from qjax_models import Decoder, DecoderConfig
from qjax_models.families import config_from_hf
from shipped_model_training.bits_per_byte import sum_of_nll
from shipped_model_training.network import initial_parameters, make_network, unstacked
from shipped_model_training.optimizer import make_optimizer, schedule_factor
from shipped_model_training.settings import ModelShape, TrainingSettings
from shipped_model_training.windows import training_windows

LOSSES = ("loss", "held_out", "of_weights", "ended_loss", "ended_held_out")
HELD_OUT_BATCHES = 4
PLAIN_END = 0.1  # share of the steps at the end of an FP8 run that are done in bfloat16, too
TINY_SHAPE = ModelShape(
    vocab_size=256, hidden_size=32, num_layers=3, mlp_size=64, num_heads=2, num_kv_heads=1, head_size=16
)  # fmt: skip
TINY_SETTINGS = TrainingSettings(
    batch_size=4, context=32, steps_per_dispatch=5, warmup_steps=10, compute_dtype="bfloat16"
)


# Layers left out of FP8: of a model with so many, and those that cost most beside the time they take.
ENDS = "model/layers/(0|{last})/.*"
VALUES_AND_OUTPUT = ".*/self_attn/(v|o)_proj"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One run of ``loss``.

    Attributes:
      name: in its row.
      baseline: the variant whose loss and bytes it is compared with.
      scaling: of FP8 products; None: in the computing dtype.
      plain: pattern of the layers that stay in the computing dtype beside FP8 ones.
      dtype: computing dtype.
      optimizer: muon, adam or adam-8bit.
      adam_rate: highest learning rate of the last two.
    """

    name: str
    baseline: str
    scaling: Any = None
    plain: str | None = None
    dtype: str = "bfloat16"
    optimizer: str = "muon"
    adam_rate: float = 1e-3


VARIANTS = (
    Variant(name="bf16", baseline="bf16"),
    Variant(name="fp8-current", baseline="bf16", scaling="current"),
    Variant(name="fp8-delayed", baseline="bf16", scaling="delayed"),
    Variant(name="fp8-current-plain-ends", baseline="bf16", scaling="current", plain=ENDS),
    Variant(
        name="fp8-current-plain-ov", baseline="bf16", scaling="current", plain=VALUES_AND_OUTPUT
    ),
    Variant(
        name="fp8-delayed-plain-ov", baseline="bf16", scaling="delayed", plain=VALUES_AND_OUTPUT
    ),
    Variant(name="fp16-loss-scaling", baseline="bf16", dtype="float16"),
    Variant(name="bf16-adam", baseline="bf16-adam", optimizer="adam"),
    Variant(name="bf16-adam-8bit", baseline="bf16-adam", optimizer="adam-8bit"),
)


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("loss", "step"))
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--tokens", help="loss: .npy of one row; random ones with --size tiny")
    parser.add_argument("--steps", type=int, default=1000, help="loss: of each variant")
    parser.add_argument(
        "--seeds", type=int, default=1, help="loss: how many, each a run of its own"
    )
    parser.add_argument("--adam-rate", type=float, default=1e-3, help="loss: Adam's highest (1e-3)")
    parser.add_argument("--only", nargs="+", choices=[v.name for v in VARIANTS])
    parser.add_argument("--layers", type=int, default=4, help="step")
    parser.add_argument("--batch", type=int, default=4, help="step: windows of --length tokens")
    parser.add_argument("--length", type=int, default=2048, help="step")
    parser.add_argument("--repeats", type=int, default=10, help="step")
    args = parser.parse_args()
    device = f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {datetime.date.today()}"
    print(json.dumps({"device": device}), flush=True)
    for row in losses(args) if args.what == "loss" else steps(args):
        print(json.dumps(row), flush=True)


def losses(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each variant."""
    full = args.size == "full"
    shape, settings = (ModelShape(), TrainingSettings()) if full else (TINY_SHAPE, TINY_SETTINGS)
    if args.tokens:
        tokens = np.load(args.tokens)
    elif full:
        raise SystemExit("loss needs --tokens FILE.npy")
    else:  # a text that can be learned: each token mostly follows from the one before
        rng = np.random.default_rng(0)
        tokens = np.cumsum(rng.integers(1, 3, 50_000)) % shape.vocab_size
    if tokens.ndim != 1 or tokens.max() >= shape.vocab_size:
        raise SystemExit(f"{args.tokens}: need one row of tokens below {shape.vocab_size}")
    if args.steps % settings.steps_per_dispatch:
        raise SystemExit(f"--steps: a multiple of {settings.steps_per_dispatch}, not {args.steps}")
    tokens = tokens.astype(np.uint16)
    rows: dict[str, dict[str, Any]] = {}
    for variant in VARIANTS:
        if args.only and variant.name not in args.only:
            continue
        variant = replace(variant, adam_rate=args.adam_rate)
        row = rows[variant.name] = trained(variant, shape, settings, tokens, args)
        if base := rows.get(variant.baseline):
            for name in (name for name in LOSSES if name in row):
                its = base[name.removeprefix("ended_")]
                ratios = [a / b for a, b in zip(row[name], its, strict=True)]
                row[f"{name}_ratio"] = round(statistics.mean(ratios), 5)
            row["bytes_ratio"] = round(row["optimizer_bytes"] / base["optimizer_bytes"], 4)
        yield row


def trained(
    variant: Variant, shape: ModelShape, settings: TrainingSettings, tokens: Any, args: Any
) -> dict[str, Any]:
    """Trains one variant from scratch, once for each seed; compiled once."""
    settings = replace(settings, compute_dtype=variant.dtype)
    windows, length = HELD_OUT_BATCHES * settings.batch_size, settings.context + 1
    tokens, held_out = _parted(tokens, windows, length)
    run = _Run(variant, shape, settings, tokens, args.steps)
    plain_end = _Run(replace(variant, scaling=None), shape, settings, tokens, args.steps)
    own_reading = _reading(variant, shape, settings, held_out)
    reading = _reading(VARIANTS[0], shape, replace(settings, compute_dtype="bfloat16"), held_out)
    found: dict[str, list[float]] = collections.defaultdict(list)
    start, last = time.perf_counter(), max(1, args.steps // 20)
    skipped = optimizer_bytes = 0
    at_once, fork = settings.steps_per_dispatch, args.steps
    if variant.scaling:
        fork -= max(at_once, round(PLAIN_END * args.steps / at_once) * at_once)
    for seed in map(jnp.int32, range(args.seeds)):
        state, losses = run.steps(run.begin(seed), seed, 0, fork)
        if variant.scaling:
            copied = jax.tree.map(jnp.copy, (state[0], nnx.State({}), state[2]))
            ended, its_losses = plain_end.steps(copied, seed, fork, args.steps)
            found["ended_loss"].append(float(its_losses[-last:].mean()))
            found["ended_held_out"].append(reading(ended))
            state, more = run.steps(state, seed, fork, args.steps)
            losses = np.concatenate([losses, more])
        found["loss"].append(float(losses[-last:].mean()))
        found["held_out"].append(own_reading(state))
        found["of_weights"].append(reading(state))
        skipped += int(state[2].skipped_steps) if variant.dtype == "float16" else 0
        optimizer_bytes = formats.device_bytes(state[2])
    return {
        "variant": variant.name,
        **{name: [round(loss, 5) for loss in losses] for name, losses in found.items()},
        "optimizer_bytes": optimizer_bytes,
        "skipped_steps": skipped,
        "tokens_per_second": round(
            settings.batch_size * settings.context / run.seconds_of_a_step()
        ),
        "seconds": round(time.perf_counter() - start, 1),
    }


def _parted(tokens: Any, windows: int, length: int) -> tuple[Any, Any]:
    """The text without some windows of it, from everywhere in it, and these, [windows, length]."""
    starts = np.linspace(0, len(tokens) - length, windows).astype(int)
    held_out = starts[:, None] + np.arange(length)
    return jnp.asarray(np.delete(tokens, held_out.ravel())), jnp.asarray(tokens[held_out])


class _Run:
    """The steps of a variant, compiled; a state is of parameters, histories and the optimizer."""

    def __init__(
        self,
        variant: Variant,
        shape: ModelShape,
        settings: TrainingSettings,
        tokens: Any,
        num_steps: int,
    ):
        optimizer, begin, loss_of = _parts(variant, shape, settings)
        self.begin = jax.jit(begin)
        self._at_once = settings.steps_per_dispatch
        self._seconds: list[float] = []

        def one_step(seed, state, step):
            params, histories, opt_state = state
            windows = training_windows(
                tokens, seed, step, settings.batch_size, settings.context + 1
            )
            scale = loss_scale(opt_state) if variant.dtype == "float16" else 1.0

            def scaled(params, histories):
                loss = loss_of(params, histories, windows)
                return loss * scale, loss

            (_, loss), (grads, histories) = jax.value_and_grad(scaled, (0, 1), has_aux=True)(
                params, histories
            )
            updates, opt_state = optimizer.update(grads, opt_state, params)
            factor = schedule_factor(step, num_steps, settings.warmup_steps)
            params = optax.apply_updates(params, jax.tree.map(lambda u: factor * u, updates))
            return (params, histories, opt_state), loss

        @functools.partial(jax.jit, donate_argnums=0)
        def dispatch(state, first, seed):
            steps = first + jnp.arange(self._at_once)
            return lax.scan(functools.partial(one_step, seed), state, steps)

        self._dispatch = dispatch

    def steps(self, state: Any, seed: Any, first: int, last: int) -> tuple[Any, np.ndarray]:
        """The state after the steps from first to last, and the losses in them."""
        found = []
        for step in range(first, last, self._at_once):
            before = time.perf_counter()
            state, losses = self._dispatch(state, jnp.int32(step), seed)
            found.append(np.asarray(losses))
            self._seconds.append(time.perf_counter() - before)
        return state, np.concatenate(found)

    def seconds_of_a_step(self) -> float:
        """Median, without the first dispatch, which compiles."""
        return statistics.median(self._seconds[1:] or self._seconds) / self._at_once


def _reading(
    variant: Variant, shape: ModelShape, settings: TrainingSettings, windows: Any
) -> Callable[[Any], float]:
    """What gives the loss of a state on windows that nothing is trained on, by a variant's products."""
    _, _, loss_of = _parts(variant, shape, settings)
    batches = windows.reshape(HELD_OUT_BATCHES, settings.batch_size, -1).astype(jnp.int32)

    @jax.jit
    def loss(params, histories):
        return jnp.mean(lax.map(lambda windows: loss_of(params, histories, windows), batches))

    without = nnx.State({})
    return lambda state: float(loss(state[0], state[1] if variant.scaling else without))


def _parts(
    variant: Variant, shape: ModelShape, settings: TrainingSettings
) -> tuple[optax.GradientTransformation, Callable[[Any], Any], Callable[..., Any]]:
    """The optimizer, what makes the state at the start, and the loss of parameters and histories."""
    network = make_network(shape.hf_config(), settings.compute_dtype, settings.attention)
    decoder = Decoder.abstract(
        config_from_hf(shape.hf_config()), jnp.float32, compute_dtype=settings.compute_dtype,
        attention=settings.attention,
    )  # fmt: skip
    _in_fp8(decoder, variant)
    graph, of_params, histories = nnx.split(decoder, nnx.Param, AmaxHistory)
    structure = jax.tree.structure(of_params)
    optimizer = {
        "muon": make_optimizer(settings),
        "adam": _clipped(optax.adam(variant.adam_rate, b2=0.95)),
        "adam-8bit": _clipped(adamw_8bit(variant.adam_rate, b2=0.95, weight_decay=0.0)),
    }[variant.optimizer]
    if variant.dtype == "float16":
        optimizer = dynamic_loss_scaling(optimizer, growth_interval=200)

    def begin(seed):
        parameters = initial_parameters(network, seed)
        return parameters, histories, optimizer.init(parameters)

    def loss_of(parameters, histories, windows):
        leaves = list(unstacked(network, parameters).values())
        model = nnx.merge(graph, jax.tree.unflatten(structure, leaves), histories)
        inputs, targets = windows[:, :-1], windows[:, 1:]
        return sum_of_nll(model(inputs), targets) / targets.size

    return optimizer, begin, loss_of


def _in_fp8(decoder: Decoder, variant: Variant) -> None:
    """Puts a variant's products into the layers of a decoder."""
    if variant.scaling:
        plain = variant.plain and variant.plain.format(last=decoder.config.num_layers - 1)
        rules = [[plain, None]] if plain else []
        recipe = Recipe.from_json([*rules, [".*", "fp8-dynamic"]])
        train_in_fp8(decoder, scaling=variant.scaling, recipe=recipe)


def _clipped(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """As language models are trained: without it seeds end so far apart that they tell nothing."""
    return optax.chain(optax.clip_by_global_norm(1.0), inner)


def steps(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each kind of step, for the products alone, and the conclusion."""
    full = args.size == "full"
    config = DecoderConfig(
        vocab_size=4096, hidden_size=4096, mlp_size=14336, num_layers=args.layers, num_heads=32,
        num_kv_heads=8, head_size=128, max_positions=args.length,
    ) if full else DecoderConfig(
        vocab_size=64, hidden_size=64, mlp_size=96, num_layers=3, num_heads=4, num_kv_heads=2,
        head_size=16, max_positions=args.length,
    )  # fmt: skip
    ms: dict[str, float] = {}
    for variant in (VARIANTS[0], *(v for v in VARIANTS if v.scaling)):
        name = variant.name
        ms[name] = _step_ms(config, variant, args)
        yield {"step": name, "ms": ms[name], "faster": round(ms["bf16"] / ms[name], 3)}
    for name in ("bf16", "fp8"):
        ms[f"products {name}"] = _products_ms(config, name, args)
        yield {"products_alone": name, "ms": ms[f"products {name}"]}
    of_products = ms["products bf16"] / ms["bf16"]
    left = ms["bf16"] - ms["products bf16"] + ms["products fp8"]
    yield {
        "tokens": args.batch * args.length, "layers": config.num_layers,
        "share_of_bf16_step_in_products": round(of_products, 3),
        "products_faster": round(ms["products bf16"] / ms["products fp8"], 3),
        "bound_if_quantizing_were_free": round(ms["bf16"] / left, 3),
        "quantizing_ms_current": round(ms["fp8-current"] - left, 2),
        "quantizing_ms_delayed": round(ms["fp8-delayed"] - left, 2),
    }  # fmt: skip


def _step_ms(config: DecoderConfig, variant: Variant, args: argparse.Namespace) -> float:
    decoder = Decoder(config, dtype=jnp.float32, compute_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    _in_fp8(decoder, variant)
    graph, params, histories = nnx.split(decoder, nnx.Param, AmaxHistory)
    optimizer = optax.adamw(1e-4)
    tokens = jax.random.randint(
        jax.random.key(1), (args.batch, args.length + 1), 0, config.vocab_size
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params, histories, opt_state):
        def loss_of(params, histories):
            logits = nnx.merge(graph, params, histories)(tokens[:, :-1])
            return sum_of_nll(logits, tokens[:, 1:]) / tokens[:, 1:].size

        grads, histories = jax.grad(loss_of, (0, 1))(params, histories)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), histories, opt_state

    state = params, histories, optimizer.init(params)
    for _ in range(2):
        state = step(*state)
    jax.block_until_ready(state)
    start = time.perf_counter()
    for _ in range(args.repeats):
        state = step(*state)
    jax.block_until_ready(state)
    return round(1e3 * (time.perf_counter() - start) / args.repeats, 3)


def _products_ms(config: DecoderConfig, name: str, args: argparse.Namespace) -> float:
    """Milliseconds of the three products of every linear layer, from operands that lie ready."""
    d, f = config.hidden_size, config.mlp_size
    q, kv = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    shapes = [(d, q), (d, kv), (d, kv), (q, d), (d, f), (d, f), (f, d)]
    m, total = args.batch * args.length, 0.0
    operand, gradient = (
        (jnp.float8_e4m3fn, jnp.float8_e5m2) if name == "fp8" else (jnp.bfloat16, jnp.bfloat16)
    )
    product = functools.partial(lax.dot_general, preferred_element_type=jnp.bfloat16)

    @jax.jit
    def three(x, w, g):
        return (
            product(x, w, (((1,), (0,)), ((), ()))),
            product(g, w, (((1,), (1,)), ((), ())), precision="highest" if name == "fp8" else None),
            product(x, g, (((0,), (0,)), ((), ())), precision="highest" if name == "fp8" else None),
        )

    for k, n in sorted(set(shapes)):
        keys = jax.random.split(jax.random.key(0), 3)
        x, w, g = (
            jax.random.normal(key, shape, jnp.bfloat16).astype(dtype)
            for key, shape, dtype in zip(
                keys, ((m, k), (k, n), (m, n)), (operand, operand, gradient), strict=True
            )
        )
        jax.block_until_ready(three(x, w, g))
        start = time.perf_counter()
        jax.block_until_ready([three(x, w, g) for _ in range(args.repeats)])
        total += shapes.count((k, n)) * (time.perf_counter() - start) / args.repeats
    return round(1e3 * config.num_layers * total, 3)


if __name__ == "__main__":
    main()
