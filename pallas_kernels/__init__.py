# SPDX-License-Identifier: Apache-2.0
"""Floor 1: what runs close to the device. Arrays in, arrays out; jax, numpy and jaxtyping only."""

from pallas_kernels.packing import pack as pack
from pallas_kernels.packing import packed_length as packed_length
from pallas_kernels.packing import unpack as unpack
