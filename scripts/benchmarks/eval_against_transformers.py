# SPDX-License-Identifier: Apache-2.0
"""`qjax eval` against transformers on one machine: whole processes, the same model and tokens.

    python scripts/benchmarks/eval_against_transformers.py --windows 128 --length 1024

Needs torch and transformers. Both compute in float32 from a bfloat16 model of 14 million parameters
with random weights, and both report the perplexity, which must agree to four digits.
"""

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

# Run by its own process, so that neither side pays for the other's imports.
_PEER = """
import json, math, sys, numpy as np, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
tokens = torch.from_numpy(np.load(sys.argv[2])).long()
total = 0.0
with torch.inference_mode():
    for batch in tokens.split(int(sys.argv[3])):
        logits = model(batch).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), batch[:, 1:].reshape(-1), reduction="sum")
        total += loss.double().item()
print(json.dumps({"perplexity": math.exp(total / (tokens.shape[0] * (tokens.shape[1] - 1)))}))
"""

_MAKE = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
config = LlamaConfig(vocab_size=8192, hidden_size=384, intermediate_size=1024, num_hidden_layers=5,
                     num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=2048,
                     tie_word_embeddings=False, initializer_range=0.1)
model = LlamaForCausalLM(config).to(torch.bfloat16)
model.save_pretrained(sys.argv[1])
print(sum(p.numel() for p in model.parameters()))
"""


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--peer-batch", type=int, default=4, help="windows at once in transformers")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, tokens = Path(folder, "model"), Path(folder, "tokens.npy")
        parameters = int(_run([sys.executable, "-c", _MAKE, model])[0])
        shape = args.windows, args.length
        np.save(tokens, np.random.default_rng(0).integers(0, 8192, shape).astype(np.int32))
        ours, our_seconds = _run(
            [sys.executable, "-m", "qjax_cli.main", "eval", model, "--tokens", tokens, "--json"]
        )
        theirs, their_seconds = _run(
            [sys.executable, "-c", _PEER, model, tokens, str(args.peer_batch)]
        )
    result = {
        "parameters": parameters,
        "tokens": list(shape),
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
        "qjax": {"perplexity": json.loads(ours)["perplexity"], "process_seconds": our_seconds},
        "transformers": {**json.loads(theirs), "process_seconds": their_seconds},
        "time_ratio": our_seconds / their_seconds,
    }
    print(json.dumps(result, indent=2))


def _run(command: list[object]) -> tuple[str, float]:
    start = time.perf_counter()
    done = subprocess.run(list(map(str, command)), check=True, text=True, stdout=subprocess.PIPE)
    return done.stdout.strip().splitlines()[-1], time.perf_counter() - start


if __name__ == "__main__":
    main()
