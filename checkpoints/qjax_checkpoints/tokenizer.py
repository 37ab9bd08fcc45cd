# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back, with the rules that the model's own directory states.

The only file that imports the `tokenizers` package. Beside `tokenizer.json` three files have a say:
`tokenizer_config.json` (does text begin with a bos token?), `generation_config.json` and
`config.json` (which tokens end a text?).
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from qjax_checkpoints.json_file import read_json
from qjax_models.config_json import shown

_TOKENIZER_FILE = "tokenizer.json"
_SETTINGS_FILE = "tokenizer_config.json"
_REPLACEMENT = "\ufffd"  # what a decoder puts in place of bytes that are not yet a character


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextTokenizer:
    """A tokenizer with its directory's rules; `load_tokenizer` makes one.

    Attributes:
        backend: the tokenizer of the `tokenizers` package.
        bos_id: the token that begins a text, or None if there is none.
        adds_bos: True or False if `tokenizer_config.json` decides whether a text gets a bos token,
            None if the template inside `tokenizer.json` does.
        eos_ids: the tokens that end a text; may be empty.
    """

    backend: tokenizers.Tokenizer
    bos_id: int | None
    adds_bos: bool | None
    eos_ids: tuple[int, ...]

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of `text`, with the bos token where the model expects one."""
        if self.adds_bos is None:
            return self.backend.encode(text).ids
        ids = self.backend.encode(text, add_special_tokens=False).ids
        return [self.bos_id, *ids] if self.adds_bos and self.bos_id is not None else ids

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`, special tokens left out."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yields the text of `ids` piece by piece, as the tokens come.

        A token may end in the middle of a character; its text is then held back until the character
        is whole. Joined, the pieces are what `decode` returns for all ids at once.

        Args:
            ids: the tokens, taken one at a time.

        Yields:
            Non-empty text.
        """
        # A token is decoded together with the piece before it, because some decoders treat the
        # first token of a text in a way of their own (they strip its space).
        before: list[int] = []
        held: list[int] = []
        for token in ids:
            held.append(token)
            text = self._new_text(before, held)
            if text and not text.endswith(_REPLACEMENT):
                yield text
                before, held = held, []
        if rest := self._new_text(before, held):  # bytes that never became a character
            yield rest

    def _new_text(self, before: list[int], held: list[int]) -> str:
        """Returns what the tokens `held` add to the text of the tokens `before`."""
        return self.decode(before + held)[len(self.decode(before)) :]


def load_tokenizer(path: Path, *, vocab_size: int) -> TextTokenizer:
    """Loads the tokenizer of a model directory.

    Args:
        path: the directory.
        vocab_size: rows of the model's token table; every token must have one.

    Raises:
        ValueError: `tokenizer.json` is missing or broken, or has tokens that the model lacks; or
            another file's end tokens are no token ids.
    """
    file = path / _TOKENIZER_FILE
    if not file.is_file():
        raise ValueError(f"{path}: has no {_TOKENIZER_FILE}; text needs it, token ids do not")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises plain Exception for every fault of the file
        raise ValueError(f"{file}: not a tokenizer: {error}") from error
    # Settings of the training of some models, which would cut texts short without a word.
    backend.no_truncation()
    backend.no_padding()
    largest = max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= vocab_size:
        raise ValueError(
            f"{file}: its vocabulary has {largest + 1} entries, the model's only {vocab_size}"
        )
    settings = _optional_json(path / _SETTINGS_FILE)
    adds_bos = settings.get("add_bos_token")
    return TextTokenizer(
        backend=backend,
        bos_id=_token_id(path, backend, settings, "bos_token"),
        adds_bos=adds_bos if isinstance(adds_bos, bool) else None,
        eos_ids=_eos_ids(path, backend, settings, vocab_size),
    )


def _eos_ids(
    path: Path, backend: tokenizers.Tokenizer, settings: Mapping[str, Any], vocab_size: int
) -> tuple[int, ...]:
    """Returns the ids that end a text: of the first file that names any."""
    for name in ("generation_config.json", "config.json"):
        ids = _optional_json(path / name).get("eos_token_id")
        if ids is None:
            continue
        ids = tuple(ids) if isinstance(ids, list) else (ids,)
        if not all(type(i) is int and 0 <= i < vocab_size for i in ids):
            raise ValueError(
                f"{path / name}: 'eos_token_id' must be a token id, 0 to {vocab_size - 1}, or a list "
                f"of them, not {shown(ids)}"
            )
        return ids
    eos_id = _token_id(path, backend, settings, "eos_token")
    return () if eos_id is None else (eos_id,)


def _token_id(
    path: Path, backend: tokenizers.Tokenizer, settings: Mapping[str, Any], key: str
) -> int | None:
    """Returns the id of a special token, which the file gives as a string or with its flags."""
    token = settings.get(key)
    content = token.get("content") if isinstance(token, Mapping) else token
    if content is not None and not isinstance(content, str):
        raise ValueError(f"{path / _SETTINGS_FILE}: {key!r} must be a string, not {shown(token)}")
    return None if content is None else backend.token_to_id(content)


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
