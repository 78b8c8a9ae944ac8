"""What every importer shares: rows that may be imported, checked, counted and made into one kind of row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llama2_chat.data_import.report import (
    ANOTHER_LABEL,
    CHAT_TAG,
    EMPTY_ANSWER,
    EMPTY_PROMPT,
    IDENTICAL,
    KINDS,
    LABELS,
    ImportReport,
    Kind,
    Label,
)
from llama2_chat.data_import.split import is_held_out
from llama2_chat.dialogue import (
    CHAT_TAGS,
    Dialogue,
    Domain,
    Message,
    Preference,
    Prompt,
    Rating,
    RiskCategory,
    Role,
    Row,
)
from llama2_chat.errors import DataFormatError
from llama2_chat.jsonl import read_rows

__all__ = ["LABELS", "Candidate", "Format", "Turn", "imported", "in_split", "pair_faults", "text_faults"]

Turn = tuple[Role, str]
"""Who says what; not yet a Message, which refuses chat tags."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """What may become a row: dropped and counted if it has `faults`, else made from the other fields."""

    faults: tuple[str, ...] = ()
    prompt: tuple[Turn, ...] = ()
    chosen: str = ""
    rejected: str = ""
    rating: Rating | None = None
    id: str | None = None
    """Of a dialogue, after the file's name; None: the row's number."""
    label: Label | None = None
    """The set's own word on whether the prompt (of a dialogue: the answer) is safe."""
    group: str | None = None
    """What the set says the row is about; the `source` is then the format's name, a slash and this."""
    risk_category: RiskCategory | None = None


@dataclass(frozen=True)
class Format:
    """A data set's format: how its rows are read and what may become of each."""

    name: str
    """Also the `source` of what is imported, or how it begins."""
    candidates: Callable[[Row, Kind], Iterable[Candidate]]
    """Of one row; raises ValueError where the row is not of the format."""
    expected: str
    """What a file of this format holds, to end an error message with."""
    domain_of: Callable[[Path], Domain | None]
    """The domain of a file for which none was named."""
    read: Callable[[Path], Iterator[tuple[int, Row]]] = read_rows
    """The rows of a file with their numbers; raises DataFormatError where they cannot be read."""
    numbered: Literal["line", "row"] = "line"
    """What the numbers count."""
    kinds: tuple[Kind, ...] = KINDS
    """What can be made of the format."""
    labelled: bool = False
    """Whether its rows are labelled safe or unsafe, so that those of one label can be taken."""
    units: Mapping[Kind, str] = field(default_factory=dict)
    """What the candidates of a kind are, in the plural, where one row of the file gives several."""


def pair_faults(chosen: str, rejected: str) -> dict[str, bool]:
    """What can be wrong with any two answers to one prompt."""
    answers = (chosen.strip(), rejected.strip())
    return {IDENTICAL: answers[0] == answers[1], EMPTY_ANSWER: not all(answers)}


def text_faults(prompt: str, *answers: str) -> tuple[str, ...]:
    """What can be wrong with any prompt of one turn, and with the answers' text; an empty answer may be none."""
    found = {EMPTY_PROMPT: not prompt.strip(), CHAT_TAG: holds_chat_tag(prompt, *answers)}
    return tuple(reason for reason, applies in found.items() if applies)


def holds_chat_tag(*texts: str) -> bool:
    """Whether a text holds a tag that could pose as another turn."""
    return any(tag in text for tag in CHAT_TAGS for text in texts)


def in_split(
    rows: Iterator[Dialogue | Preference | Prompt], report: ImportReport
) -> Iterator[Dialogue | Preference | Prompt]:
    """Those of the rows that are in the part that `report` names, counted there; all where it names none."""
    for row in rows:
        if report.split is not None:
            assert report.held_out_share is not None  # set together
            messages = row.prompt if isinstance(row, Preference) else row.messages
            if is_held_out(messages, report.held_out_share) != (report.split == "held_out"):
                continue
            report.in_split += 1
        yield row


def imported(
    format_: Format, file: Path, kind: Kind, report: ImportReport
) -> Iterator[Dialogue | Preference | Prompt]:
    """The usable rows of a file, as the kind of row that is asked for; `report` counts what was read and dropped."""
    name = file.name
    for suffix in (".gz", ".jsonl", ".json", ".csv", ".txt"):
        name = name.removesuffix(suffix)
    for number, row in _rows(format_, file):
        try:
            for candidate in format_.candidates(row, kind):
                report.read += 1
                if faults := _with_label(candidate, report.label):
                    report.dropped.update(faults)
                    continue
                identity = f"{name}:{candidate.id or number}"
                made = _make(candidate, kind, report.domain, identity, format_.name)
                report.imported += 1
                yield made
        except ValueError as error:
            place = f"{file}: row {number}" if format_.numbered == "row" else f"{file}:{number}"
            raise DataFormatError(place, None, str(error)) from None


def _with_label(candidate: Candidate, label: Label | None) -> tuple[str, ...]:
    """The candidate's faults, another label than the one that is wanted among them."""
    another = label is not None and candidate.label != label
    return (*candidate.faults, ANOTHER_LABEL) if another else candidate.faults


def _rows(format_: Format, file: Path) -> Iterator[tuple[int, Row]]:
    try:
        yield from format_.read(file)
    except DataFormatError as error:
        error.args = (f"{error} (expected: {format_.expected})",)
        raise


def _make(
    candidate: Candidate, kind: Kind, domain: Domain | None, identity: str, format_name: str
) -> Dialogue | Preference | Prompt:
    is_safety = candidate.label == "unsafe" if domain is None else domain == "safety"
    source = format_name if candidate.group is None else f"{format_name}/{candidate.group}"
    prompt = tuple(Message(role, text.strip()) for role, text in candidate.prompt)
    # Both answers are checked whatever the kind, so that a file is good for every kind or for none.
    chosen, rejected = (Message("assistant", text.strip()) for text in (candidate.chosen, candidate.rejected))
    if kind == "dialogues":
        return Dialogue((*prompt, chosen), is_safety=is_safety, id=identity, source=source)
    if kind == "prompts":
        return Prompt(prompt, is_safety=is_safety, risk_category=candidate.risk_category, source=source)
    return Preference(
        prompt, chosen.content, rejected.content, candidate.rating, domain=domain, source=source
    )
