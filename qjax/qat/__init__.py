# SPDX-License-Identifier: Apache-2.0
"""Quantization-aware training: straight-through estimators, learned scales, and what optax needs."""
