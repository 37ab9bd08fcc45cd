# SPDX-License-Identifier: Apache-2.0
"""The compressed-tensors format, in which vLLM, SGLang and transformers exchange quantized models."""
