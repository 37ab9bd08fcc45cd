# SPDX-License-Identifier: Apache-2.0
"""Compile kernels down to machine code for an H200, on a machine without a GPU.

Needs JAX's CUDA plugin and NVIDIA's assembler and disassembler, none of which needs a GPU. Reads a JSON
list of cases from standard input: fields of :class:`pallas_kernels.product.Product`; "kernel" and
"config" as in `pallas_kernels/tuned.json` (else the tuned ones); "extra" (with bias and residual). Or
"kernel": "gptq_block" with "b", "n" and "bits", of :mod:`pallas_kernels.gptq_block`.
Prints what the assembler and the disassembler say of each, after a line "=== case NUMBER".

Example:
  echo '[{"m": 1, "k": 4096, "n": 4096, "group_size": 128}]' | python scripts/compile_for_hopper.py
"""

import argparse
import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.configs import config_for, config_of
from pallas_kernels.gptq_block import at_their_turn
from pallas_kernels.product import Product
from pallas_kernels.quantized_matmul import quantized_matmul

# What XLA needs to know of the device; figures of NVIDIA's data sheet and
# of `cudaGetDeviceProperties`.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: 4800000000000 l2_cache_size: 62914560 clock_rate_ghz: 1.98
  device_memory_size: 151397597184 device_address_bits: 64 ecc_enabled: true
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  device_vendor: "NVIDIA Corporation" name: "NVIDIA H200" driver_version: "13.0.0"
  runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200"
"""

SERIALIZED = "wgmma.mma_async instructions are serialized"  # what the assembler warns of
NO_SPILL = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"


def is_clean(report: str) -> bool:
    """Whether registers suffice, and products of warpgroups overlap."""
    return NO_SPILL in report and SERIALIZED not in report


def why_not() -> str | None:
    """What is missing to compile here; None if nothing is."""
    missing = [tool for tool, folder in _tools().items() if folder is None]
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        missing.append("jax-cuda13-plugin and jax-cuda13-pjrt")
    return f"needs {', '.join(missing)}" if missing else None


def reports(cases: Sequence[dict[str, Any]]) -> list[str]:
    """What the assembler and the disassembler say of each case; a process of its own compiles them.

    Raises:
      RuntimeError: a case does not compile.
    """
    with tempfile.TemporaryDirectory() as tools:
        for tool, folder in _tools().items():
            assert folder is not None, "see why_not"
            Path(tools, tool).symlink_to(folder / tool)
        environment = os.environ | {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "JAX_PLATFORMS": "cpu",
            "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
            "MOSAIC_GPU_DUMP_PTXAS": "1",
            "MOSAIC_GPU_DUMP_SASS": "1",
            "PYTHONPATH": ":".join(sys.path),
        }
        done = subprocess.run(
            [sys.executable, __file__], input=json.dumps(cases), capture_output=True, text=True,
            env=environment, check=False,
        )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return re.split(r"^=== case \d+\n", done.stdout, flags=re.M)[1:]


def _tools() -> dict[str, Path | None]:
    return {tool: _folder_of(tool) for tool in ("ptxas", "nvdisasm")}


def _folder_of(tool: str) -> Path | None:
    """Where an NVIDIA program lies: on the PATH, or in the packages that carry it."""
    if found := shutil.which(tool):
        return Path(found).parent
    for root in map(Path, sys.path):
        for package in ("nvidia/cu13/bin", "triton/backends/nvidia/bin"):
            if (root / package / tool).is_file():
                return root / package
    return None


def mesh(count: int) -> jax.sharding.Mesh:
    """So many H200, which need not be there, along an axis ``x``."""
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=H200, topology=f"1x{count}x1"
    )
    return topologies.make_mesh(topology, (count,), ("x",))


def shapes(tree: Any, on: jax.sharding.Mesh | None = None, spec: Any = None) -> Any:
    """Shapes of arrays that lie on such a mesh, one H200 if none is given: for ``jax.jit(...).lower``."""
    sharding = NamedSharding(on or mesh(1), spec or PartitionSpec())
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)


def _compile(cases: Sequence[dict[str, Any]]) -> None:
    for number, case in enumerate(cases):
        computed, arrays, options = (_block if case.get("kernel") == "gptq_block" else _multiplied)(
            case
        )
        print(f"=== case {number}", flush=True)
        jax.jit(computed).lower(*arrays, **options).compile()


def _block(case: dict[str, Any]) -> tuple[Any, list[Any], dict[str, Any]]:
    """The rounding of a block of GPTQ, and shapes of what it takes."""
    b, n, high = case["b"], case["n"], 2.0 ** (case["bits"] - 1) - 1
    block = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((b, n), (b, b), (b, n), (b, n))]
    return functools.partial(at_their_turn, low=-1 - high, high=high), shapes(block), {}


def _multiplied(case: dict[str, Any]) -> tuple[Any, list[Any], dict[str, Any]]:
    """A product, and shapes of what it takes."""
    others = ("extra", "kernel", "config")
    product = Product(**{key: value for key, value in case.items() if key not in others})
    config = config_of(case) if "config" in case else config_for(product, "NVIDIA H200")
    arrays, options = shapes(operands(product, extra=case.get("extra", False)))
    multiply = functools.partial(
        quantized_matmul, weights=product.weights, scale_dtype=product.scales, config=config,
        out_dtype=product.out,
    )  # fmt: skip
    return multiply, arrays, options


def operands(product: Product, *, extra: bool) -> tuple[list[Any], dict[str, Any]]:
    """Shapes of what a product is computed from: positional arguments, and those with a name.

    Args:
      product: as a case describes it.
      extra: with bias and residual.

    Raises:
      ValueError: one scale serves all where each group or block has one.
    """
    shape = jax.ShapeDtypeStruct
    by_channel = not (product.has_pairs or product.has_blocks)
    of_tokens = not (product.has_half_tokens or product.has_blocks)
    if (product.one_scale and not by_channel) or (product.one_token_scale and not of_tokens):
        raise ValueError(f"one_scale and one_token_scale do not go with {product}")
    m, k, n = product.m, product.k, product.n
    blocks = (n // 16, k // 64, *(() if product.weights == "int4" else (2,)), 32, 4)
    arrays = [shape((m, k), product.tokens), shape(blocks, jnp.uint32)]
    options, token_scales = {}, (1 if product.one_token_scale else m,)
    if product.has_pairs:
        arrays += [shape((n // 16, product.groups, 8), jnp.uint32)] * (1 + product.has_zeros)
        if not product.has_half_tokens:
            options["token_scale"] = shape(token_scales, jnp.float32)
    elif product.has_blocks:
        arrays.append(shape((k // 128, -(-n // 128)), jnp.float32))
        options["token_scale"] = shape((m, k // 128), jnp.float32)
    else:
        arrays.append(shape((1 if product.one_scale else n,), jnp.bfloat16))
        options["token_scale"] = shape(token_scales, jnp.float32)
    if extra:
        options |= {"bias": shape((n,), jnp.bfloat16), "residual": shape((m, n), jnp.float32)}
    return arrays, options


def main() -> None:
    """Compiles what standard input asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.parse_args()
    _compile(json.load(sys.stdin))


if __name__ == "__main__":
    main()
