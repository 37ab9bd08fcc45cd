# SPDX-License-Identifier: Apache-2.0
"""Text and ids: the bos rule, the ends of a text, and characters that span tokens."""

import json

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from qjax_checkpoints.tokenizer import load_tokenizer

TEXT = "naïve 東京 🙂🏽 end"


def byte_level(template: bool = False) -> tokenizers.Tokenizer:
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    if template:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 256)]
        )
    return backend


@pytest.fixture
def write(tmp_path):
    """Writes a tokenizer directory."""

    def write(backend, **files):
        backend.save(str(tmp_path / "tokenizer.json"))
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return tmp_path

    return write


def test_round_trip(write):
    tokenizer = load_tokenizer(write(byte_level()), vocab_size=258)
    ids = tokenizer.encode(TEXT)
    assert len(ids) == len(TEXT.encode())
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.decode([256, *ids, 257]) == TEXT


@pytest.mark.parametrize("template", [False, True])
@pytest.mark.parametrize("adds_bos", [None, False, True])
@pytest.mark.parametrize("bos", ["<s>", {"content": "<s>", "special": True}])
def test_bos_rule(write, template, adds_bos, bos):
    settings = {"bos_token": bos, "add_bos_token": adds_bos}
    path = write(byte_level(template), tokenizer_config=settings)
    first = load_tokenizer(path, vocab_size=258).encode("a")[0]
    assert (first == 256) == (template if adds_bos is None else adds_bos)


def test_bos_rule_without_a_bos_token(write):
    path = write(byte_level(), tokenizer_config={"bos_token": None, "add_bos_token": True})
    assert len(load_tokenizer(path, vocab_size=258).encode("a")) == 1


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, ()),
        ({"tokenizer_config": {"eos_token": "</s>"}}, (257,)),
        ({"tokenizer_config": {"eos_token": "</s>"}, "config": {"eos_token_id": 3}}, (3,)),
        ({"config": {"eos_token_id": 3}, "generation_config": {"eos_token_id": [4, 5]}}, (4, 5)),
        ({"config": {"eos_token_id": 3}, "generation_config": {}}, (3,)),
        ({"config": {"eos_token_id": None}}, ()),
    ],
)
def test_ends_of_text(write, files, expected):
    assert load_tokenizer(write(byte_level(), **files), vocab_size=258).eos_ids == expected


def test_stream_holds_back_half_characters(write):
    tokenizer = load_tokenizer(write(byte_level()), vocab_size=258)
    ids = tokenizer.encode(TEXT)
    pieces = list(tokenizer.stream(iter(ids)))
    assert pieces == list(TEXT)  # one byte a token, one piece a character


def test_stream_is_lazy(write):
    tokenizer = load_tokenizer(write(byte_level()), vocab_size=258)

    def ids():
        yield from tokenizer.encode("a")
        raise AssertionError("asked for a second token before the first piece was taken")

    assert next(tokenizer.stream(ids())) == "a"


def test_stream_of_broken_bytes(write):
    tokenizer = load_tokenizer(write(byte_level()), vocab_size=258)
    euro = tokenizer.encode("€")
    for ids in ([*euro[:2]], [*euro[:2], *tokenizer.encode("ab")], [euro[1]] * 40, [], [257, 257]):
        assert "".join(tokenizer.stream(ids)) == tokenizer.decode(ids)


def test_stream_keeps_the_spaces_of_a_sentencepiece_decoder(write):
    vocab = {"<unk>": 0, "▁the": 1, "▁cat": 2, "s": 3, "<0xE2>": 4, "<0x82>": 5, "<0xAC>": 6}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer = load_tokenizer(write(backend), vocab_size=7)
    ids = [1, 2, 3, 4, 5, 6, 1]
    assert list(tokenizer.stream(ids)) == ["the", " cat", "s", "€", " the"]


def test_settings_that_cut_texts_are_lifted(write):
    backend = byte_level()
    backend.enable_truncation(3)
    backend.enable_padding(length=5, pad_id=0)
    ids = load_tokenizer(write(backend), vocab_size=258).encode("abcdefg")
    assert len(ids) == 7


def test_no_tokenizer(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}: has no tokenizer.json"):
        load_tokenizer(tmp_path, vocab_size=1)


def test_broken_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match="tokenizer.json: not a tokenizer") as caught:
        load_tokenizer(tmp_path, vocab_size=1)
    assert "\n" not in str(caught.value)


def test_vocabulary_larger_than_the_model(write):
    with pytest.raises(ValueError, match="vocabulary has 258 entries, the model's only 257"):
        load_tokenizer(write(byte_level()), vocab_size=257)
