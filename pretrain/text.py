"""Plain text from JSONL files, one document at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llama2_chat import interruption
from llama2_chat.errors import DataFormatError, UserInputError
from llama2_chat.fields import check_text
from llama2_chat.jsonl import read_rows
from llama2_chat.progress import track


def read_texts(file: Path) -> Iterator[str]:
    """The texts of a JSONL file, `{"text": "…"}` a line, empty ones too.

    Raises:
        DataFormatError: a row has no text, or one that UTF-8 cannot hold.
    """
    for number, row in read_rows(file):
        text = row.get("text")
        if not isinstance(text, str):
            raise DataFormatError(file, number, f'"text" must be a text; found {text!r}')
        try:
            yield check_text(text, "text")
        except ValueError as error:
            raise DataFormatError(file, number, str(error)) from None


@dataclass
class TextCounts:
    """Texts that were read: documents, and those with nothing but white space, which are skipped."""

    documents: int = 0
    empty: int = 0


def read_documents(file: Path, counts: TextCounts) -> Iterator[str]:
    """The texts of a JSONL file that are not empty; `counts` grows as they are read.

    Raises:
        DataFormatError: a row has no text.
        UserInputError: there is no document in the whole file.
    """
    for text in read_texts(file):
        if text.strip():
            counts.documents += 1
            yield text
        else:
            counts.empty += 1
    if counts.documents == 0:
        raise UserInputError(
            f"{file}: no document, all {counts.empty} texts are empty; give text or leave this source out"
        )


def watched(texts: Iterable[str], description: str) -> Iterator[str]:
    """The same texts, with their progress shown; a signal ends the reading.

    Raises:
        Interrupted: a signal asked for the end.
    """
    with track(description, total=None, unit="documents") as progress:
        for text in texts:
            interruption.raise_if_requested()
            yield text
            progress.advance()
