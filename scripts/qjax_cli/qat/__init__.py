# SPDX-License-Identifier: Apache-2.0
"""`qjax qat`: trains a model with fake quantization."""
