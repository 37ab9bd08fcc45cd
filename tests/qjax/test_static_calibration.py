# SPDX-License-Identifier: Apache-2.0
"""Where static scales come from: the largest input of each layer over all calibration tokens."""

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.algorithms import learned_rounding
from qjax.blockwise import Block, Blockwise, Channels, Fold
from qjax.method import Method
from qjax.nnx_layers import quantized_layers

pytestmark = pytest.mark.one_version
WIDTH, INNER = 16, 24


class MLP(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.gate = nnx.Linear(WIDTH, INNER, rngs=rngs)
        self.up = nnx.Linear(WIDTH, INNER, rngs=rngs)
        self.down = nnx.Linear(INNER, WIDTH, use_bias=False, rngs=rngs)

    def inner(self, x):
        normed = self.norm(x)
        return jax.nn.silu(self.gate(normed)) * self.up(normed)

    def __call__(self, x):
        return x + self.down(self.inner(x))


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(32, WIDTH, rngs=rngs)
        self.blocks = nnx.List([MLP(rngs) for _ in range(2)])
        self.lm_head = nnx.Linear(WIDTH, 32, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


FOLDS = (
    Fold(producer=Channels(path="norm"), consumers=("gate", "up")),
    Fold(producer=Channels(path="up"), consumers=("down",)),
)


def chain(model: Model, length: int) -> Blockwise:
    del length
    blocks = tuple(
        Block(path=f"blocks/{i}", module=block, context=None, folds=FOLDS)
        for i, block in enumerate(model.blocks)
    )
    return Blockwise(blocks=blocks, enter=model.embed, apply=lambda block, x, context: block(x))


@pytest.fixture(scope="module")
def model() -> Model:
    """Channels of very different sizes, which SmoothQuant evens out."""
    model = Model(nnx.Rngs(0))
    rng = np.random.default_rng(0)
    for block in model.blocks:
        block.norm.scale.set_value(jnp.asarray(4.0 ** rng.uniform(-1, 2, WIDTH), jnp.float32))
        block.up.bias.set_value(jnp.asarray(rng.standard_normal(INNER) * 3, jnp.float32))
    return model


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 32, (6, 40)).astype(np.int32)


LEARNED = Method(learned=learned_rounding.Options(steps=4, batch=1))


@pytest.mark.parametrize(
    ("method", "scheme"),
    [("rtn", "w8a8-static"), ("gptq", "fp8-static"), ("smoothquant+gptq", "w8a8-static"),
     ("awq", "w4afp8-g8-static"), (LEARNED, "w8a8-g8-static")],
)  # fmt: skip
def test_scales_are_of_the_inputs_as_the_method_leaves_them(model, tokens, method, scheme):
    result, report = qjax.quantize_sequentially(
        model, chain, tokens, scheme, method=method, batch_size=4
    )
    entries = {layer.path: layer for layer in report.layers}
    held, x = quantized_layers(result), model.embed(tokens)
    folded = False
    for i, (before, block) in enumerate(zip(model.blocks, result.blocks, strict=True)):
        high = block.gate.kernel[...].activations.format.high
        # What is folded into `up` shows in its bias.
        factor = before.up.bias[...] / block.up.bias[...]
        folded = folded or bool((before.norm.scale[...] != block.norm.scale[...]).any())
        largest = {
            "gate": jnp.abs(block.norm(x)).max(),
            "up": jnp.abs(block.norm(x)).max(),
            "down": jnp.abs(before.inner(x) / factor).max(),
        }
        for name, absmax in largest.items():
            path = f"blocks/{i}/{name}"
            scale = held[path].input_scale
            assert scale.dtype == jnp.float32 and scale.shape == ()
            np.testing.assert_allclose(scale, absmax / high, rtol=1e-5)
            assert entries[path].input_scale == float(scale) and held[path].scheme.is_static
            assert entries[path].calibration_rows == tokens.size
        x = block(x)
    assert folded == (method in ("smoothquant+gptq", "awq"))
    assert entries["lm_head"].input_scale is None
    exact = np.asarray(model(tokens))
    wrong = np.linalg.norm(result(tokens) - exact) / np.linalg.norm(exact)
    assert 0 < wrong < (0.2 if "w4" in scheme else 0.1)


def test_smoothing_is_chosen_for_the_static_product(model, tokens):
    """Channels a hundred times as large as others leave those no codes; with factors they have some."""
    results = {
        method: qjax.quantize_sequentially(model, chain, tokens, "w8a8-static", method=method)[0]
        for method in ("rtn", "smoothquant")
    }
    exact = model(tokens)
    wrong = {name: float(jnp.linalg.norm(m(tokens) - exact)) for name, m in results.items()}
    assert wrong["smoothquant"] < 0.7 * wrong["rtn"]


def test_dynamic_layers_of_a_mixed_recipe_stay_dynamic(model, tokens):
    recipe = qjax.Recipe.from_json([[".*down", "w8a8-static"], [".*gate", "w8a8"], [".*", None]])
    result, report = qjax.quantize_sequentially(model, chain, tokens, recipe, method="rtn")
    scales = {path: q.input_scale for path, q in quantized_layers(result).items()}
    assert {path.split("/")[-1]: scale is not None for path, scale in scales.items()} == {
        "gate": False,
        "down": True,
    }
    assert [layer.input_scale is not None for layer in report.quantized] == [True, False] * 2


def test_a_whole_model_takes_them_from_what_it_was_shown(model, tokens):
    observed = qjax.calibrate(model, [tokens[:2], tokens[2:]], hessians=False)
    result, _ = qjax.quantize_model(model, "w8a8-static", observed)
    found = result.blocks[0].down.kernel[...].input_scale
    inner = model.blocks[0].inner(model.embed(tokens))
    np.testing.assert_allclose(found, jnp.abs(inner).max() / 127, rtol=1e-6)
    with pytest.raises(
        ValueError, match="^w8a8-static needs what the layers multiply: give qjax.cal"
    ):
        qjax.quantize_model(model, "w8a8-static")


def test_what_nobody_can_calibrate_is_refused(model, tokens):
    def fails(message, *args, **options):
        with pytest.raises(ValueError, match=message):
            qjax.quantize_sequentially(model, chain, *args, **options)

    fails("^w8a8-static has input scales from calibration: it needs tokens, got none",
          tokens[:0], "w8a8-static", method="rtn")  # fmt: skip
    rules = qjax.Recipe.from_json([["lm_head", "fp8-static"], [".*", "w8a8"]])
    fails("^lm_head: a static scheme has an input scale from calibration, which sees what layers in blo",
          tokens, rules, method="rtn")  # fmt: skip
    fails(
        "^llm-int8 keeps outliers .* not for w8a8-static", tokens, "w8a8-static", method="llm-int8"
    )
    partial = nnx.Sequential(nnx.Linear(8, 8, rngs=nnx.Rngs(0)))
    seen = qjax.calibrate(partial, [jnp.ones((2, 8))], hessians=False)
    two = nnx.List([nnx.Linear(8, 8, rngs=nnx.Rngs(0)), partial])
    with pytest.raises(
        ValueError,
        match="^layers/1/layers/0: w8a8-static has an input scale from calibration, which",
    ):
        qjax.quantize_model(nnx.Sequential(*two), "w8a8-static", seen)


def test_layers_of_one_weight_and_two_inputs_are_refused(tokens):
    class Twice(nnx.Module):
        def __init__(self):
            self.first = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
            self.second = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
            self.second.kernel = self.first.kernel

        def __call__(self, x):
            return self.second(jnp.tanh(self.first(x)))

    observed = qjax.calibrate(Twice(), [jnp.ones((4, 8))], hessians=False)
    with pytest.raises(
        ValueError, match="^second: shares the weight of first and multiplies other in"
    ):
        qjax.quantize_model(Twice(), "w8a8-static", observed)
