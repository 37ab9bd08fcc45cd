# SPDX-License-Identifier: Apache-2.0
from flax import nnx

from qjax_models import Decoder
from qjax_models.names import hf_tensors

# Of attention and MLP, the head, routers, experts.
LINEAR = tuple(f"{name}.weight" for name in ("proj", "lm_head", "gate", "w1", "w2", "w3"))


def test_names_are_those_of_the_checkpoint(golden):
    model = Decoder.abstract(golden.config)
    names = hf_tensors(model)
    assert set(names) == set(golden.tensors)
    state = {"/".join(map(str, path)): value for path, value in nnx.to_flat_state(nnx.state(model))}
    assert {path for path, _ in names.values()} == set(state)
    for name, (path, layout) in names.items():
        stored = golden.tensors[name].shape
        assert state[path].shape == (stored[::-1] if layout == "linear" else stored), name
        assert (layout == "linear") == name.endswith(LINEAR), name


def test_tied_models_have_no_head(goldens):
    assert "lm_head.weight" not in hf_tensors(Decoder.abstract(goldens["llama_linear"].config))
    assert "lm_head.weight" in hf_tensors(Decoder.abstract(goldens["llama"].config))
