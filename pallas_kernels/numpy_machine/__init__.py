# SPDX-License-Identifier: Apache-2.0
"""Kernels of :mod:`pallas_kernels.machine` with numpy, on any machine."""

from pallas_kernels.numpy_machine.machine import NumpyMachine, run

__all__ = ["NumpyMachine", "run"]
