# SPDX-License-Identifier: Apache-2.0
"""Kernels compiled for an H200 without one: no spill, no stack, tensor-core instructions.

Needs JAX's CUDA plugin and NVIDIA's assembler and disassembler, which need no GPU (the `aot` extra).
"""

import itertools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

import compile_for_hopper
import qjax
from pallas_kernels import configs, device, few_tokens, many_tokens
from pallas_kernels.product import Product
from qjax import kernel_layout

E4M3 = "float8_e4m3fn"
pytestmark = pytest.mark.skipif(
    compile_for_hopper.why_not() is not None, reason=str(compile_for_hopper.why_not())
)


def case(m: int, k: int, n: int, *, extra: bool = False, **choices) -> dict:
    """Of few tokens, in the default configuration."""
    choices = {"group_size": 128, "weights": "int4", "tokens": "bfloat16"} | choices
    product = Product(m=m, k=k, n=n, **choices)
    config = vars(few_tokens.default_config(product))
    return vars(product) | {"kernel": "few_tokens", "config": config, "extra": extra}


def many(m: int, *, extra: bool = False, **choices) -> dict:
    """Of many tokens, in the default configuration."""
    product = Product(m=m, k=4096, n=6144, **choices)
    config = vars(many_tokens.default_config(product))
    return vars(product) | {"kernel": "many_tokens", "config": config, "extra": extra}


def tuned() -> list[dict]:
    """Each configuration of the table once: shapes make no other machine code."""
    found = {}
    for entry in itertools.chain(*configs.tuned().values()):
        product, config = configs.product_of(entry), configs.config_of(entry)
        own = {"kernel": entry["kernel"], "config": entry["config"], "extra": False}
        columns = few_tokens.columns(product) if entry["kernel"] == "few_tokens" else None
        found[product.weights, product.tokens, product.group_size, columns, config] = (
            vars(product) | own
        )
    return list(found.values())


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
        ("int4", E4M3, 128),
        (E4M3, E4M3, None),
        (E4M3, E4M3, 128),
    )
    for extra in (False, True)
]
# The default configurations of every kind, at the numbers of tokens that take most registers.
LARGE = [
    case(m, k, n, group_size=group, tokens=tokens, weights=weights)
    for m in (1, 32)
    for k, n in ((4096, 28672), (14336, 4096))
    for weights, tokens, group in (
        ("int4", "bfloat16", 128), ("int8", "bfloat16", 128), ("int8", "float16", None), ("int8", "int8", None),
        (E4M3, "bfloat16", 128), (E4M3, "float16", None), (E4M3, E4M3, None), (E4M3, E4M3, 128),
        ("int4", "int8", None), ("int4", E4M3, None), ("int4", E4M3, 128),
    )
]  # fmt: skip


MANY = {
    f"many {weights} {half} {m}": [
        many(m, group_size=group, tokens=half, weights=weights, has_zeros=asymmetric)
        for group in (32, 128, None)
        for asymmetric in ((False, True) if weights != E4M3 else (False,))
    ]
    for weights in ("int4", "int8", E4M3)
    for half in ("bfloat16", "float16")
    for m in (64, 256, 1024)
}
MANY_BYTE_TOKENS = [
    many(m, group_size=group, tokens=tokens, weights=weights, extra=m == 64, out=out)
    for m in (64, 256, 1024)
    for weights, tokens, group in (
        ("int8", "int8", None), ("int4", "int8", None), ("int4", E4M3, None), (E4M3, E4M3, None),
        ("int4", E4M3, 128), (E4M3, E4M3, 128),
    )
    for out in ("bfloat16", "float32")
]  # fmt: skip
OTHER_SCALES = [
    of_one
    for choices in (
        {"weights": "int8", "tokens": "int8", "group_size": None, "one_scale": True, "one_token_scale": True},
        {"weights": "int4", "tokens": E4M3, "group_size": 128, "scales": "float16", "one_token_scale": True},
    )
    for of_one in (case(16, 4096, 4096, **choices), many(64, **choices))
]  # fmt: skip
INSTRUCTIONS = {  # of the tensor cores
    "few_tokens": {"int8": "IMMA.16832.S8.S8"},  # else float16 or bfloat16
    "many_tokens": {"int8": "IGMMA", E4M3: "QGMMA"},
}


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(cases, id=name)
        for name, cases in {
            "tuned, even": tuned()[::2], "tuned, odd": tuned()[1::2], "int4": INT4, "bytes": BYTES,
            "byte tokens": BYTE_TOKENS, "large": LARGE, "many byte tokens": MANY_BYTE_TOKENS, **MANY,
            "other scales": OTHER_SCALES,
        }.items()
    ],
)  # fmt: skip
def test_no_spill_and_tensor_cores(cases):
    reports = compile_for_hopper.reports(cases)
    assert len(reports) == len(cases)
    for one, report in zip(cases, reports, strict=True):
        assert compile_for_hopper.is_clean(report), one
        assert "LDL" not in report and "STL" not in report, one
        few = one["kernel"] == "few_tokens"
        half = "HMMA.16816.F32" if few else "HGMMA"
        assert INSTRUCTIONS[one["kernel"]].get(one["tokens"], half) in report, one
        # The codes: straight into registers, or by copies of the hardware's own.
        assert ("LDG.E.NA.LTC128B.128" if few else "UBLKCP") in report, one


def test_a_block_of_gptq_stays_in_registers():
    cases = [
        {"kernel": "gptq_block", "b": b, "n": n, "bits": 4} for b, n in ((128, 4096), (32, 100))
    ]
    for report in compile_for_hopper.reports(cases):
        assert compile_for_hopper.is_clean(report) and "SHFL.IDX" in report
        assert "LDL" not in report and "STL" not in report


@pytest.mark.parametrize("m", [1, 64])
@pytest.mark.parametrize(
    "name", ["w4a16-g128", "w4a16-g64-asym", "w8a8", "fp8-block", "w4afp8-g128"]
)
def test_a_scan_copies_no_weight(monkeypatch, name, m):
    """Nowhere in the program is there an array of the codes or scales of one layer by itself."""
    monkeypatch.setattr(device, "is_hopper", lambda: True)

    def layers():
        stacked = qjax.quantize(jnp.ones((5, 512, 640), jnp.bfloat16), name, stacked=1)
        return kernel_layout.for_kernel(stacked), jnp.ones((5, 640, 512), jnp.bfloat16)

    def last(x, layers):
        return qjax.scan_layers(lambda x, w: (qjax.matmul(x, w[0]) @ w[1], None), x, layers)[0]

    x, layers = compile_for_hopper.shapes(
        (jnp.ones((m, 512), jnp.bfloat16), jax.eval_shape(layers))
    )
    program = jax.jit(last).lower(x, layers).compile().as_text()
    assert "mosaic_gpu" in program
    for leaf in jax.tree.leaves(layers[0]):
        of_all, of_one = (",".join(map(str, shape)) for shape in (leaf.shape, leaf.shape[1:]))
        kind = {"uint32": "u32", "float32": "f32"}[str(leaf.dtype)]
        assert f"{kind}[{of_all}]" in program
        assert f"{kind}[{of_one}]" not in program and f"{kind}[1,{of_one}]" not in program


@pytest.mark.parametrize("m", [1, 64])
def test_a_kernel_under_shard_map(monkeypatch, m):
    """Each of two GPUs has half of the outputs, and the kernel of that half."""
    monkeypatch.setattr(device, "is_hopper", lambda: True)
    mesh = compile_for_hopper.mesh(2)

    def arranged():
        return kernel_layout.for_kernel(
            qjax.quantize(jnp.ones((512, 1024), jnp.bfloat16), "w4a16-g128")
        )

    x = compile_for_hopper.shapes(jnp.ones((m, 512), jnp.bfloat16), mesh)
    w = compile_for_hopper.shapes(jax.eval_shape(arranged), mesh, PartitionSpec("x"))
    halves = jax.shard_map(
        qjax.matmul, mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec("x")),
        out_specs=PartitionSpec(None, "x"),
    )  # fmt: skip
    program = jax.jit(halves).lower(x, w).compile().as_text()
    (launch,) = (line for line in program.splitlines() if "mosaic_gpu" in line)
    assert f"bf16[{m},512]" in launch and "u32[32,8,32,4]" in launch  # of 64 row blocks


@pytest.mark.parametrize("m", [1, 2])
def test_xla_compiles_int4_with_int8_tokens(monkeypatch, m):
    """Of a single row it makes a reduction that its Triton compiler refuses."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    shape = jax.eval_shape(lambda: qjax.quantize(jnp.ones((512, 640), jnp.bfloat16), "w4a8"))
    x, w = compile_for_hopper.shapes((jnp.ones((m, 512), jnp.bfloat16), shape))
    assert jax.jit(qjax.matmul).lower(x, w).compile().as_text()


def test_the_versions_of_jax_and_its_plugin_agree():
    import jax_cuda13_plugin.version as plugin  # noqa: PLC0415  optional

    assert plugin.__version__ == jax.__version__
