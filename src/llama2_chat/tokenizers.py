"""Tokenizers behind one small interface, so that text is always text.

`encode` reads control pieces such as `<s>` and `</s>` in a text as the characters they are, never as the
special ids. A folder that holds only a SentencePiece `tokenizer.model` is read by the sentencepiece package
itself, because transformers' conversion of it gives other ids.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

from llama2_chat.errors import MissingFileError, UserInputError

LLAMA2_TEMPLATE = (
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- set system = '<<SYS>>\\n' ~ messages[0]['content'] ~ '\\n<</SYS>>\\n\\n' -%}"
    "{%- set turns = messages[1:] -%}"
    "{%- else -%}{%- set system = '' -%}{%- set turns = messages -%}{%- endif -%}"
    "{%- for message in turns -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{ bos_token ~ '[INST] ' ~ ((system if loop.first else '') ~ message['content']) | trim ~ ' [/INST]' }}"
    "{%- else -%}"
    "{% generation %}{{ ' ' ~ (message['content'] | trim) ~ ' ' ~ eos_token }}{% endgeneration %}"
    "{%- endif -%}{%- endfor -%}"
)
"""The Llama 2 format as a Jinja template, saved with every model trained on it for other programs to use."""


class ChatTokenizer(Protocol):
    """What the toolkit needs of a tokenizer."""

    eos_id: int
    padding_id: int
    """A legal id other than EOS; it only ever stands under a mask."""
    vocab_size: int
    control_ids: frozenset[int]
    """The ids of control pieces; that of the unknown piece is none of them."""
    chat_template: str | None
    """The Jinja template that `save` writes. A chat format sets it to its own when it is built."""

    @property
    def bos_id(self) -> int:
        """The id that begins a text; raises UserInputError where the tokenizer has none."""
        ...

    @property
    def hf(self) -> Any:
        """The transformers tokenizer, or None where there is none."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of `text` as plain text, without BOS or EOS."""
        ...

    def decode(self, ids: Sequence[int], *, keep_control: bool = False) -> str:
        """Text of `ids`, control ids left out or, with `keep_control`, as their pieces (`<s>`)."""
        ...

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files and the chat template into `folder`."""
        ...


def same_tokens(left: ChatTokenizer, right: ChatTokenizer) -> bool:
    """Whether every id stands for the same piece of text in both."""
    return (left.vocab_size, left.eos_id) == (right.vocab_size, right.eos_id) and all(
        left.decode([number], keep_control=True) == right.decode([number], keep_control=True)
        for number in range(left.vocab_size)
    )


def load_tokenizer(path: Path | str, gguf_file: str | None = None) -> ChatTokenizer:
    """The tokenizer of a model folder (or of a GGUF file in it) or of a hub id.

    A folder with a `tokenizer.model` and no `tokenizer.json` is read by the sentencepiece package, anything
    else by transformers.

    Raises:
        MissingFileError: a local folder that is not there or holds no tokenizer.
        UserInputError: the tokenizer cannot be used; the message says why.
    """
    folder = Path(path)
    if gguf_file is not None and folder.is_dir() and not (folder / gguf_file).is_file():
        raise MissingFileError(f"{folder / gguf_file}: no such file; check gguf_file")
    if gguf_file is not None and importlib.util.find_spec("gguf") is None:
        raise UserInputError(f"{gguf_file}: reading it wants the gguf package; pip install llama2-chat[gguf]")
    if folder.is_dir() and gguf_file is None and not (folder / "tokenizer.json").exists():
        file = folder / "tokenizer.model"
        if file.exists():
            return SentencePieceTokenizer(file)
        if not (folder / "tokenizer_config.json").exists():
            raise MissingFileError(f"{path}: no tokenizer.json or tokenizer.model in this folder")
    if not folder.is_dir() and (folder.is_absolute() or str(path).count(os.sep) != 1 or str(path)[0] in ".~"):
        raise MissingFileError(f"{path}: no such model folder")
    from transformers import AutoTokenizer

    arguments = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False, **arguments)
    except Exception as error:  # a broken tokenizer.json raises bare Exception
        raise UserInputError(f"{path}: transformers cannot load this tokenizer: {error}") from error
    return HuggingFaceTokenizer(tokenizer, name=str(path))


class HuggingFaceTokenizer:
    """A tokenizer that transformers loads: a `tokenizer.json`, a GGUF file, a hub id."""

    def __init__(self, tokenizer: Any, *, name: str = "tokenizer") -> None:
        """Wrap `tokenizer`; `name` is how errors call it."""
        self._tokenizer = tokenizer
        self._name = name
        self.chat_template: str | None = None
        if tokenizer.eos_token_id is None:
            raise UserInputError(f"{name}: the tokenizer has no EOS token, so no answer could ever end")
        self.eos_id: int = tokenizer.eos_token_id
        self.vocab_size: int = len(tokenizer)
        self.padding_id = _padding_id(self.eos_id, (tokenizer.pad_token_id, tokenizer.unk_token_id))
        unknown = {tokenizer.unk_token_id} - {self.eos_id}
        self.control_ids = frozenset(control_pieces(tokenizer).values()) - unknown
        self._check_control_pieces()

    @property
    def bos_id(self) -> int:
        """The id that begins a text."""
        if self._tokenizer.bos_token_id is None:
            raise UserInputError(
                f"{self._name}: the tokenizer has no BOS token, which the Llama 2 format begins each turn with; "
                "choose chat_format: tokenizer"
            )
        return int(self._tokenizer.bos_token_id)

    @property
    def hf(self) -> Any:
        """The transformers tokenizer."""
        return self._tokenizer

    def encode(self, text: str) -> list[int]:
        """Ids of `text` as plain text."""
        ids: list[int] = self._tokenizer.encode(
            text, add_special_tokens=False, split_special_tokens=True, verbose=False
        )
        return ids

    def decode(self, ids: Sequence[int], *, keep_control: bool = False) -> str:
        """Text of `ids`, control ids left out unless `keep_control`."""
        text: str = self._tokenizer.decode(
            list(ids), skip_special_tokens=not keep_control, clean_up_tokenization_spaces=False
        )
        return text

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, its configuration and the chat template, as AutoTokenizer loads them."""
        own = self._tokenizer.chat_template
        self._tokenizer.chat_template = self.chat_template or own or LLAMA2_TEMPLATE
        try:
            self._tokenizer.save_pretrained(folder)
        finally:
            self._tokenizer.chat_template = own

    def _check_control_pieces(self) -> None:
        """Unigram tokenizers know control pieces as ordinary pieces too; with one, text could forge an EOS."""
        unknown = self._tokenizer.unk_token_id
        for piece, number in control_pieces(self._tokenizer).items():
            if number in self.encode(piece) and (number != unknown or unknown == self.eos_id):
                raise UserInputError(
                    f"{self._name}: the tokenizer reads {piece} in a text as the control id {number}, so text could "
                    "forge control ids; choose a BPE tokenizer"
                )


def control_pieces(tokenizer: Any) -> dict[str, int]:
    """The control pieces of a transformers tokenizer: the named ones and all added ones marked special."""
    named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    added = ((str(t.content), i) for i, t in tokenizer.added_tokens_decoder.items() if t.special)
    return {**dict(added), **dict(named)}


class SentencePieceTokenizer:
    """A folder with only a SentencePiece `tokenizer.model`, as Meta releases it."""

    def __init__(self, file: Path) -> None:
        """Load `file`."""
        import sentencepiece

        self._file = file
        # The copy that `save` writes must be of what was loaded, even if the folder has gone since.
        self._model = file.read_bytes()
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._model)
        except RuntimeError as error:
            raise UserInputError(f"{file}: not a SentencePiece model") from error
        self.chat_template: str | None = None
        self.eos_id: int = self._processor.eos_id()
        if self.eos_id < 0:
            raise UserInputError(f"{file}: the tokenizer has no EOS piece, so no answer could ever end")
        self.vocab_size: int = self._processor.get_piece_size()
        self.padding_id = _padding_id(self.eos_id, (self._processor.pad_id(), self._processor.unk_id()))
        self.control_ids = frozenset(filter(self._processor.is_control, range(self.vocab_size)))

    @property
    def bos_id(self) -> int:
        """The id that begins a text."""
        number: int = self._processor.bos_id()
        if number < 0:
            raise UserInputError(
                f"{self._file}: the tokenizer has no BOS piece, which the Llama 2 format begins each turn with"
            )
        return number

    @property
    def hf(self) -> Any:
        """There is none that gives the same ids."""
        return None

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; SentencePiece never reads control pieces out of text."""
        ids: list[int] = self._processor.encode(text)
        return ids

    def decode(self, ids: Sequence[int], *, keep_control: bool = False) -> str:
        """Text of `ids`, control ids left out unless `keep_control`."""
        # A model's embedding may have more rows than the tokenizer has pieces.
        known = [number for number in ids if 0 <= number < self.vocab_size]
        if not keep_control:
            known = [number for number in known if not self._is_control(number)]
            return str(self._processor.decode(known))
        parts = []
        for control, run in groupby(known, key=self._is_control):
            pieces = list(run)
            parts.append(
                "".join(map(self._processor.id_to_piece, pieces))
                if control
                else self._processor.decode(pieces)
            )
        return "".join(parts)

    def save(self, folder: Path) -> None:
        """Write `tokenizer.model` as it was, and the chat template beside it."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.model").write_bytes(self._model)
        (folder / "chat_template.jinja").write_text(self.chat_template or LLAMA2_TEMPLATE, encoding="utf-8")

    def _is_control(self, number: int) -> bool:
        return bool(self._processor.is_control(number) or self._processor.is_unknown(number))


def _padding_id(eos_id: int, preferred: Iterable[int | None]) -> int:
    candidates = (*preferred, 0, 1)
    return next(i for i in candidates if i is not None and i >= 0 and i != eos_id)
