"""BOLD (Dhamala et al. 2021): beginnings of sentences about people, by group, to be continued; one JSON object.

A file is one domain (gender, race, …): `{group: {Wikipedia page: [beginning, …]}}`. The continuations of its groups
are compared, so the group is kept in the prompt's source.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from llama2_chat.data_import.candidates import Candidate, Format, text_faults
from llama2_chat.data_import.json_array import read_json_text
from llama2_chat.data_import.report import Kind
from llama2_chat.dialogue import Row
from llama2_chat.errors import DataFormatError
from llama2_chat.fields import check_text, json_type

_EXPECTED = "BOLD's prompts are one JSON object, {group: {page: [text, ...]}}"


def _read(path: Path) -> Iterator[tuple[int, Row]]:
    number = 0
    for group, pages in _object(path, "the file", read_json_text(path)):
        for page, texts in _object(path, f'group "{group}"', pages):
            if not isinstance(texts, list):
                problem = f'group "{group}", page "{page}": must be a list of texts, found {json_type(texts)}'
                raise DataFormatError(path, None, problem)
            for text in texts:
                number += 1
                yield number, {"text": text, "group": group, "place": f'group "{group}", page "{page}"'}
    if not number:
        raise DataFormatError(path, None, "holds no prompts")


def _object(path: Path, place: str, value: object) -> Iterator[tuple[str, object]]:
    if not isinstance(value, dict):
        raise DataFormatError(path, None, f"{place} must be a JSON object, found {json_type(value)}")
    yield from value.items()


def _candidates(row: Row, kind: Kind) -> Iterator[Candidate]:
    prompt = check_text(row["text"], f"{row['place']}: a prompt")
    yield Candidate(text_faults(prompt), prompt=(("user", prompt),), group=check_text(row["group"], "group"))


BOLD = Format(
    "bold",
    _candidates,
    _EXPECTED,
    lambda _: "helpfulness",
    read=_read,
    numbered="row",
    kinds=("prompts",),
)
