# SPDX-License-Identifier: Apache-2.0
import jax.numpy as jnp
import pytest
from flax import nnx

from qjax_models import Decoder, Generator, Sampling

forward = nnx.jit(Decoder.__call__)

PROMPTS = [[5, 9, 33, 2, 7, 7, 60], [11, 4], [3] * 20]
DRAW = Sampling(temperature=1.0, top_k=20, top_p=0.95)


def greedy_by_full_forward(model, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        padded = jnp.zeros((1, 40), jnp.int32).at[0, : len(tokens)].set(jnp.array(tokens))
        tokens.append(int(forward(model, padded)[0, len(tokens) - 1].argmax()))
    return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def model(goldens) -> Decoder:
    return goldens["llama"].model()


@pytest.fixture(scope="module")
def generator(model) -> Generator:
    return Generator(model, capacity=64)


@pytest.fixture(scope="module")
def drawing(model) -> Generator:
    return Generator(model, capacity=64, sampling=DRAW)


@pytest.fixture(scope="module")
def answers(generator) -> list[list[int]]:
    return generator.generate(PROMPTS, 12).tokens


def test_greedy_is_the_argmax_of_the_full_forward(golden):
    model = golden.model()
    found = Generator(model, capacity=40).generate(PROMPTS, 8)
    assert found.tokens == [greedy_by_full_forward(model, prompt, 8) for prompt in PROMPTS]
    assert found.stopped == [False] * 3


def test_a_row_alone_draws_the_same_tokens_as_in_the_batch(drawing):
    """Greedy rows do: each is the argmax of its own full forward."""
    together = drawing.generate(PROMPTS, 10, seed=5).tokens
    alone = [
        drawing.generate([prompt], 10, seed=5 + row).tokens[0] for row, prompt in enumerate(PROMPTS)
    ]
    assert together == alone


def test_seeds_are_reproducible_and_differ(model, drawing):
    prompts = PROMPTS[:1] * 3
    first = drawing.generate(prompts, 20, seed=1).tokens
    fresh = Generator(model, capacity=64, sampling=DRAW)
    assert first == fresh.generate(prompts, 20, seed=1).tokens
    assert first[0] != first[1]
    assert first != drawing.generate(prompts, 20, seed=9).tokens


def test_one_program_serves_every_number_of_tokens(model, monkeypatch):
    traces = []
    extend = Decoder.extend

    def counted(self, tokens, cache):
        traces.append(tokens.shape)
        return extend(self, tokens, cache)

    monkeypatch.setattr(Decoder, "extend", counted)
    generator = Generator(model, capacity=128)
    first = generator.generate(PROMPTS, 3)
    traced = len(traces)
    assert traced >= 1 and first.timing.compile_seconds > 0
    for max_new in (1, 2, 17, 70, 100):
        again = generator.generate(PROMPTS, max_new)
        assert [len(row) for row in again.tokens] == [max_new] * 3
        assert again.timing.compile_seconds < 0.1 * first.timing.compile_seconds
    assert len(traces) == traced


def test_prompts_of_one_bucket_share_a_program(model):
    generator = Generator(model, capacity=64)
    compiled = [
        generator.generate([[1] * length], 2).timing.compile_seconds for length in (17, 25, 32)
    ]
    assert compiled[0] > 20 * max(compiled[1:])


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_streaming_hands_out_the_same_tokens(generator, answers, chunk):
    parts = list(generator.stream(PROMPTS, 12, chunk=chunk))
    assert [sum((part.new_tokens[row] for part in parts), []) for row in range(3)] == answers
    assert all(len(row) <= max(chunk, 1) for part in parts for row in part.new_tokens)
    assert len(parts) == 1 + -(-11 // chunk)


def test_stop_tokens_end_their_row_only(model, answers):
    stops = (answers[0][3], answers[1][0])
    found = Generator(model, capacity=64, stop_tokens=stops).generate(PROMPTS, 12)
    for row, (tokens, stopped) in enumerate(zip(found.tokens, found.stopped, strict=True)):
        ends = [i for i, token in enumerate(answers[row]) if token in stops]
        assert tokens == answers[row][: ends[0] if ends else 12]
        assert stopped == bool(ends)
    assert found.tokens[1] == []


def test_the_loop_ends_when_every_row_has_stopped(model, answers):
    stops = [row[2] for row in answers]
    generator = Generator(model, capacity=64, stop_tokens=stops)
    parts = list(generator.stream(PROMPTS, 12, chunk=12))
    assert len(parts) == 2
    assert all(generator.generate(PROMPTS, 12).stopped)


def test_timing_counts_tokens(generator):
    timing = generator.generate(PROMPTS, 12).timing
    assert timing.prefill_tokens == sum(map(len, PROMPTS))
    assert timing.decode_tokens == 3 * 11
    assert timing.prefill_tokens_per_second > 0 and timing.decode_tokens_per_second > 0
    assert generator.generate(PROMPTS, 1).timing.decode_tokens_per_second == 0


def test_the_capacity_can_be_used_up(model, answers):
    generator = Generator(model, capacity=27)  # not a power of two
    assert generator.generate([PROMPTS[2]], 7).tokens == [answers[2][:7]]


def test_no_tokens_are_no_work(generator):
    found = generator.generate(PROMPTS, 0)
    assert found.tokens == [[], [], []] and found.timing.prefill_seconds == 0


@pytest.mark.parametrize(
    ("prompts", "max_new", "message"),
    [
        ([], 1, "no prompts"),
        ([[1], []], 1, "prompt 1 is empty"),
        ([[1, 64]], 1, "prompt 0 holds token id 64, but the model knows 0 to 63"),
        ([[-1]], 1, "prompt 0 holds token id -1"),
        ([[1] * 60], 5, "prompt 0 of 60 tokens and 5 new ones exceed the capacity of 64"),
        ([[1]], -1, "max_new=-1 must not be negative"),
    ],
)
def test_wrong_requests_are_one_line_errors(generator, prompts, max_new, message):
    with pytest.raises(ValueError, match=message) as error:
        generator.generate(prompts, max_new)
    assert "\n" not in str(error.value)


def test_wrong_chunks_are_refused(generator):
    with pytest.raises(ValueError, match=r"chunk=0 must be in 1..64"):
        next(generator.stream(PROMPTS, 2, chunk=0))


def test_bfloat16_generates(goldens):
    model = goldens["gemma3"].model(dtype="bfloat16")
    found = Generator(model, capacity=64).generate(PROMPTS, 5)
    assert [len(row) for row in found.tokens] == [5, 5, 5]
    assert all(0 <= token < 64 for row in found.tokens for token in row)
