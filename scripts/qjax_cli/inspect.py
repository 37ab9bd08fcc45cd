# SPDX-License-Identifier: Apache-2.0
"""What each layer of a model holds: scheme, shape, bytes, bits a weight, and what multiplies it here.

Example:
  qjax inspect ./Llama-3.2-1B-w4
"""

import argparse
from pathlib import Path

import jax
from flax import nnx

from qjax import formats, kv_cache, nnx_layers, ops
from qjax.qtensor import QTensor
from qjax_checkpoints.load import load
from qjax_cli.console import Console, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument("source", metavar="SRC", type=Path, help="model directory")


def run(args: argparse.Namespace, console: Console) -> None:
    """Reads the directory and prints a line a layer."""
    checkpoint = load(args.source)
    layers = [
        _layer(path, nnx_layers.weight_of(layer))
        for path, layer in nnx_layers.quantizable_layers(checkpoint.model)
    ]
    total = formats.device_bytes(nnx.state(checkpoint.model))
    weights = sum(layer["elements"] for layer in layers)
    values = {
        "kind": checkpoint.kind,
        "layers": layers,
        "bytes": total,
        "bits_per_weight": 8 * sum(layer["bytes"] for layer in layers) / weights,
        "kv_cache": checkpoint.model.config.kv_cache,
        "cache_scales": _cache_scales(checkpoint.model),
        "notes": list(checkpoint.notes),
    }
    rows = [
        [
            layer["path"],
            layer["scheme"] or layer["dtype"],
            " x ".join(map(str, layer["shape"])),
            f"{layer['bytes']:,}",
            f"{layer['bits_per_weight']:.3f}",
            layer["runs_as"],
        ]
        for layer in layers
    ]
    summary = (
        f"{checkpoint.kind}: {len(layers)} layers, {total / 2**20:.2f} MiB in all, "
        f"{values['bits_per_weight']:.3f} bits a weight"
    )
    summary += _static_inputs([s for layer in layers if (s := layer["input_scale"]) is not None])
    summary += _kept(values["kv_cache"], list(values["cache_scales"].values()))
    headings = ("layer", "scheme", "shape", "bytes", "bits", "runs here as")
    console.result(values, table(headings, rows, left=2), summary, *checkpoint.notes)


def _cache_scales(model: nnx.Module) -> dict[str, float]:
    """The scales by which keys and values are kept."""
    return {path: float(s.get_value()[0]) for path, s in kv_cache.scales_of(model).items()}


def _kept(scheme: str | None, scales: list[float]) -> str:
    """How keys and values are kept."""
    if scheme is None:
        return ""
    by = f"scales of {min(scales):.3g} to {max(scales):.3g}" if scales else "scales of their own"
    return f"; keys and values are kept as {scheme} by {by}"


def _static_inputs(scales: list[float]) -> str:
    """How many layers quantize what they multiply by a scale from calibration."""
    if not scales:
        return ""
    least, most = min(scales), max(scales)
    return f"; {len(scales)} quantize their inputs by a static scale, {least:.3g} to {most:.3g}"


def _layer(path: str, w: jax.Array | QTensor) -> dict:
    quantized = isinstance(w, QTensor)
    return {
        "path": path,
        "scheme": w.scheme.name if quantized else None,
        "dtype": str(w.dtype),
        "shape": list(w.shape),
        "elements": w.size,
        "bytes": w.nbytes,
        "bits_per_weight": 8 * w.nbytes / w.size,
        "input_scale": float(w.input_scale) if quantized and w.input_scale is not None else None,
        "outliers": w.columns.size if quantized and w.columns is not None else 0,
        "runs_as": ops.form(w),
    }
