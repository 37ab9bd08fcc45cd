# SPDX-License-Identifier: Apache-2.0
"""What fake quantization costs: the time of a train step with it, against the same step without.

    python scripts/benchmarks/fake_quantization_speed.py --hidden 2048 --layers 4 --batch 8 --length 1024

A Llama of random weights in float32 that computes in bfloat16 (float32 on a CPU), next-token loss, Adam.
``follows``: scales follow the weights; ``learned``: LSQ. Medians of the repeats. Prints one JSON object a
line, as it is measured.
"""

import argparse
import datetime
import functools
import json
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

import qjax
from qjax.qat.language_model import cross_entropy
from qjax_models import Decoder, DecoderConfig


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--schemes", nargs="+", default=["w4a16-g128", "w4a8"])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    device = f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {datetime.date.today()}"
    print(json.dumps({"device": device, **vars(args)}), flush=True)
    model = network(args)
    plain = milliseconds(model, args)
    print(json.dumps({"scheme": "none", "ms": plain}), flush=True)
    for scheme in args.schemes:
        forms = {
            "follows": lambda scheme=scheme: qjax.fake_quant(model, scheme, dtype=jnp.bfloat16),
            "learned": lambda scheme=scheme: qjax.trainable(qjax.quantize_model(model, scheme)[0]),
        }
        for scales, made in forms.items():
            taken = milliseconds(made(), args)
            row = {"scheme": scheme, "scales": scales, "ms": taken, "ratio": taken / plain}
            print(json.dumps(row), flush=True)


def network(args: argparse.Namespace) -> Decoder:
    """A Llama of the sizes asked for."""
    config = DecoderConfig(
        vocab_size=args.vocabulary, hidden_size=args.hidden, mlp_size=128 * round(args.hidden * 11 / 512),
        num_layers=args.layers, num_heads=args.hidden // 64, num_kv_heads=args.hidden // 256,
        head_size=64, max_positions=args.length,
    )  # fmt: skip
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return Decoder(config, dtype=jnp.float32, compute_dtype=dtype, rngs=nnx.Rngs(0))


def milliseconds(model: nnx.Module, args: argparse.Namespace) -> float:
    """The median time of a step, after two that compile and warm up."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    params = jax.tree.map(jnp.copy, params)  # a step gives its buffers up
    state = optax.adam(1e-4).init(params)
    shape = args.batch, args.length
    tokens = jax.random.randint(jax.random.key(0), shape, 0, args.vocabulary)
    times = []
    for _ in range(args.repeats + 2):
        begun = time.perf_counter()
        params, state, loss = _step(params, state, rest, tokens, graphdef=graphdef)
        loss.block_until_ready()
        times.append(1000 * (time.perf_counter() - begun))
    return statistics.median(times[2:])


@functools.partial(jax.jit, static_argnames="graphdef", donate_argnums=(0, 1))
def _step(
    params: Any, state: Any, rest: Any, tokens: Int[Array, "B T"], *, graphdef: Any
) -> tuple[Any, Any, Float[Array, ""]]:
    def loss(params: Any) -> Float[Array, ""]:
        return cross_entropy(nnx.merge(graphdef, params, rest)(tokens), tokens)

    value, gradients = jax.value_and_grad(loss)(params)
    updates, state = optax.adam(1e-4).update(gradients, state, params)
    return optax.apply_updates(params, updates), state, value


if __name__ == "__main__":
    main()
