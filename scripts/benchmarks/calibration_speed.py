# SPDX-License-Identifier: Apache-2.0
"""Seconds of GPTQ and AWQ of a model of 14 million weights on this machine, beside llm-compressor's.

    python scripts/benchmarks/calibration_speed.py

A Llama of random weights in bfloat16 and 128 x 1024 random tokens; w4a16-g128, the methods' defaults.
Each run is a process of its own, `qjax quantize` or llm-compressor (which needs the extra `interop`),
from the directory to the directory, start and compilation included. Run it alone.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qjax_checkpoints import shipped
from qjax_checkpoints.checkpoint import Checkpoint
from qjax_checkpoints.save import save
from qjax_models import Decoder, config_from_hf

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 4096,
    "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 7, "num_attention_heads": 6,
    "num_key_value_heads": 6, "head_dim": 64, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_PEER = Path(__file__).with_name("llm_compressor.py")


def main() -> None:
    """Prints a line of JSON for each method."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--method", nargs="+", choices=("gptq", "awq"), default=["gptq", "awq"])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"])
    parser.add_argument("--true-sequential", action="store_true", help="ours so")
    parser.add_argument("--no-peer", action="store_true", help="ours alone")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, tokens = folder / "model", folder / "tokens.npy"
        write_model(model, args.layers)
        shape = args.samples, args.length
        np.save(tokens, np.random.default_rng(0).integers(0, CONFIG["vocab_size"], shape, np.int32))
        for method in args.method:
            ours = [
                *(
                    sys.executable,
                    "-m",
                    "qjax_cli.main",
                    "quantize",
                    model,
                    folder / f"ours-{method}",
                ),
                *("--scheme", "w4a16-g128", "--method", method, "--calib", tokens),
                *("--samples", args.samples, "--seq-len", args.length),
                *(("--true-sequential",) if args.true_sequential else ()),
            ]
            theirs = [sys.executable, _PEER, model, "w4a16-g128", method, tokens, folder / method]
            row = {"method": method, "layers": args.layers, "qjax": timed(ours, folder)}
            if not args.no_peer:
                row["llm_compressor"] = timed(theirs, folder)
                row["ratio"] = round(row["llm_compressor"] / row["qjax"], 2)
            print(json.dumps(row), flush=True)
    machine = f"{os.cpu_count()} CPU cores, jax {jax.__version__}, {datetime.date.today()}"
    print(json.dumps({"machine": machine}))


def write_model(path: Path, layers: int) -> None:
    """A directory of random weights, with the tokenizer of the model that ships with qjax."""
    config = CONFIG | {"num_hidden_layers": layers}
    model = Decoder(config_from_hf(config), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    source = shipped.model_path()
    save(model, Checkpoint(model=model, config=config, path=source, kind="plain"), path, "dense")


def timed(command: list[object], folder: Path) -> float:
    """Seconds of a process that must end well."""
    start = time.perf_counter()
    done = subprocess.run(
        list(map(str, command)), cwd=folder, text=True, capture_output=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{command} failed: {done.stderr[-2000:]}")
    return round(time.perf_counter() - start, 1)


if __name__ == "__main__":
    main()
