# SPDX-License-Identifier: Apache-2.0
"""Every signature is checked, shapes too, and JAX sees two devices and compiles in half the time."""

import os

import jax
from jaxtyping import install_import_hook

# Here and not by --jaxtyping-packages: jaxtyping 0.3.11 splits that option in the wrong place when the
# checker has arguments. PEP 484's tower lets an int stand where a float is asked for.
install_import_hook(
    ["pallas_kernels", "qjax", "qjax_models", "qjax_checkpoints", "qjax_cli"],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)

# For shard_map on any machine.
jax.config.update("jax_num_cpu_devices", 2)

# The arrays are tiny, so machine code need not be fast: LLVM's optimizations are left out on a CPU, XLA's
# own passes are not. JAX_DISABLE_MOST_OPTIMIZATIONS=0 tests with them.
if "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ and jax.default_backend() == "cpu":
    jax.config.update("jax_disable_most_optimizations", True)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # for processes that tests start
