# SPDX-License-Identifier: Apache-2.0
"""What a step of QLoRA takes: memory, tokens a second and loss, of a Llama of random weights.

    python scripts/benchmarks/qlora_memory.py
    python scripts/benchmarks/qlora_memory.py --layers 2 --hidden 256 --mlp 512 --vocab 1000 --length 64

The model has 8 billion parameters unless told otherwise. Each projection is drawn in bfloat16, quantized
and forgotten before the next one is drawn. Beside all projections come adapters of rank 16, which Adam
trains on random tokens, the same at every step, so that the loss falls if training works. The blocks are
stacked and scanned over, which compiles one instead of all. In bytes:

    projections   32 layers of 218,103,808 weights, 4.25 bits each (nf4-g64)          3.71e9
    token table and output head, bfloat16                                             2.10e9
    adapters: 41,943,040 numbers in float32, their gradients, Adam's two moments      0.67e9
    input of each block, kept for the backward pass: 32 x [4096, 4096] bfloat16       1.07e9
    inside of one block, computed again: some 25 arrays [4096, 14336] or [4096, 4096] 1.5e9
    one weight at a time, dequantized on the way through float32                      0.4e9
    logits of 512 positions and their gradient, float32                               0.6e9

which is 10.1e9. XLA's own plan is printed too (`plan_gb`: arguments, and what it sets aside); for an H200
(compiled without one, jax 0.11.2, `batched` attention) it is 6.31e9 and 2.73e9.
Prints one JSON object a line, as it is measured.
"""

import argparse
import datetime
import json
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

import qjax
from qjax import nnx_layers
from qjax.lora import add_lora
from qjax_checkpoints.parameters import place
from qjax_models import Decoder, DecoderConfig
from qjax_models.next_token_loss import loss_of_features

GB = 1e9


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    for name, value in (
        ("layers", 32), ("hidden", 4096), ("mlp", 14336), ("vocab", 128256), ("heads", 32),
        ("kv-heads", 8), ("batch", 4), ("length", 1024), ("rank", 16), ("steps", 10),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--scheme", default="nf4-g64")
    parser.add_argument(
        "--attention", choices=("auto", "by_row", "batched", "cudnn"), default="auto"
    )
    args = parser.parse_args()
    device = f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {datetime.date.today()}"
    print(json.dumps({"device": device}), flush=True)
    start = time.perf_counter()
    model = add_lora(quantized(args), args.rank, alpha=32.0)
    structure, blocks = taken_out(model)
    seconds = round(time.perf_counter() - start, 1)
    print(json.dumps({"made": memory(), "seconds": seconds}), flush=True)
    for line in training(model, structure, blocks, args):
        print(json.dumps(line), flush=True)


def quantized(args: argparse.Namespace) -> Decoder:
    """The base: projections in few bits, all else in bfloat16."""
    config = DecoderConfig(
        vocab_size=args.vocab, hidden_size=args.hidden, mlp_size=args.mlp, num_layers=args.layers,
        num_heads=args.heads, num_kv_heads=args.kv_heads, head_size=args.hidden // args.heads,
        max_positions=8192,
    )  # fmt: skip
    model = Decoder.abstract(config, jnp.bfloat16, attention=args.attention)
    recipe = qjax.Recipe.uniform(args.scheme)
    keys = iter(jax.random.split(jax.random.key(0), 8 * args.layers + 2))
    for path, layer in nnx_layers.quantizable_layers(model):
        variable = nnx_layers.variable_of(layer)
        w = _random(next(keys), variable.get_value().shape)
        scheme = recipe.rule_for(path)
        if scheme is None or scheme.scheme is None:
            variable.set_value(w)
        else:
            place(layer, variable, jax.block_until_ready(qjax.quantize(w, scheme.scheme)))
    for variable in nnx_layers.named_variables(model).values():
        if isinstance(variable.get_value(), jax.ShapeDtypeStruct):  # a norm
            variable.set_value(jnp.ones(variable.get_value().shape, jnp.bfloat16))
    return model


@jax.jit(static_argnums=1)
def _random(key: Any, shape: tuple[int, ...]) -> Any:
    return 0.02 * jax.random.normal(key, shape, jnp.bfloat16)


def taken_out(model: Decoder) -> tuple[Any, nnx.State]:
    """A model's blocks in one stack: their structure and their state; the model has none then."""
    graphdefs, states = zip(*map(nnx.split, model.model.layers), strict=True)
    model.model.layers = nnx.List([])
    structure = jax.tree.structure(states[0])
    leaves = [list(same) for same in zip(*map(jax.tree.leaves, states), strict=True)]
    del states
    for number, same in enumerate(leaves):  # one after the other, so that little is there twice
        leaves[number] = jax.block_until_ready(jnp.stack(same))
    return graphdefs[0], jax.tree.unflatten(structure, leaves)


def loss_of(
    model: Decoder, structure: Any, blocks: nnx.State, tokens: Int[Array, "B T"]
) -> Float[Array, ""]:
    """The loss of a model whose blocks are in a stack."""
    positions = jnp.arange(tokens.shape[1])[None]
    angles, _ = model.model.rotations(positions, tokens.shape[1])

    @jax.checkpoint
    def run(x: Any, block: nnx.State) -> Any:
        return nnx.merge(structure, block)(x, angles, positions)[0], None

    x, _ = qjax.scan_layers(run, model.model.embed(tokens), blocks)
    return loss_of_features(model, model.model.norm(x), tokens)


def training(
    model: Decoder, structure: Any, blocks: nnx.State, args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Yields what compilation and each step took."""
    factors, frozen = nnx.split_state(blocks, nnx.LoRAParam, ...)
    graphdef, rest = nnx.split(model)
    tx = optax.adam(1e-3)
    moments = jax.jit(tx.init)(factors)
    shape = args.batch, args.length
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, args.vocab, shape, np.int32))

    def step(factors: Any, moments: Any, frozen: Any, rest: Any, tokens: Any) -> Any:
        def loss(factors: Any) -> Any:
            whole = nnx.merge_state(factors, frozen)
            return loss_of(nnx.merge(graphdef, rest), structure, whole, tokens)

        value, gradients = jax.value_and_grad(loss)(factors)
        updates, moments = tx.update(gradients, moments)
        return optax.apply_updates(factors, updates), moments, value

    start = time.perf_counter()
    arguments = factors, moments, frozen, rest, tokens
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile()
    analysis: Any = compiled.memory_analysis()
    yield {
        "compile_seconds": round(time.perf_counter() - start, 1),
        "plan_gb": {
            "arguments": round(analysis.argument_size_in_bytes / GB, 3),
            "temporary": round(analysis.temp_size_in_bytes / GB, 3),
        },
    }
    del arguments  # which are given away
    for number in range(args.steps):
        start = time.perf_counter()
        factors, moments, loss = compiled(factors, moments, frozen, rest, tokens)
        value = float(loss)
        seconds = time.perf_counter() - start
        yield {
            "step": number, "loss": round(value, 4), "seconds": round(seconds, 3),
            "tokens_per_second": round(tokens.size / seconds), **memory(),
        }  # fmt: skip


def memory() -> dict[str, float]:
    """The most bytes in use so far, where the device says so."""
    stats = jax.devices()[0].memory_stats() or {}
    return {"peak_gb": round(stats["peak_bytes_in_use"] / GB, 3)} if stats else {}


if __name__ == "__main__":
    main()
