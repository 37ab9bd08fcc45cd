# SPDX-License-Identifier: Apache-2.0
"""The same weights in transformers, fresh ones for every seed."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from qjax_models import Decoder, config_from_hf

pytestmark = pytest.mark.interop

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
make_golden = pytest.importorskip("make_golden")

forward = nnx.jit(Decoder.__call__)  # one compilation serves all seeds


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("name", sorted(make_golden.CASES))
@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_logits_agree(name, seed, fill_decoder, tmp_path):
    theirs = make_golden.random_model(make_golden.CASES[name], seed)
    tokens = make_golden.random_tokens(seed, length=100)
    with torch.no_grad():
        expected = theirs(tokens).logits.numpy()
    config = config_from_hf(json.loads(theirs.config.to_json_string()))
    # As in the files: in memory transformers has the experts of a layer in one array.
    theirs.save_pretrained(tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    ours = fill_decoder(Decoder.abstract(config), tensors)
    found = np.asarray(forward(ours, jnp.asarray(tokens.numpy(), jnp.int32)))
    assert np.linalg.norm(found - expected) < 3e-6 * np.linalg.norm(expected)
