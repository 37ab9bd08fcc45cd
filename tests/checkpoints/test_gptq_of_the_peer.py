# SPDX-License-Identifier: Apache-2.0
"""The codes of GPTQ against llm-compressor's, layer by layer, from the same Hessians of real text."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax import nnx_layers
from qjax.algorithms import gptq
from qjax.observation import Observed
from qjax_checkpoints import shipped
from qjax_checkpoints.load import load
from qjax_checkpoints.tokenizer import load_tokenizer
from qjax_models import Decoder, DecoderConfig

torch = pytest.importorskip("torch")
compressed_tensors = pytest.importorskip("compressed_tensors.quantization")
quantization_math = pytest.importorskip("compressed_tensors.quantization.utils")
peer = pytest.importorskip("llmcompressor.modifiers.gptq.gptq_quantize")

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

GROUP = 128
# llm-compressor's defaults: damping of 1 %, static act-order, ranges of the original weights.
OPTIONS = gptq.Options(exact_peer=True)


def shipped_model(dtype) -> Decoder:
    return load(shipped.model_path(), dtype).model


def grouped_queries(dtype) -> Decoder:
    # Wide enough that one code that falls the other way, by the threads that summed a product, and what
    # follows from it in its output, are not a thousandth of the values' weight: 27 of 16,384 were, once.
    config = DecoderConfig(
        vocab_size=1024, hidden_size=512, mlp_size=384, num_layers=2, num_heads=8, num_kv_heads=2,
        head_size=64, max_positions=512,
    )  # fmt: skip
    return Decoder(config, dtype=dtype, rngs=nnx.Rngs(0))


@pytest.fixture(autouse=True)
def fast_programs():
    """The programs here run for longer than they compile (conftest.py says otherwise of the rest)."""
    compiled_fast = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", compiled_fast)


@functools.cache
def calibrated(make, dtype) -> tuple[Decoder, Observed]:
    model = make(dtype)
    vocab_size = load(shipped.model_path(), dtype).model.config.vocab_size
    tokenizer = load_tokenizer(shipped.model_path(), vocab_size=vocab_size)
    ids = np.asarray(tokenizer.encode(shipped.evaluation_text()[:100_000]), np.int32)
    windows = ids[: 32 * 512].reshape(4, 8, 512) % model.config.vocab_size
    return model, qjax.calibrate(model, windows)


@pytest.mark.parametrize(
    ("make", "scheme", "dtype"),
    [
        (shipped_model, "w4a16-g128", jnp.bfloat16),
        (shipped_model, "w4a16-g128-asym", jnp.bfloat16),
        (grouped_queries, "w4a16-g128", jnp.float32),
        (grouped_queries, "w4a16-g128-asym", jnp.float32),
        (grouped_queries, "w4a16-g128-asym", jnp.bfloat16),
    ],
)
def test_codes_are_those_of_llm_compressor(make, scheme, dtype):
    model, observed = calibrated(make, dtype)
    layers = dict(nnx_layers.quantizable_layers(model))
    paths = sorted(path for path in layers if path in observed and path != "lm_head")
    weights = {path: nnx_layers.weight_of(layers[path]) for path in paths}
    differ, settled = {}, {}
    # In the batches that the peer itself makes: in others it sums in another order.
    batches = {(path.split("/")[2], w.shape): [] for path, w in weights.items()}
    for path, w in weights.items():
        batches[path.split("/")[2], w.shape].append(path)
    for alike in batches.values():
        given = [weights[p] for p in alike], [observed[p] for p in alike], scheme
        for path, theirs, exact in zip(
            alike, peers_weights(*given), peers_weights(*given, torch.float64), strict=True
        ):
            factor = gptq.factor(observed[path].hessian, OPTIONS, GROUP)
            q = gptq.quantize(weights[path], scheme, factor, options=OPTIONS)
            ours = np.asarray(qjax.dequantize(q, jnp.float32))
            half = np.repeat(np.asarray(q.scale, np.float32), GROUP, axis=0) / 2
            differ[path] = np.abs(ours - theirs) >= half
            settled[path] = np.abs(exact - theirs) < half
    assert len(differ) == 7 * model.config.num_layers
    # 99.9 % of every module. Two ties can cost a small module as much, and where the peer itself decides
    # them otherwise in float64, it is the order of its sums that did, which its library picks by the CPU.
    shares = {path: 1 - (differ[path] & settled[path]).mean() for path in differ}
    assert min(shares.values()) >= 0.999, sorted(shares.items(), key=lambda item: item[1])[:5]
    assert np.mean(np.concatenate([d.ravel() for d in differ.values()])) <= 0.0005
    assert all(share.mean() >= 0.99 for share in settled.values())


def peers_weights(weights, statistics, scheme: str, precision=torch.float32) -> list[np.ndarray]:
    """What llm-compressor makes of weights of one shape: dequantized, ``[in, out]``.

    Args:
      weights: of one shape.
      statistics: of their inputs.
      scheme: of four bits, in groups.
      precision: that it computes in; as released, float32.
    """
    args = compressed_tensors.QuantizationArgs(
        num_bits=4,
        group_size=GROUP,
        strategy="group",
        symmetric="asym" not in scheme,
        actorder="static",
    )
    kernels = torch.stack([_tensor(w).T for w in weights])
    hessians = torch.stack([_tensor(s.hessian) for s in statistics])
    groups = kernels.unflatten(-1, (-1, GROUP))
    scale, zero = quantization_math.calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peer, "GPTQ_PRECISION", precision)
        result, _, fell_back = peer.quantize_weight(kernels, hessians, scale, zero, None, args)
    assert not fell_back.any()
    return [w.T.float().numpy() for w in result]


def _tensor(array):
    dtype = torch.bfloat16 if array.dtype == jnp.bfloat16 else torch.float32
    return torch.tensor(np.asarray(array, np.float32)).to(dtype)
