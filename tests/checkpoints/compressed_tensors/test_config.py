# SPDX-License-Identifier: Apache-2.0
"""Which group a layer belongs to, and how inputs are read."""

import pytest

from qjax import formats
from qjax.scheme import ActivationScheme
from qjax_checkpoints.compressed_tensors.config import (
    Group,
    QuantizationConfig,
    is_dynamic,
    read_activations,
)

LAYER = "model.layers.3.mlp.down_proj"


def config(*targets: str, ignore: tuple[str, ...] = ()) -> QuantizationConfig:
    groups = tuple(
        Group(targets=(target,), weights={"name": target}, activations=None) for target in targets
    )
    return QuantizationConfig(groups=groups, ignore=ignore, notes=())


@pytest.mark.parametrize(
    ("targets", "chosen"),
    [
        (["Linear"], "Linear"),
        (["Linear", r"re:.*down_proj$", LAYER], LAYER),
        ([r"re:.*down_proj$", "Linear"], r"re:.*down_proj$"),
        (["Linear", r"re:.*down_proj$"], r"re:.*down_proj$"),
        ([r"re:.*q_proj", r"re:.*down"], r"re:.*down"),
        ([r"re:down_proj"], None),  # patterns match from the start of the name
        (["LlamaMLP"], None),
        (["model.layers.3.mlp"], None),
    ],
)
def test_the_most_specific_target_wins(targets, chosen):
    group = config(*targets).group_of(LAYER)
    assert (group.targets[0] if group else None) == chosen


@pytest.mark.parametrize("ignored", [LAYER, r"re:.*layers\.3\..*", "Linear"])
def test_ignored_layers_have_no_group(ignored):
    assert config("Linear", ignore=(ignored,)).group_of(LAYER) is None


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (None, None),
        ({"num_bits": 8, "type": "int", "dynamic": True}, ActivationScheme(format=formats.INT8)),
        ({"num_bits": 4, "strategy": "token"}, ActivationScheme(format=formats.INT4)),
        (
            {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": True},
            ActivationScheme(format=formats.E4M3),
        ),
        (
            {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False},
            ActivationScheme(format=formats.E4M3, static=True),
        ),
        # compressed-tensors' own defaults.
        ({"num_bits": 8}, ActivationScheme(format=formats.INT8, static=True)),
        (
            {"num_bits": 8, "strategy": None, "dynamic": "local"},
            ActivationScheme(format=formats.INT8),
        ),
        (
            {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 128},
            ActivationScheme(format=formats.E4M3, group_size=128),
        ),
        (
            {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
            ActivationScheme(format=formats.E2M1, group_size=16),
        ),
        (
            {
                "num_bits": 8,
                "type": "float",
                "strategy": "group",
                "group_size": 32,
                "scale_dtype": "torch.uint8",
            },
            ActivationScheme(format=formats.E4M3, group_size=32, scale_format="e8m0"),
        ),
    ],
)
def test_activations(arguments, expected):
    assert read_activations(arguments) == expected


@pytest.mark.parametrize("arguments", [{"num_bits": 16, "type": "float"}, {"symmetric": False}])
def test_activations_that_cannot_be_read(arguments):
    with pytest.raises(ValueError, match="activations of .* cannot be read"):
        read_activations(arguments)


def test_dynamic():
    assert is_dynamic(None) and is_dynamic({"dynamic": True})
    assert not is_dynamic({"dynamic": False}) and not is_dynamic({"dynamic": "local"})
