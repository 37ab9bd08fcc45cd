# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from shipped_model_training import corpus, tokenizer

TEXTS = [Path(module.__file__).read_text() for module in (corpus, tokenizer) if module.__file__]
HARD_TEXTS = [
    "",
    " ",
    "\n\n    \n\treturn x\r\n",
    "def f(x):\n    return {\n        'a': 1234567,\n    }\n\n\n",
    "tabs\t\tand  spaces   \n   \n",
    "naïve 漢字 🙂 e\u0301 \u2028 \u00a0 end",
    "\x00\x07\x7f",
    "a<|endoftext|>b",
    "".join(map(chr, [*range(0xD800), *range(0xE000, 0xF000)])),
]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return tokenizer.train_tokenizer(TEXTS, 400, sample_bytes=10**6)


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_round_trip_is_lossless(bpe: Tokenizer, text: str) -> None:
    ids = bpe.encode(text, add_special_tokens=False).ids
    assert bpe.decode(ids, skip_special_tokens=False) == text


def test_indentation_is_one_token_with_the_line_break(bpe: Tokenizer) -> None:
    assert len(bpe.encode("\n    ").ids) == 1
    pieces = bpe.pre_tokenizer.pre_tokenize_str("if x:\n        y")
    assert [piece for piece, _ in pieces] == ["if", "Ġx", ":ĊĠĠĠĠĠĠĠĠ", "y"]


def test_end_of_text_is_entry_0_and_ends_documents(bpe: Tokenizer) -> None:
    assert bpe.token_to_id(tokenizer.END_OF_TEXT) == 0
    ids = tokenizer.encode_documents(bpe, TEXTS, num_workers=1)
    assert ids.dtype == np.uint16
    assert np.flatnonzero(ids == 0).tolist()[-1] == len(ids) - 1
    assert (ids == 0).sum() == len(TEXTS)  # one of the texts spells the token out


def test_encoding_does_not_depend_on_workers(bpe: Tokenizer) -> None:
    texts = [line for text in TEXTS for line in text.splitlines()]
    alone = tokenizer.encode_documents(bpe, texts, num_workers=1)
    assert np.array_equal(alone, tokenizer.encode_documents(bpe, texts, num_workers=2))


def test_bytes_of_tokens_add_up_to_the_text(bpe: Tokenizer) -> None:
    sizes = tokenizer.bytes_of_tokens(bpe)
    text = "naïve 漢字 🙂\n    return 1\n"
    assert sizes[bpe.encode(text).ids].sum() == len(text.encode())
    assert sizes[0] == 0


def test_too_little_text_is_an_error() -> None:
    with pytest.raises(ValueError, match="gives 257 token entries, not 400"):
        tokenizer.train_tokenizer(["x"], 400, sample_bytes=10)


@pytest.mark.interop
def test_transformers_reads_the_files(bpe: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save_tokenizer(bpe, tmp_path, max_length=128)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(theirs, transformers.PreTrainedTokenizerFast)
    assert theirs.eos_token_id == theirs.bos_token_id == 0
    assert theirs.model_max_length == 128
    for text in (*HARD_TEXTS, *TEXTS):
        ids = theirs(text)["input_ids"]
        assert ids == bpe.encode(text).ids
        assert theirs.decode(ids) == text
