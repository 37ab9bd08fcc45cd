# SPDX-License-Identifier: Apache-2.0
"""Quantizes a model with llm-compressor, for benchmarks that stand beside it. Needs the extra `interop`.

python scripts/benchmarks/llm_compressor.py MODEL w4a16-g128 gptq TOKENS.npy OUT
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from llmcompressor.entrypoints.oneshot import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache


def main() -> None:
    """Runs one method on a CPU, in the order of the tokens, and writes compressed-tensors."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("scheme", help="w4a16-g128, w3a16-g128, ..., -asym; w8a8 for smoothquant")
    parser.add_argument("method", choices=("gptq", "awq", "smoothquant"))
    parser.add_argument("tokens", type=Path, help="int32 [n, length]")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    IntermediatesCache.pin_memory = lambda self, *args, **options: None  # asks for an accelerator
    tokens = np.load(args.tokens)
    columns = {"input_ids": tokens.tolist(), "attention_mask": np.ones_like(tokens).tolist()}
    oneshot(
        model=str(args.model),
        recipe=_recipe(args.scheme, args.method),
        output_dir=str(args.out),
        dataset=Dataset.from_dict(columns),
        num_calibration_samples=len(tokens),
        max_seq_length=tokens.shape[1],
        batch_size=1,
        shuffle_calibration_samples=False,
    )


def _recipe(scheme: str, method: str) -> list[Any]:
    """The modifiers with the options that are the package's own defaults."""
    ignore = ["lm_head"]
    if method == "smoothquant":
        weights = QuantizationModifier(targets="Linear", scheme="W8A8", ignore=ignore)
        return [SmoothQuantModifier(smoothing_strength=0.8), weights]
    weights = {
        "num_bits": int(scheme[1]), "type": "int", "symmetric": "asym" not in scheme,
        "strategy": "group", "group_size": 128, "dynamic": False,
    }  # fmt: skip
    held: dict[str, Any] = {
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ignore,
    }
    if method == "gptq":
        return [GPTQModifier(**held)]
    return [AWQModifier(duo_scaling=True, n_grid=20), QuantizationModifier(**held)]


if __name__ == "__main__":
    main()
