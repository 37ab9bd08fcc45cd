# SPDX-License-Identifier: Apache-2.0
"""Quantization algorithms, one paper a file: arrays in, QTensors out."""
