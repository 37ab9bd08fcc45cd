# SPDX-License-Identifier: Apache-2.0
"""Golden checkpoints as models."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from qjax_models import Decoder, DecoderConfig, config_from_hf
from qjax_models.names import hf_tensors

GOLDEN = Path(__file__).parents[1] / "golden"


@dataclass(frozen=True)
class Golden:
    json: dict
    config: DecoderConfig
    tensors: dict[str, np.ndarray]
    tokens: np.ndarray  # int32 [B, T]
    logits: np.ndarray  # float32 [B, T, V]

    def model(self, config: DecoderConfig | None = None, **types) -> Decoder:
        """The checkpoint as a decoder, or its tensors in a decoder of another config."""
        return fill(Decoder.abstract(config or self.config, **types), self.tensors)


def fill(model: Decoder, tensors: Mapping[str, np.ndarray]) -> Decoder:
    flat = dict(nnx.to_flat_state(nnx.state(model)))
    filled = {}
    for name, (path, layout) in hf_tensors(model).items():
        key = tuple(int(part) if part.isdigit() else part for part in path.split("/"))
        tensor = tensors[name].T if layout == "linear" else tensors[name]
        assert tensor.shape == flat[key].shape, name
        filled[key] = flat[key].replace(jnp.asarray(tensor, flat[key].dtype))
    nnx.update(model, nnx.from_flat_state(filled))
    return model


def read_golden(name: str) -> Golden:
    values = json.loads((GOLDEN / name / "config.json").read_text())
    expected = load_file(GOLDEN / name / "expected.safetensors")
    return Golden(
        values,
        config_from_hf(values),
        load_file(GOLDEN / name / "model.safetensors"),
        expected["tokens"],
        expected["logits"],
    )


@pytest.fixture(scope="session")
def goldens() -> dict[str, Golden]:
    return {folder.name: read_golden(folder.name) for folder in sorted(GOLDEN.iterdir())}


@pytest.fixture(params=sorted(folder.name for folder in GOLDEN.iterdir()))
def golden(request, goldens) -> Golden:
    return goldens[request.param]


@pytest.fixture(scope="session")
def fill_decoder() -> Callable[[Decoder, Mapping[str, np.ndarray]], Decoder]:
    return fill
