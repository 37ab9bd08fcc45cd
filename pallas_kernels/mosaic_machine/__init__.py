# SPDX-License-Identifier: Apache-2.0
"""Kernels of :mod:`pallas_kernels.machine` on a GPU.

Nothing else imports Mosaic's internals (``inline_mgpu`` and MLIR), whose names move between releases of
JAX.
"""

from pallas_kernels.mosaic_machine.machine import launch

__all__ = ["launch"]
