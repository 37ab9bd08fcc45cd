# SPDX-License-Identifier: Apache-2.0
"""What the default device is."""

import jax

MULTIPROCESSORS = 132  # of an H100 or H200 in its SXM form


def is_hopper() -> bool:
    """Whether the default device is an NVIDIA GPU of compute capability 9.0: H100, H200, GH200."""
    if jax.default_backend() != "gpu":
        return False
    return getattr(jax.devices()[0], "compute_capability", None) == "9.0"
