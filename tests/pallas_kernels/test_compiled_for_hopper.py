# SPDX-License-Identifier: Apache-2.0
"""Kernels compiled for an H200 without one: no spill, no stack, tensor-core instructions.

Needs JAX's CUDA plugin and NVIDIA's assembler and disassembler, which need no GPU (the `aot` extra).
"""

import jax
import pytest

import compile_for_hopper
from pallas_kernels import few_tokens_product as products

E4M3 = "float8_e4m3fn"
pytestmark = pytest.mark.skipif(
    compile_for_hopper.why_not() is not None, reason=str(compile_for_hopper.why_not())
)


def case(m: int, k: int, n: int, *, extra: bool = False, **choices) -> dict:
    product = {"group_size": 128, "weights": "int4", "tokens": "bfloat16"}
    return product | {"m": m, "k": k, "n": n, "extra": extra} | choices


def tuned() -> list[dict]:
    entries = [entry for device in products.tuned().values() for entry in device]
    return [
        vars(products.product_of(entry)) | {"config": entry["config"], "extra": False}
        for entry in entries
    ]


INT4 = [
    case(16, 4096, 4096, group_size=group, tokens=half, has_zeros=asymmetric)
    for group in (32, 64, 128, None)
    for half in ("bfloat16", "float16")
    for asymmetric in (False, True)
]
BYTES = [
    case(16, 4096, 4096, group_size=group, tokens=half, weights=weights, has_zeros=asymmetric)
    for group in (32, 128, None)
    for half in ("bfloat16", "float16")
    for weights, asymmetric in (("int8", False), ("int8", True), (E4M3, False))
]
BYTE_TOKENS = [
    case(16, 4096, 4096, group_size=group, tokens=tokens, weights=weights, extra=extra)
    for weights, tokens, group in (
        ("int8", "int8", None),
        ("int4", "int8", None),
        ("int4", E4M3, None),
        (E4M3, E4M3, None),
        (E4M3, E4M3, 128),
    )
    for extra in (False, True)
]
# The default configurations of every kind, at the numbers of tokens that take most registers.
MANY = [
    case(m, k, n, group_size=group, tokens=tokens, weights=weights)
    for m in (1, 32)
    for k, n in ((4096, 28672), (14336, 4096))
    for weights, tokens, group in (
        ("int4", "bfloat16", 128), ("int8", "bfloat16", 128), ("int8", "float16", None), ("int8", "int8", None),
        (E4M3, "bfloat16", 128), (E4M3, "float16", None), (E4M3, E4M3, None), (E4M3, E4M3, 128),
        ("int4", "int8", None), ("int4", E4M3, None),
    )
]  # fmt: skip


@pytest.mark.parametrize(
    "cases",
    [tuned(), INT4, BYTES, BYTE_TOKENS, MANY],
    ids=["tuned", "int4", "bytes", "byte tokens", "many"],
)
def test_no_spill_and_tensor_cores(cases):
    reports = compile_for_hopper.reports(cases)
    assert len(reports) == len(cases)
    for one, report in zip(cases, reports, strict=True):
        assert compile_for_hopper.NO_SPILL in report, one
        whole = one["tokens"] == "int8"
        assert ("IMMA.16832.S8.S8" if whole else "HMMA.16816.F32") in report, one
        assert "LDG.E.NA.LTC128B.128" in report, one  # the codes
        assert "LDL" not in report and "STL" not in report, one


def test_the_versions_of_jax_and_its_plugin_agree():
    import jax_cuda13_plugin.version as plugin  # noqa: PLC0415  optional

    assert plugin.__version__ == jax.__version__
