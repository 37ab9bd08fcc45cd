# SPDX-License-Identifier: Apache-2.0
"""Keys and values in few bits: scales of what quantized blocks give, one result however tokens come."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qjax import Method, Recipe, kv_cache, nnx_layers, quantize_sequentially
from qjax.algorithms import rotation
from qjax_models import Decoder, DecoderConfig, blockwise, cache, rotatable
from qjax_models.config import ExpertsConfig

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "mlp_size": 48, "num_layers": 2, "num_heads": 4,
    "num_kv_heads": 2, "head_size": 8, "max_positions": 128, "initializer_std": 0.3,
}  # fmt: skip
FAMILIES = {
    "llama": {},
    "phi3": {"fused_projections": True},
    "qwen3": {"query_key_norm": True},
    "gemma2": {"post_norms": True, "norm_offset": 1.0, "attention_softcap": 20.0,
               "sliding_layers": (0,), "sliding_window": 5},
    "mixtral": {"experts": ExpertsConfig(count=4, per_token=2, mlp_size=48, normalized=True)},
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 64, (10, 24)).astype(np.int32)
SEQUENCES = jnp.asarray(TOKENS)
KV = "kv-fp8-static"
TOPS = {"kv-fp8": 448, "kv-int8": 128, "kv-int4": 8}  # magnitudes of the lowest codes


def decoder(family: str = "llama", **options) -> Decoder:
    return Decoder(DecoderConfig(**SIZES, **FAMILIES[family]), rngs=nnx.Rngs(0), **options)


def calibrated(model: Decoder, scheme="w8a16-channel", method="rtn", **options) -> Decoder:
    model = model.with_kv_cache(KV)
    return quantize_sequentially(model, blockwise, TOKENS, scheme, method=method, **options)[0]


def rounded(x: jax.Array, scale: jax.Array) -> jax.Array:
    codes = jnp.clip(x / scale, -448, 448).astype(jnp.float8_e4m3fn)
    # Else XLA on a GPU leaves both conversions out.
    return jax.lax.optimization_barrier(codes).astype(x.dtype) * scale


def seen(heads: jax.Array, scheme: str, scale: jax.Array | None) -> jax.Array:
    """What is left of keys or values, in their own basis, by the definition."""
    if scale is not None:
        return rounded(heads, scale)
    size = heads.shape[-1]
    basis = np.eye(size)
    if scheme == "kv-int4":
        kronecker = functools.reduce(np.kron, rotation.factors(size))
        basis = np.diag(rotation.signs(size, 0)) @ kronecker
    x = jnp.einsum("...h,hj->...j", heads, basis, precision="highest")
    largest = jnp.take_along_axis(
        x, jnp.abs(x).argmax(-1, keepdims=True), axis=-1
    )  # one group a head
    step = -largest / TOPS[scheme]
    if scheme == "kv-fp8":
        x = rounded(x, step)
    else:
        x = jnp.clip(jnp.round(x / step), -TOPS[scheme], TOPS[scheme] - 1) * step
    return jnp.einsum("...j,hj->...h", x, basis, precision="highest")


@nnx.jit
def by_hand(model: Decoder) -> tuple[jax.Array, list[jax.Array]]:
    """Logits of attention over rounded keys and values, written out; and the largest of them."""
    config, length = model.config, SEQUENCES.shape[1]
    chain = blockwise(model, length)
    x, largest = model.model.embed(SEQUENCES), []
    for index, block in enumerate(model.model.layers):
        (angles, _), attention = chain.blocks[index].context, block.self_attn
        queries, keys, values = attention.rotated_heads(block.input_layernorm(x), angles)
        largest += [jnp.abs(keys).max(), jnp.abs(values).max()]
        scales = (None, None)
        if config.has_static_cache:
            scales = attention.k_scale[0], attention.v_scale[0]
        keys, values = (
            seen(a, config.kv_cache, scale) for a, scale in zip((keys, values), scales, strict=True)
        )
        keys, values = (jnp.repeat(a, config.queries_per_kv_head, axis=2) for a in (keys, values))
        scores = jnp.einsum("btnh,bsnh->bnts", queries, keys) * config.attention_scale
        if cap := config.attention_softcap:
            scores = cap * jnp.tanh(scores / cap)
        behind = np.arange(length)[:, None] - np.arange(length)
        visible = (behind >= 0) & (behind < (config.window(index) or length))
        weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
        mixed = jnp.einsum("bnts,bsnh->btnh", weights, values)
        mixed = attention.o_proj(mixed.reshape(*mixed.shape[:2], -1))
        if config.post_norms:
            x = x + block.post_attention_layernorm(mixed)
            inner = block.mlp(block.pre_feedforward_layernorm(x))
            x = x + block.post_feedforward_layernorm(inner)
        else:
            x = x + mixed
            x = x + block.transform(block.post_attention_layernorm(x))
    return model.logits(model.model.norm(x)), largest


pytestmark = pytest.mark.one_version


@pytest.mark.parametrize("family", FAMILIES)
def test_scales_and_logits_written_out(family):
    model = calibrated(decoder(family))
    expected, largest = by_hand(model)
    scales = [float(s.get_value()[0]) for s in kv_cache.scales_of(model).values()]
    np.testing.assert_allclose(scales, np.array(largest) / 448, rtol=1e-4)
    assert len(set(scales)) == 2 * model.config.num_layers
    near_by_hand(model, expected)


@pytest.mark.parametrize(
    ("scheme", "family"),
    [
        *((scheme, "llama") for scheme in kv_cache.DYNAMIC),
        *(("kv-int4", name) for name in FAMILIES),
    ],
)
def test_dynamic_schemes_written_out(scheme, family):
    model = decoder(family).with_kv_cache(scheme)
    assert not kv_cache.scales_of(model)
    near_by_hand(model, by_hand(model)[0])
    far = jnp.abs(model(SEQUENCES) - decoder(family)(SEQUENCES)).max()
    assert far > 1e-3


def near_by_hand(model: Decoder, expected: jax.Array) -> None:
    logits = nnx.jit(Decoder.__call__)(model, SEQUENCES)
    # A code may fall to the other side of its tie where sums are taken in another order.
    np.testing.assert_allclose(logits, expected, atol=0.03 * float(jnp.abs(expected).max()))
    assert np.median(np.abs(logits - expected)) < 1e-5 * float(jnp.abs(expected).max())


@pytest.mark.parametrize(
    ("scheme", "family"),
    [*((scheme, "llama") for scheme in kv_cache.SCHEMES), (KV, "gemma2"), ("kv-int4", "gemma2")],
)
def test_token_by_token_gives_what_the_whole_sequence_does(scheme, family):
    model = calibrated(decoder(family)) if scheme == KV else decoder(family).with_kv_cache(scheme)
    whole = model.hidden(SEQUENCES)
    prompt = 10
    hidden, kept = model.prefill(SEQUENCES[:, :prompt], jnp.full(len(TOKENS), prompt), 30)
    steps = [hidden]
    for t in range(prompt, TOKENS.shape[1]):
        hidden, kept = model.extend(SEQUENCES[:, t : t + 1], kept)
        steps.append(hidden)
    held = {codes.codes.dtype.name for layer in kept.layers for codes in layer}
    codes = {"kv-int8": "int8", "kv-int4": "uint8"}
    assert held == {codes.get(scheme, "float8_e4m3fn")}
    stepwise = np.concatenate(steps, axis=1)
    assert np.median(np.abs(stepwise - whole)) < 1e-5 * float(jnp.abs(whole).max())
    np.testing.assert_allclose(stepwise, whole, atol=0.03 * float(jnp.abs(whole).max()))


@pytest.mark.parametrize(
    ("scheme", "family"), [("kv-int8", "llama"), ("kv-int4", "gemma2"), (KV, "qwen3")]
)
def test_codes_that_go_into_the_products_give_what_decoded_ones_do(monkeypatch, scheme, family):
    model = calibrated(decoder(family)) if scheme == KV else decoder(family).with_kv_cache(scheme)
    _, held = model.prefill(SEQUENCES[:, :-1], jnp.full(len(TOKENS), 23), 30)
    given, programs = [], set()
    for decodes_first in (True, False):
        monkeypatch.setattr(cache, "decodes_first", lambda first=decodes_first: first)
        step = jax.jit(lambda held: model.extend(SEQUENCES[:, -1:], held)[0])
        programs.add(str(jax.make_jaxpr(step)(held)))
        given.append(step(held))
    assert len(programs) == 2
    np.testing.assert_allclose(*given, atol=1e-5 * float(jnp.abs(given[0]).max()))


def test_the_cache_takes_a_quarter_of_float32():
    plain = decoder().prefill(SEQUENCES, jnp.full(len(TOKENS), 24), 40)[1].layers
    coded = calibrated(decoder()).prefill(SEQUENCES, jnp.full(len(TOKENS), 24), 40)[1].layers
    total = [sum(a.nbytes for a in jax.tree.leaves(layers)) for layers in (plain, coded)]
    assert total[0] == 4 * total[1]


@pytest.mark.parametrize(
    ("scheme", "bits"), [("kv-fp8", 8.25), ("kv-int8", 8.25), ("kv-int4", 4.5)]
)
def test_bits_of_a_number_in_heads_of_128(scheme, bits):
    sizes = SIZES | {"head_size": 128, "num_heads": 2, "num_kv_heads": 1}
    model = Decoder(DecoderConfig(**sizes), rngs=nnx.Rngs(0)).with_kv_cache(scheme)
    layers = model.prefill(SEQUENCES, jnp.full(len(TOKENS), 24), 40)[1].layers
    numbers = 2 * len(layers) * len(TOKENS) * 40 * 128
    assert 8 * sum(a.nbytes for a in jax.tree.leaves(layers)) / numbers == bits


def test_before_calibration_everything_is_as_it_was():
    model = decoder()
    waiting = model.with_kv_cache(KV)
    np.testing.assert_array_equal(waiting(SEQUENCES), model(SEQUENCES))
    assert waiting.config.kv_cache == KV and model.config.kv_cache is None
    assert set(kv_cache.scales_of(waiting)) == {
        f"model/layers/{i}/self_attn/{name}" for i in range(2) for name in ("k_scale", "v_scale")
    }


def test_a_quantized_model_takes_another_cache_and_shares_its_arrays():
    model = calibrated(decoder())
    other = model.with_kv_cache("kv-int4")
    assert not kv_cache.scales_of(other) and len(kv_cache.scales_of(model)) == 4
    ours, theirs = (dict(nnx_layers.quantized_layers(m)) for m in (other, model))
    assert ours and all(ours[path].codes is theirs[path].codes for path in ours)
    near_by_hand(other, by_hand(other)[0])
    again = model.with_kv_cache(KV)  # static already: its scales stay
    np.testing.assert_array_equal(again(SEQUENCES), model(SEQUENCES))


@pytest.mark.parametrize("method", ["gptq", "awq", "learned", "rotation+gptq"])
def test_the_first_block_is_calibrated_on_exact_keys_and_values(method):
    """Its codes are those of a model without a quantized cache; the next sees what that costs."""
    model, scheme = decoder(), "w4a16-g16"
    form = rotatable(model, scheme) if method.startswith("rotation") else model
    plain = quantize_sequentially(form, blockwise, TOKENS, scheme, method=method)[0]
    coded = calibrated(form, scheme, method)
    ours, theirs = (dict(nnx_layers.quantized_layers(m)) for m in (coded, plain))
    same = {path: np.array_equal(ours[path].codes, theirs[path].codes) for path in ours}
    assert all(equal for path, equal in same.items() if path.startswith("model/layers/0/"))
    assert not all(same.values())


def test_values_are_scaled_as_their_fold_leaves_them():
    """AWQ divides values by factors that o_proj takes back: the scale is that of what is kept."""
    model = calibrated(decoder(), "w4a16-g16", "awq")
    scales = [float(s.get_value()[0]) for s in kv_cache.scales_of(model).values()]
    np.testing.assert_allclose(scales, np.array(by_hand(model)[1]) / 448, rtol=1e-4)
    plain = calibrated(decoder(), "w4a16-g16")
    unfolded = [float(s.get_value()[0]) for s in kv_cache.scales_of(plain).values()]
    assert not np.allclose(scales[1::2], unfolded[1::2], rtol=1e-2)


def test_keys_of_zeros():
    model = decoder()
    for block in model.model.layers:
        kernel = block.self_attn.k_proj.kernel
        kernel.set_value(jnp.zeros_like(kernel.get_value()))
    assert np.isfinite(calibrated(model)(SEQUENCES)).all()


def test_a_gradient_passes_through():
    model = calibrated(decoder(), Recipe.from_json([["lm_head", "w8a16-channel"], [".*", None]]))
    loss = lambda m: jnp.mean(m(SEQUENCES) ** 2)  # noqa: E731
    slopes = nnx.grad(loss)(model)
    exact = nnx.grad(loss)(decoder())
    ours = slopes["model"]["layers"][0]["self_attn"]["k_proj"]["kernel"].get_value()
    theirs = exact["model"]["layers"][0]["self_attn"]["k_proj"]["kernel"].get_value()
    assert float(jnp.abs(ours).max()) > 0
    assert float(jnp.vdot(ours, theirs) / jnp.linalg.norm(ours) / jnp.linalg.norm(theirs)) > 0.9


def test_bfloat16():
    model = calibrated(decoder(dtype=jnp.bfloat16))
    assert {s.get_value().dtype for s in kv_cache.scales_of(model).values()} == {
        jnp.dtype("float32")
    }
    whole = model.hidden(SEQUENCES).astype(jnp.float32)
    _, kept = model.prefill(SEQUENCES[:, :-1], jnp.full(len(TOKENS), 23), 30)
    last, _ = model.extend(SEQUENCES[:, -1:], kept)
    error = jnp.linalg.norm(last[:, 0] - whole[:, -1]) / jnp.linalg.norm(whole[:, -1])
    assert float(error) < 0.05


def test_refusals():
    with pytest.raises(ValueError, match="unknown scheme of the cache 'kv-int2'; there are kv-fp8"):
        decoder().with_kv_cache("kv-int2")
    waiting = decoder().with_kv_cache(KV)
    none = np.zeros((0, 1), np.int32)
    with pytest.raises(ValueError, match="a quantized cache has scales from calibration"):
        quantize_sequentially(waiting, blockwise, none, "w8a16-channel", method=Method())
    norm = waiting.model.layers[1].input_layernorm.weight
    norm.set_value(norm.get_value().at[0].set(jnp.nan))
    with pytest.raises(ValueError, match="layers/1/self_attn/k_scale: keys or values are not fin"):
        calibrated(waiting)
