"""TruthfulQA (Lin et al. 2021): questions that people often answer wrongly, with true and false answers; CSV.

The best answer makes a dialogue, and with each incorrect answer a pair. The set says neither by how much an answer is
better nor how safe it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from llama2_chat.data_import.candidates import Candidate, Format, holds_chat_tag, text_faults
from llama2_chat.data_import.csv_file import csv_reader
from llama2_chat.data_import.report import CHAT_TAG, EMPTY_ANSWER, IDENTICAL, Kind
from llama2_chat.dialogue import Row
from llama2_chat.fields import check_text

_COLUMNS = ("Category", "Question", "Best Answer", "Incorrect Answers")
_EXPECTED = f"TruthfulQA is CSV with a header that names at least {', '.join(_COLUMNS)}"


def split_answers(text: str) -> list[str]:
    """The answers of a field that lists them with semicolons, stripped; empty ones are left out."""
    return [answer for part in text.split(";") if (answer := part.strip())]


def _candidates(row: Row, kind: Kind) -> Iterator[Candidate]:
    category, question, best, wrong = (check_text(row[name], name) for name in _COLUMNS)
    faults = text_faults(question, best)
    if not best.strip():
        faults = (*faults, EMPTY_ANSWER)
    made = Candidate(faults, prompt=(("user", question),), chosen=best, group=category.strip() or None)
    if kind != "preferences":
        yield made
        return
    # An answer that is listed twice is one answer.
    for answer in dict.fromkeys(split_answers(wrong)):
        own = {CHAT_TAG: holds_chat_tag(answer), IDENTICAL: answer == best.strip()}
        found = (*faults, *(reason for reason, applies in own.items() if applies))
        yield replace(made, faults=tuple(dict.fromkeys(found)), rejected=answer)


TRUTHFULQA = Format(
    "truthfulqa",
    _candidates,
    _EXPECTED,
    lambda _: "helpfulness",
    read=csv_reader(*_COLUMNS),
    units={"preferences": "pairs"},
)
