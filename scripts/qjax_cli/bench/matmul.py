# SPDX-License-Identifier: Apache-2.0
"""Times products of activations with weights in a scheme, through every implementation."""

import functools
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from dataclasses import asdict, dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

import qjax
from qjax import activations, formats, kernel_products, qtensor, tiles
from qjax.qtensor import QTensor
from qjax_cli.bench import timing

PLAIN = "bfloat16"  # the scheme of weights that are not quantized
NUMBERS = (((1,), (0,)), ((), ()))
SUBCHANNEL = {"xla_gpu_experimental_enable_subchannel_dequantisation_fusion": True}
_COMPILERS = min(8, os.cpu_count() or 1)  # threads
_REACH = 5.0  # of static scales: about the largest of the normally distributed activations


@dataclass(frozen=True, kw_only=True)
class Row:
    """One product: ``x [m, k] . w [k, n]``."""

    scheme: str
    implementation: str  # "xla", "xla-subchannel" or "pallas"
    m: int
    k: int
    n: int
    us: float
    spread_us: tuple[float, float]
    tb_per_s: float  # weights read, with their scales
    tflops: float


@dataclass(frozen=True, kw_only=True)
class Form:
    """A way through which weights are multiplied."""

    implementation: str
    multiply: Callable[[jax.Array, Any], jax.Array]
    weights: Sequence[Any]
    options: dict[str, Any] = field(default_factory=dict)  # of XLA's compiler, by flag

    def takes(self, x: jax.Array) -> bool:
        """Whether it multiplies such activations on this machine."""
        if self.implementation != "pallas":
            return True
        return kernel_products.why_not(x, self.weights[0], NUMBERS) is None


def rows(
    schemes: Sequence[str],
    tokens: Sequence[int],
    shapes: Sequence[tuple[int, int]],
    tell: Callable[[str], None],
    done: Callable[[str], None],
) -> Iterator[Row]:
    """Times every scheme through every implementation that takes it here, bfloat16 first.

    What belongs to one scheme and shape is compiled side by side and then timed one by one: XLA tries
    kernels on the device while it compiles, and nothing can be timed meanwhile.

    Args:
      schemes: names, each once; `PLAIN` stands for bfloat16 itself.
      tokens: rows of the activations.
      shapes: ``(k, n)`` of the weights.
      tell: is told in a line which product failed, and why; the others go on.
      done: is told which product has gone through all implementations, whether they failed or not.
    """
    plain_first = sorted(schemes, key=lambda scheme: scheme != PLAIN)
    for (k, n), scheme in itertools.product(shapes, plain_first):
        forms = forms_of(_weights(scheme, k, n))
        taking = [(x, [form for form in forms if form.takes(x)]) for x in _activations(tokens, k)]
        programs = iter(_compiled([(x, form) for x, own in taking for form in own]))
        for x, own in taking:
            name = f"{scheme} {len(x)} x {k} x {n}"
            for form in own:
                try:
                    yield _row(scheme, form, x, next(programs).result())
                except RuntimeError as error:
                    reason = " ".join(str(error).split())[:300]
                    tell(f"{name} through {form.implementation}: {reason}")
            done(name)


def as_json(row: Row) -> dict[str, Any]:
    """The row as plain JSON types."""
    return asdict(row) | {"spread_us": list(row.spread_us)}


def _activations(tokens: Sequence[int], k: int) -> list[jax.Array]:
    return [jax.random.normal(jax.random.key(m), (m, k), jnp.bfloat16) for m in tokens]


def _weights(scheme: str, k: int, n: int) -> list[Any]:
    """Random weights, so many that no product finds the last one's in the cache."""

    @jax.jit
    def draw(key: jax.Array) -> Any:
        w = jax.random.normal(key, (k, n), jnp.bfloat16) * 0.02
        if scheme == PLAIN:
            return w
        q = qjax.quantize(w, scheme)
        if q.activations is None or not q.activations.static:
            return q
        reach = jnp.float32(_REACH)
        return q.replaced(input_scale=activations.static_scale(reach, q.activations))

    nbytes = formats.device_bytes(jax.eval_shape(draw, jax.random.key(0)))
    return [draw(key) for key in jax.random.split(jax.random.key(0), timing.copies_of(nbytes))]


def forms_of(weights: Sequence[Any]) -> list[Form]:
    """XLA, XLA with its sub-channel fusion where that is something else, and our kernel if there is one.

    Args:
      weights: copies in one scheme, not arranged.
    """
    through_xla = functools.partial(qjax.matmul, implementation="xla")
    forms = [Form(implementation="xla", multiply=through_xla, weights=weights)]
    w = weights[0]
    if not isinstance(w, QTensor):
        return forms
    if jax.default_backend() == "gpu" and not w.scaled_per_contraction:
        forms.append(
            Form(
                implementation="xla-subchannel", multiply=dequantized_matmul, weights=weights,
                options=SUBCHANNEL,
            )
        )  # fmt: skip
    arrange = jax.jit(qjax.prepare)
    if jax.eval_shape(arrange, w).layout is None:
        return forms
    through_pallas = functools.partial(qjax.matmul, implementation="pallas")
    arranged = [arrange(w) for w in weights]
    return [*forms, Form(implementation="pallas", multiply=through_pallas, weights=arranged)]


def dequantized_matmul(x: jax.Array, w: QTensor) -> jax.Array:
    """``x @ dequantize(w)`` in the words in which XLA's sub-channel fusion finds it.

    The scales are multiplied in the dtype of the activations: where float32 stands between codes and dot,
    XLA writes the dequantized weight out, with the flag as without.
    """
    scale = tiles.spread(qtensor.scales(w).astype(x.dtype), w.tile, w.shape)
    if w.activations is not None:
        near = activations.quantize(x, w.activations, (1,), w.input_scale)
        x = activations.dequantize(near).astype(x.dtype)
    dense = qtensor.centred(w, x.dtype) * scale
    return jnp.matmul(x, dense, preferred_element_type=jnp.float32).astype(x.dtype)


def _compiled(products: Sequence[tuple[jax.Array, Form]]) -> list[futures.Future[timing.Program]]:
    """A program of each product, all done: compiled, or with the reason why not."""
    pool = futures.ThreadPoolExecutor(_COMPILERS)
    try:
        programs = [
            pool.submit(timing.compiled, form.multiply, x, form.weights, form.options or None)
            for x, form in products
        ]
        futures.wait(programs)
    finally:  # whoever interrupts does not wait for what is still to be compiled
        pool.shutdown(wait=False, cancel_futures=True)
    return programs


def _row(scheme: str, form: Form, x: jax.Array, program: timing.Program) -> Row:
    took = timing.measure(program, x, form.weights)
    (m, k), n = x.shape, form.weights[0].shape[1]
    return Row(
        scheme=scheme, implementation=form.implementation, m=m, k=k, n=n,
        us=took.us, spread_us=took.spread_us,
        tb_per_s=formats.device_bytes(form.weights[0]) / took.us / 1e6,
        tflops=2 * m * k * n / took.us / 1e6,
    )  # fmt: skip
