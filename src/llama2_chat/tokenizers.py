"""Tokenizers behind one small interface, so that text is always text.

`encode` reads control pieces such as `<s>` and `</s>` in a text as the characters they are, never as the
special ids. A folder that holds only a SentencePiece `tokenizer.model` is read by the sentencepiece package
itself, because transformers' conversion of it gives other ids.
"""

from __future__ import annotations

import shutil
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

    bos_id: int
    eos_id: int
    padding_id: int
    """A legal id other than EOS; it only ever stands under a mask."""
    vocab_size: int

    @property
    def hf(self) -> Any:
        """The transformers tokenizer, or None where there is none."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of `text` as plain text, without BOS or EOS."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`, control ids left out."""
        ...

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files into `folder`."""
        ...


class HuggingFaceTokenizer:
    """A `tokenizer.json` (or GGUF) tokenizer, loaded by transformers."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        if tokenizer.eos_token_id is None:
            raise UserInputError("the tokenizer has no EOS token, so no answer could ever end")
        self.eos_id: int = tokenizer.eos_token_id
        self.bos_id: int = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        self.vocab_size: int = len(tokenizer)
        candidates = (tokenizer.pad_token_id, tokenizer.unk_token_id, 0, 1)
        self.padding_id: int = next(i for i in candidates if i is not None and i != self.eos_id)

    @property
    def hf(self) -> Any:
        """The transformers tokenizer."""
        return self._tokenizer

    def encode(self, text: str) -> list[int]:
        """Ids of `text` as plain text."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`, control ids left out."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and its configuration, with the Llama 2 template where it has none."""
        if self._tokenizer.chat_template is None:
            self._tokenizer.chat_template = LLAMA2_TEMPLATE
        self._tokenizer.save_pretrained(folder)


class SentencePieceTokenizer:
    """A folder with only Meta's `tokenizer.model`."""

    def __init__(self, file: Path) -> None:
        import sentencepiece

        self._file = file
        self._processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        self.padding_id: int = self._processor.unk_id()
        self.vocab_size: int = self._processor.vocab_size()

    @property
    def hf(self) -> Any:
        """There is no exact one."""
        return None

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; SentencePiece never reads control pieces out of text."""
        ids: list[int] = self._processor.encode(text)
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`, control ids left out."""
        text: str = self._processor.decode([i for i in ids if not self._processor.is_control(i)])
        return text

    def save(self, folder: Path) -> None:
        """Copy `tokenizer.model`."""
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self._file, folder / "tokenizer.model")


def load_tokenizer(path: Path | str, gguf_file: str | None = None) -> ChatTokenizer:
    """The tokenizer of a model folder or hub id.

    Raises:
        MissingFileError: a local folder without any tokenizer.
    """
    folder = Path(path)
    if folder.is_dir() and gguf_file is None and not (folder / "tokenizer.json").exists():
        file = folder / "tokenizer.model"
        if not file.exists():
            raise MissingFileError(f"{path}: no tokenizer.json or tokenizer.model in this folder")
        return SentencePieceTokenizer(file)
    if folder.is_absolute() and not folder.is_dir():
        raise MissingFileError(f"{path}: no such folder")
    from transformers import AutoTokenizer

    arguments = {} if gguf_file is None else {"gguf_file": gguf_file}
    return HuggingFaceTokenizer(AutoTokenizer.from_pretrained(str(path), trust_remote_code=False, **arguments))
