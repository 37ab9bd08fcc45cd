# SPDX-License-Identifier: Apache-2.0
"""The program in docs/qat.md runs, and trains."""

import numpy as np
import pytest

import qjax
from qjax import nnx_layers


@pytest.mark.one_version
def test_the_page_runs(run_page) -> None:
    names = run_page("qat.md")
    plain, learned = np.split(np.asarray(names["losses"]), 2)
    assert plain[-1] < 0.5 * plain[0] and learned[-1] < 0.5 * learned[0]
    for model, scheme in ((names["result"], "w4a16-g32"), (names["smaller"], "w2a16-g32")):
        held = nnx_layers.quantized_layers(model)
        assert {q.group_size or 32 for q in held.values()} == {32} and len(held) == 2
        assert {q.format.bits for q in held.values()} == {int(scheme[1])}
    assert isinstance(names["held"]["layers_0"]["kernel"], qjax.QTensor)
    assert set(names["full_precision"]) == {"layers_0", "layers_2"}
