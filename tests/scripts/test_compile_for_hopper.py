# SPDX-License-Identifier: Apache-2.0
"""What a case asks for is what is compiled; nothing here needs a compiler."""

import pytest

import compile_for_hopper
from pallas_kernels.product import Product

E4M3 = "float8_e4m3fn"


def product(**choices) -> Product:
    return Product(**{"m": 3, "k": 256, "n": 32, "group_size": None} | choices)


@pytest.mark.parametrize(("one", "outputs"), [(False, 32), (True, 1)])
@pytest.mark.parametrize(("one_token", "tokens"), [(False, 3), (True, 1)])
def test_one_scale_for_all(one, outputs, one_token, tokens):
    of = product(weights="int8", tokens="int8", one_scale=one, one_token_scale=one_token)
    arrays, options = compile_for_hopper.operands(of, extra=False)
    assert arrays[2].shape == (outputs,)
    assert options["token_scale"].shape == (tokens,)


@pytest.mark.parametrize(
    "choices",
    [
        {"one_scale": True},
        {"one_token_scale": True},
        {"one_scale": True, "tokens": E4M3, "group_size": 128},
        {"one_token_scale": True, "tokens": E4M3, "weights": E4M3, "group_size": 128},
    ],
)
def test_one_scale_where_there_is_none(choices):
    with pytest.raises(ValueError, match="one_scale and one_token_scale do not go with Product"):
        compile_for_hopper.operands(product(**choices), extra=False)
