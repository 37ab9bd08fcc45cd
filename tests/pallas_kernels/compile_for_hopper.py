# SPDX-License-Identifier: Apache-2.0
"""Compiles the int4 kernel for an H200 on a machine without a GPU; `test_compiled_for_hopper.py` runs it.

Reads a list of cases from stdin as JSON. Mosaic dumps what the assembler and the disassembler say of each.
"""

import json
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels import int4_matmul

# What XLA needs to know of the device; figures of NVIDIA's data sheet and of `cudaGetDeviceProperties`.
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
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 patch: 0 } device_description_str: "NVIDIA H200"
"""


def main() -> None:
    topology = topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x1")
    mesh = topologies.make_mesh(topology, (1,), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())

    def shape(dimensions, dtype):
        return jax.ShapeDtypeStruct(dimensions, dtype, sharding=sharding)

    for number, case in enumerate(json.load(sys.stdin)):
        m, k, n = case["m"], case["k"], case["n"]
        groups = 1 if case["group"] is None else k // case["group"]
        pairs = shape((n // 16, groups, 8), jnp.uint32)
        operands = [
            shape((m, k), case["half"]),
            shape((n // 16, k // 64, 32, 4), jnp.uint32),
            pairs,
        ]
        config = int4_matmul.Config(**case["config"]) if "config" in case else None
        product = int4_matmul.Product(
            m=m, k=k, n=n, group_size=case["group"], half=case["half"], has_zeros=case["asymmetric"]
        )
        config = config or int4_matmul.config_for(product, "NVIDIA H200")
        operands += [pairs] * case["asymmetric"]
        print(f"=== case {number}", flush=True)
        jax.jit(lambda *a, config=config: int4_matmul.int4_matmul(*a, config=config)).lower(
            *operands
        ).compile()


if __name__ == "__main__":
    main()
