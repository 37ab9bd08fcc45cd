# SPDX-License-Identifier: Apache-2.0
"""How fast rounding to nearest runs: megabytes of bfloat16 weights a second, whole model.

    python scripts/benchmarks/quantize_speed.py --scheme w4a16-g128

Times `qjax.quantize_model`, report included, on random weights in the shape of a decoder, once with
compilation and then without.
"""

import argparse
import datetime
import json
import statistics
import time

import jax
import jax.numpy as jnp
from flax import nnx

import qjax
from qjax_models import Decoder, DecoderConfig


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scheme", default="w4a16-g128")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    config = DecoderConfig(
        vocab_size=512, hidden_size=2048, mlp_size=5632, num_layers=args.layers, num_heads=16,
        num_kv_heads=8, head_size=128, max_positions=1024,
    )  # fmt: skip
    model = Decoder(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    runs = [_timed(model, args.scheme) for _ in range(1 + args.repeats)]
    megabytes = sum(layer.bytes_before for layer in runs[0][1].quantized) / 1e6
    first, *warm = (seconds for seconds, _ in runs)
    result = {
        "scheme": args.scheme,
        "device": f"{jax.devices()[0].device_kind} ({jax.default_backend()})",
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
        "megabytes": megabytes,
        "mb_per_s": megabytes / statistics.median(warm),
        "mb_per_s_spread": [megabytes / max(warm), megabytes / min(warm)],
        "mb_per_s_with_compilation": megabytes / first,
    }
    print(json.dumps(result, indent=2))


def _timed(model: Decoder, scheme: str) -> tuple[float, qjax.QuantizationReport]:
    start = time.perf_counter()
    quantized, report = qjax.quantize_model(model, scheme)
    jax.block_until_ready(nnx.state(quantized))
    return time.perf_counter() - start, report


if __name__ == "__main__":
    main()
