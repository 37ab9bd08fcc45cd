# SPDX-License-Identifier: Apache-2.0
"""A decoder in a rotated basis computes what it did, whatever its family."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qjax import quantize_model, quantize_sequentially
from qjax.algorithms import rotation
from qjax.nnx_layers import named_variables
from qjax.post_training import copied
from qjax.rotating import RotatedStorage
from qjax.storage import Originals
from qjax_models import Decoder, DecoderConfig, blockwise, rotatable

forward = nnx.jit(Decoder.__call__)
FAMILIES = ["llama", "llama_linear", "mistral", "phi3", "phi3_longrope", "qwen2", "qwen3"]
# All that a decoder can have which a rotation passes through, and sizes that are no powers of two.
CONFIG = DecoderConfig(
    vocab_size=64, hidden_size=40, mlp_size=36, num_layers=2, num_heads=6, num_kv_heads=2, head_size=12,
    max_positions=64, norm_offset=1.0, query_key_norm=True, qkv_bias=True, output_bias=True,
    mlp_bias=True, tied_embeddings=True, embedding_scale=3.0, logit_softcap=20.0, initializer_std=0.3,
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 20)).astype(np.int32)


def rotated(model: Decoder, seed: int = 0) -> Decoder:
    """All parts as they are brought to be quantized."""
    result = copied(model)
    chain = blockwise(result, 8)
    storage = RotatedStorage(Originals(model), result, chain, rotation.Options(seed=seed))
    parts = {"model/embed_tokens": result.model.embed_tokens, "lm_head": result.lm_head,
             storage.norm: result.model.norm}  # fmt: skip
    for path, module in (parts | {block.path: block.module for block in chain.blocks}).items():
        storage.load(path, module)
    return result


def relative(a, b) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.fixture(scope="module")
def odd() -> Decoder:
    model = Decoder(CONFIG, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    for variable in named_variables(model).values():  # norms and biases of all sizes
        w = variable.get_value()
        if w.ndim == 1:
            variable.set_value(w + jnp.asarray(rng.uniform(-0.5, 3.0, w.shape), w.dtype))
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_stay_in_every_family(goldens, name):
    golden = goldens[name]
    scheme = "w4a4" if name in ("llama", "phi3", "qwen2") else "w4a16"
    form = rotatable(golden.model(), scheme)
    assert form.config.online_hadamard == (scheme == "w4a4") and not form.config.tied_embeddings
    turned = rotated(form)
    assert relative(forward(turned, jnp.asarray(golden.tokens)), golden.logits) < 1e-5
    # Nothing of the stream is what it was.
    q, q_before = (m.model.layers[0].self_attn for m in (turned, golden.model()))
    assert relative(q.o_proj.kernel[...], q_before.o_proj.kernel[...]) > 0.5
    assert all((np.asarray(v[...]) == 1).all() for path, v in named_variables(turned).items()
               if path.endswith("norm/weight") and "self_attn" not in path)  # fmt: skip


@pytest.mark.parametrize("scheme", ["w4a16", "w4a4"])
def test_logits_stay_with_biases_offsets_groups_and_a_tied_head(odd, scheme):
    expected = forward(odd, jnp.asarray(TOKENS))
    form = rotatable(odd, scheme)
    assert relative(forward(form, jnp.asarray(TOKENS)), expected) < 2e-5  # before, too
    turned = rotated(form, seed=5)
    assert relative(forward(turned, jnp.asarray(TOKENS)), expected) < 2e-5
    assert (turned.model.norm.weight[...] == 0).all()  # it multiplies by 1 + weight
    assert not (odd.model.norm.weight[...] == 0).any()  # the original stays


def test_a_bfloat16_model_is_rounded_once_a_weight(goldens):
    golden = goldens["llama"]
    narrow, wide = (golden.model(dtype=t) for t in (jnp.bfloat16, jnp.float32))
    for path, variable in named_variables(wide).items():
        variable.set_value(named_variables(narrow)[path].get_value().astype(jnp.float32))
    ours, exact = (named_variables(rotated(rotatable(m, "w4a16"))) for m in (narrow, wide))
    for path, variable in ours.items():
        expected = exact[path].get_value().astype(jnp.bfloat16)
        np.testing.assert_array_equal(variable.get_value(), expected, path)


def test_an_outlier_of_the_stream_is_gone():
    model = Decoder(replace(CONFIG, tied_embeddings=False), rngs=nnx.Rngs(0))
    table = model.model.embed_tokens.embedding
    table.set_value(table.get_value().at[:, 7].multiply(50.0))
    after = rotated(model).model.embed_tokens.embedding[...]
    largest, after = (np.abs(t).max(0) for t in (table[...], after))
    assert largest.max() > 20 * np.median(largest) and after.max() < 2 * np.median(after)


def test_factors_of_channels_do_not_hide_where_inputs_are_turned():
    folds = [
        blockwise(Decoder(replace(CONFIG, online_hadamard=online), rngs=nnx.Rngs(0)), 8)
        .blocks[0]
        .folds
        for online in (False, True)
    ]
    assert [len(found) for found in folds] == [4, 3] and set(folds[1]) < set(folds[0])


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("gemma2", "rotation: this model normalizes what each block adds"),
        ("gemma3", "rotation: this model normalizes what each block adds"),
        ("mixtral", "rotation: the norm before the experts feeds their router, too"),
        ("qwen3_moe", "rotation: the norm before the experts feeds their router, too"),
    ],
)
def test_streams_that_no_rotation_passes_through_are_refused(goldens, name, line):
    with pytest.raises(ValueError, match=line):
        rotatable(goldens[name].model(), "w4a16-g8")


def test_a_tied_head_has_to_be_untied_first(odd):
    with pytest.raises(ValueError, match=r"^rotation: .*qjax_models.rotatable"):
        quantize_sequentially(odd, blockwise, TOKENS, "w8a16-g4", method="rotation")


def test_a_quantized_layer_is_named(odd):
    quantized, _ = quantize_model(rotatable(odd, "w8a16"), "w8a16-channel")
    with pytest.raises(ValueError, match=r"^model/layers/0/.*: already quantized to int8"):
        quantize_sequentially(quantized, blockwise, TOKENS, "w8a16-channel", method="rotation")
    with pytest.raises(ValueError, match=r"^model/layers/0/.*: already quantized to int8"):
        rotatable(quantized, "w4a4-g4")
