# SPDX-License-Identifier: Apache-2.0
"""What 8-bit activations cost the shipped model when its norms make some of them large."""

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from benchmarks.outlier_channels import CHANNELS, with_outliers
from qjax_checkpoints import shipped
from qjax_checkpoints.load import load
from qjax_checkpoints.tokenizer import load_tokenizer


@pytest.mark.one_version  # a whole model, compiled three times
def test_outliers_in_16_bits_cost_at_most_four_thousandths():
    """All layers at once, on few tokens; llm_int8.py has the figures of more, block by block."""
    model = with_outliers(load(shipped.model_path(), jnp.float32).model)
    tokenizer = load_tokenizer(shipped.model_path(), vocab_size=model.config.vocab_size)
    ids = np.asarray(tokenizer.encode(shipped.evaluation_text()[:40_000]), np.int32)
    windows = ids[: 32 * 256].reshape(32, 256)
    observed = qjax.calibrate(model, [windows[::4]], hessians=False)
    quantized, report = qjax.quantize_model(model, "w8a8", observed, method="llm-int8")
    behind_norms = [e for e in report.quantized if not e.path.endswith(("o_proj", "down_proj"))]
    assert min(entry.outliers for entry in behind_norms) == CHANNELS
    judged = windows[1::4]
    exact, near = (qjax.evaluate(m, judged).perplexity for m in (model, quantized))
    assert near / exact - 1 < 0.004, near / exact - 1
