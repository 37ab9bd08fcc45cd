# SPDX-License-Identifier: Apache-2.0
"""How programs are compiled that run a few dozen times, once a layer or a batch of calibration."""

from typing import Any

# Left to itself XLA compiles and times a hundred kernels for each product on a GPU, half a minute for
# each shape of weight, and the fastest is not the same in every process. The first that its library
# proposes is as fast: GPTQ of 32 layers of an 8-billion Llama takes 0.8 s a layer with trials of the
# library's kernels and without; its compilations take 69 and 23 seconds, summed over the threads (NVIDIA
# H200, jax 0.11.2, 2026-11-28).
WITHOUT_TRIALS: dict[str, Any] = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}
