# SPDX-License-Identifier: Apache-2.0
"""The steps of a training run: what they minimize, where they leave weights, and which windows they take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax import formats, qtensor
from qjax.qat import language_model, windows
from qjax.qat.fake_quantizer import LearnedScale
from qjax.qat.training import Settings, Trainer, dampen, optimizer, put_inside

VOCABULARY, WIDTH = 16, 32


class Tiny(nnx.Module):
    """A language model of one layer; the last token alone tells the next."""

    def __init__(self, rngs: nnx.Rngs):
        self.table = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.middle = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.outputs = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, tokens):
        return self.outputs(jax.nn.gelu(self.middle(self.table(tokens))))


def text(count: int = 32):
    """Windows of a walk in which each token names the next but for some noise."""
    rng = np.random.default_rng(0)
    tokens = [rng.integers(VOCABULARY, size=count)]
    for _ in range(11):
        noise = rng.random(count) < 0.1
        tokens.append(
            np.where(noise, rng.integers(VOCABULARY, size=count), (tokens[-1] * 5 + 3) % 16)
        )
    return np.stack(tokens, axis=1).astype(np.int32)


@pytest.mark.parametrize(
    ("share", "learned"), [(1.0, True), (0.0, True), (0.5, False)], ids=["teacher", "text", "both"]
)
def test_it_learns(share: float, learned: bool) -> None:
    teacher = Tiny(nnx.Rngs(0))
    start, _ = qjax.quantize_model(teacher, "w2a16-g16")
    settings = Settings(steps=60, batch=8, rate=3e-2, scale_rate=1e-3, warmup=5, distillation=share)
    trainer = Trainer(qjax.trainable(start, learned=learned), settings, teacher if share else None)
    state, losses = trainer.start(), []
    for step in range(settings.steps):
        state, loss = trainer.step(state, windows.batch(text(), step, settings.batch, 0))
        losses.append(float(loss))
    assert np.mean(losses[-5:]) < 0.6 * losses[0]
    model, tokens = trainer.model(state), text()
    result = qjax.quantized(model)
    np.testing.assert_allclose(result(tokens), model(tokens), atol=1e-4)
    held = qjax.nnx_layers.quantized_layers(result)
    assert all(q.scheme.name == "w2a16-g16" for q in held.values()) and len(held) == 2
    # The model that it began with is as it was.
    np.testing.assert_array_equal(
        qtensor.dequantize(start.middle.kernel[...]),
        qtensor.dequantize(qjax.quantize_model(teacher, "w2a16-g16")[0].middle.kernel[...]),
    )


def test_the_loss_is_the_mixture_that_it_says() -> None:
    teacher = Tiny(nnx.Rngs(1))
    model = qjax.trainable(qjax.quantize_model(Tiny(nnx.Rngs(0)), "w4a16-g32")[0])
    settings = Settings(steps=1, distillation=0.25)
    trainer, tokens = Trainer(model, settings, teacher), text(4)
    _, loss = trainer.step(trainer.start(), tokens)
    log_q, log_p = (np.asarray(jax.nn.log_softmax(m(tokens)))[:, :-1] for m in (model, teacher))
    read = -np.take_along_axis(log_q, tokens[:, 1:, None], -1).mean()
    learned = (np.exp(log_p) * (log_p - log_q)).sum(-1).mean()
    assert float(loss) == pytest.approx(0.25 * learned + 0.75 * read, rel=1e-5)
    assert float(language_model.distillation_loss(model(tokens), model(tokens))) == 0


def test_a_step_is_a_function_of_its_state() -> None:
    teacher = Tiny(nnx.Rngs(0))
    model = qjax.trainable(qjax.quantize_model(teacher, "w3a16-g32-asym")[0])
    ends = []
    for _ in range(2):
        trainer = Trainer(model, Settings(steps=5), teacher)
        state = trainer.start()
        for step in range(5):
            state, _ = trainer.step(state, windows.batch(text(), step, 16, 0))
        ends.append(state)
    jax.tree.map(np.testing.assert_array_equal, *ends)


@pytest.mark.parametrize("scheme", ["w2a16-g32", "w3a16-g16-asym", "fp8-a16", "w8a8", "nvfp4"])
def test_weights_stay_inside_their_grids(scheme: str) -> None:
    half = nnx.clone(Tiny(nnx.Rngs(0)))  # scales are stored in 16 bits, or in 8
    nnx.update(half, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), nnx.state(half)))
    model = qjax.trainable(qjax.quantize_model(half, scheme)[0])
    scales = nnx.state(model, LearnedScale)
    nnx.update(model, jax.tree.map(lambda leaf: leaf * 1.003, scales))
    fmt = model.middle.promote_dtype.form.scheme.weights.format

    def values():
        return formats.decode(qtensor.unpacked(qjax.quantized(model).middle.kernel[...]), fmt)

    before, kernel = values(), model.middle.kernel
    kernel.set_value(kernel[...].at[0].set(100.0).at[1].set(-100.0))
    put_inside(model)
    after = values()
    assert (after[0] == fmt.high).all() and (after[1] == fmt.low).all()
    np.testing.assert_array_equal(after[2:], before[2:])
    # Whatever lies there has a gradient again.
    slopes = nnx.grad(lambda m: m.middle(jnp.ones((1, WIDTH))).sum())(model)
    assert (slopes.middle.kernel[...] != 0).all()
    assert nnx.state(model, LearnedScale)


@pytest.mark.parametrize("scheme", ["w2a16-g32", "w3a16-g16-asym", "fp8-a16"])
@pytest.mark.parametrize("trained", ["scales follow", "learned"])
def test_weights_are_drawn_to_what_they_will_be_worth(scheme: str, trained: str) -> None:
    plain = Tiny(nnx.Rngs(0))
    if trained == "learned":
        model = qjax.trainable(qjax.quantize_model(plain, scheme)[0])
        noise = jax.random.normal(jax.random.key(1), (WIDTH, WIDTH)) * 0.02
        model.middle.kernel.set_value(model.middle.kernel[...] + noise)
        put_inside(model)
    else:
        model = qjax.fake_quant(plain, scheme)
    before = np.asarray(model.middle.kernel[...])
    held = qjax.quantized(model).middle.kernel[...]
    worth = np.asarray(qtensor.dequantize(held, jnp.float32))
    assert np.abs(worth - before).max() > 1e-3
    dampen(model, 0.25)
    after = np.asarray(model.middle.kernel[...])
    np.testing.assert_allclose(after, before + 0.25 * (worth - before), atol=1e-7)
    if trained == "learned":  # no code changes
        codes = qjax.quantized(model).middle.kernel[...].codes
        np.testing.assert_array_equal(codes, held.codes)


def test_swinging_weights_come_to_rest() -> None:
    """Between two codes whichever a weight takes, the gradient names the other: until it is drawn there."""
    teacher = Tiny(nnx.Rngs(0))
    start, _ = qjax.quantize_model(teacher, "w2a16-g16")

    def swinging(dampening: float) -> float:
        settings = Settings(steps=150, batch=32, rate=3e-2, dampening=dampening)
        trainer = Trainer(qjax.trainable(start, learned=False), settings, teacher)
        state, changed, before = trainer.start(), 0, None
        for step in range(settings.steps):
            state, _ = trainer.step(state, windows.batch(text(), step, settings.batch, 0))
            codes = np.asarray(qjax.quantized(trainer.model(state)).middle.kernel[...].codes)
            if step > 100:
                changed += int((codes != before).sum())
            before = codes
        return changed / codes.size

    assert swinging(0.2) < 0.5 * swinging(0.0)


@pytest.mark.parametrize("steps", [1, 5, 200])
def test_rates_rise_and_fall_in_runs_of_any_length(steps: int) -> None:
    settings = Settings(steps=steps, rate=1.0, clip=1e9, distillation=0.0)
    tx = optimizer(settings)
    params = {"scales": {"s": jnp.ones(1)}, "others": {"w": jnp.full(1, -1.0)}}
    state, moves = tx.init(params), []
    for _ in range(steps):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        moves.append(
            -float(updates["others"]["w"][0])
        )  # Adam's steps of equal gradients are its rate
    assert moves[0] > 0 and max(moves) == pytest.approx(1.0, rel=1e-3)
    if steps == 200:
        assert np.argmax(moves) == 20 and 0 <= moves[-1] < 1e-3


def test_a_round_shows_every_window_once() -> None:
    tokens = np.arange(7)[:, None]
    seen = np.concatenate([windows.batch(tokens, step, 3, seed=1) for step in range(14)])[:, 0]
    rounds = seen.reshape(6, 7)
    assert all(sorted(one) == list(range(7)) for one in rounds.tolist())
    assert len({tuple(one) for one in rounds.tolist()}) == 6
    other = np.concatenate([windows.batch(tokens, step, 3, seed=2) for step in range(14)])[:, 0]
    assert (seen != other).any()


def test_bad_input() -> None:
    plain = Tiny(nnx.Rngs(0))
    model = qjax.fake_quant(plain, "w4a16-g32")
    with pytest.raises(ValueError, match="needs a teacher"):
        Trainer(model, Settings(steps=1))
    with pytest.raises(ValueError, match="no layer of the model trains with fake quantization"):
        Trainer(plain, Settings(steps=1, distillation=0.0))
    for wrong in ({"steps": 0}, {"rate": 0.0}, {"distillation": 2.0}, {"dampening": -0.1}):
        with pytest.raises(ValueError, match="steps|rates|share"):
            Settings(**{"steps": 1, **wrong})
