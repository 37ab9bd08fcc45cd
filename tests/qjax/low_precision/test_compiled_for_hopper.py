# SPDX-License-Identifier: Apache-2.0
"""A train step of a stock layer compiled for an H200 without one: all three products are FP8.

Needs JAX's CUDA plugin, which needs no GPU.
"""

import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import compile_for_hopper
from qjax.low_precision import train_in_fp8, value_and_grad

pytestmark = pytest.mark.skipif(
    compile_for_hopper.why_not() is not None, reason=str(compile_for_hopper.why_not())
)


def program(scaling: str, dtype, options: dict) -> str:
    """The step from tokens [2, 256, 1024] to the gradients of both operands."""
    layer = nnx.Linear(1024, 2048, use_bias=False, dtype=dtype, rngs=nnx.Rngs(0))
    train_in_fp8(layer, scaling=scaling)
    graph, state = nnx.split(layer)

    def step(state, x, g):
        layer = nnx.merge(graph, state)

        def loss_fn(model_and_x):
            return jnp.sum(model_and_x.layer(model_and_x.x[...]) * g).astype(jnp.float32)

        loss, grads = value_and_grad(loss_fn)(nnx.Dict(layer=layer, x=nnx.Param(x)))
        return loss, nnx.state(grads), nnx.state(layer)

    x, g = (jax.ShapeDtypeStruct((2, 256, n), dtype) for n in (1024, 2048))
    arguments = compile_for_hopper.shapes((nnx.to_pure_dict(state), x, g))
    lowered = jax.jit(lambda s, x, g: step(_restored(state, s), x, g)).lower(*arguments)
    return lowered.compile(compiler_options=options).as_text()


def _restored(state, pure):
    state = jax.tree.map(lambda x: x, state)
    nnx.replace_by_pure_dict(state, pure)
    return state


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("scaling", ["current", "delayed"])
class TestProducts:
    def test_cublas(self, scaling, dtype):
        text = program(scaling, dtype, {"xla_gpu_enable_triton_gemm": False})
        calls = re.findall(r'custom_call_target="(__cublas[^"]*)"', text)
        assert calls == ["__cublas$lt$matmul$f8"] * 3
        assert not re.search(r"\bdot\(", text)

    def test_with_triton_allowed(self, scaling, dtype):
        """Autotuning then chooses between Triton and cuBLASLt; the operands are bytes for both."""
        text = program(scaling, dtype, {})
        dots = re.findall(r"= \w+\[[\d,]*\]\S* dot\(%([\w.]+), %([\w.]+)\)", text)
        dtypes = dict(re.findall(r"%([\w.]+) = (\w+)\[", text))
        assert len(dots) + text.count('"__cublas$lt$matmul$f8"') == 3
        assert all(dtypes[name].startswith("f8e") for pair in dots for name in pair)
