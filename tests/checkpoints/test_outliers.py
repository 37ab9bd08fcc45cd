# SPDX-License-Identifier: Apache-2.0
"""What 8-bit activations cost the shipped model when its norms make some of them large."""

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import folding
from qjax_checkpoints import shipped
from qjax_checkpoints.load import load
from qjax_checkpoints.tokenizer import load_tokenizer
from qjax_models import Decoder, blockwise

CHANNELS, FACTOR = 6, 48


def with_outliers(model: Decoder) -> Decoder:
    """The same function, with some channels of each norm made large and the weights behind them small."""
    rng = np.random.default_rng(0)
    width = model.config.hidden_size
    for block in blockwise(model, 1).blocks:
        for fold in block.folds:
            if fold.producer.path.endswith("norm"):
                scale = np.ones(width, np.float32)
                scale[rng.choice(width, CHANNELS, replace=False)] = 1 / FACTOR
                folding.fold(block.module, fold, jnp.asarray(scale))
    return model


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
