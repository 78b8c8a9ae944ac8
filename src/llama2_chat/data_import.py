"""Importing data sets of other formats into the toolkit's own; what is dropped is counted by reason.

Anthropic HH-RLHF: each row holds two texts, `chosen` and `rejected`, whose turns begin with "\\n\\nHuman:" and
"\\n\\nAssistant:"; they share everything up to the last answer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from llama2_chat.dialogue import CHAT_TAGS, Dialogue, Domain, Message, Preference, Prompt, Role
from llama2_chat.errors import DataFormatError, UserInputError
from llama2_chat.jsonl import read_rows

Kind = Literal["dialogues", "preferences", "prompts"]
"""What a file of rows holds, and what an importer can make."""

KINDS: tuple[Kind, ...] = get_args(Kind)
SOURCE = "hh-rlhf"

IDENTICAL = "chosen and rejected are identical"
PROMPTS_DIFFER = "the prompts of chosen and rejected differ"
EMPTY_ANSWER = "an empty last answer"
ROLES_DO_NOT_ALTERNATE = "roles do not alternate from a user to an assistant turn"
CHAT_TAG = "a chat tag in the text"

_ANSWER = "\n\nAssistant:"
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}
_DOMAINS: dict[str, Domain] = {"harmless": "safety", "helpful": "helpfulness"}


@dataclass
class ImportReport:
    """What an import did so far.

    `dropped` counts every reason found; a row that is odd in several ways counts under each of them, so the
    number of rows dropped is `read - imported`.
    """

    read: int = 0
    imported: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    domain: Domain | None = None

    def to_row(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "read": self.read,
            "imported": self.imported,
            "domain": self.domain,
            "dropped": dict(sorted(self.dropped.items())),
        }

    def __str__(self) -> str:
        domain = f" as {self.domain} data" if self.domain else ""
        summary = (
            f"{self.read} rows read, {self.imported} imported{domain}, {self.read - self.imported} dropped"
        )
        reasons = [f"{reason}: {count}" for reason, count in sorted(self.dropped.items())]
        return f"{summary} ({'; '.join(reasons)})" if reasons else summary


def import_hh_rlhf(
    file: Path | str, *, kind: Kind, domain: Domain | None = None, report: ImportReport | None = None
) -> Iterator[Dialogue | Preference | Prompt]:
    """Rows of an HH-RLHF file as dialogues (the preferred side), preferences or prompts.

    The same rows are dropped whatever is made of them, so that row n of one kind and row n of another come
    from the same pair, and a file split by rows holds out the same prompts in every kind.

    Args:
        file: A JSONL file, `.gz` or not.
        kind: What to make of each pair. HH-RLHF gives neither a degree of preference nor safety labels, so
            preferences carry no rating and no labels.
        domain: "safety" tags dialogues and prompts `is_safety`; preferences carry the domain as it is. None
            takes it from the set's own name: "harmless" in the name of the file or its folder is safety,
            "helpful" is helpfulness.
        report: Filled with the counts while the rows are read.

    Raises:
        DataFormatError: a row is not JSON, or not of HH-RLHF's format at all.
    """
    file = Path(file)
    if kind not in KINDS:
        raise UserInputError(f'kind "{kind}" unknown; one of {", ".join(KINDS)}')
    report = report if report is not None else ImportReport()
    report.domain = domain or _domain_of(file)
    return _imported(file, kind, report)


def _imported(file: Path, kind: Kind, report: ImportReport) -> Iterator[Dialogue | Preference | Prompt]:
    name = file.name.removesuffix(".gz").removesuffix(".jsonl")
    for number, row in read_rows(file):
        chosen, rejected = (_text_of(row, key, file, number) for key in ("chosen", "rejected"))
        report.read += 1
        if reasons := _oddities(chosen, rejected):
            report.dropped.update(reasons)
            continue
        try:
            made = _make(split_turns(chosen), split_turns(rejected), kind, report.domain, f"{name}:{number}")
        except ValueError as error:
            raise DataFormatError(file, number, str(error)) from None
        report.imported += 1
        yield made


def split_turns(text: str) -> tuple[Message, ...]:
    """The turns of an HH-RLHF text, contents stripped; whatever stands before the first turn is left out."""
    parts = _TURN.split(text)
    return tuple(
        Message(_ROLES[speaker], content.strip())
        for speaker, content in zip(parts[1::2], parts[2::2], strict=True)
    )


def _oddities(chosen: str, rejected: str) -> list[str]:
    """Every reason to drop a pair; none if it can be used."""
    (chosen_prompt, _, chosen_answer), (rejected_prompt, _, rejected_answer) = (
        text.rpartition(_ANSWER) for text in (chosen, rejected)
    )
    found = {
        IDENTICAL: chosen == rejected,
        PROMPTS_DIFFER: chosen_prompt != rejected_prompt,
        EMPTY_ANSWER: not chosen_answer.strip() or not rejected_answer.strip(),
        ROLES_DO_NOT_ALTERNATE: not (_alternates(chosen) and _alternates(rejected)),
        CHAT_TAG: any(tag in text for tag in CHAT_TAGS for text in (chosen, rejected)),
    }
    return [reason for reason, applies in found.items() if applies]


def _alternates(text: str) -> bool:
    """Whether `text` is turns only, from a human's to an assistant's, strictly in turn."""
    before, *rest = _TURN.split(text)
    speakers = rest[::2]
    turns = len(speakers) // 2
    return not before.strip() and turns > 0 and speakers == ["Human", "Assistant"] * turns


def _make(
    chosen: tuple[Message, ...],
    rejected: tuple[Message, ...],
    kind: Kind,
    domain: Domain | None,
    identity: str,
) -> Dialogue | Preference | Prompt:
    is_safety = domain == "safety"
    if kind == "dialogues":
        return Dialogue(chosen, is_safety=is_safety, id=identity, source=SOURCE)
    if kind == "prompts":
        return Prompt(chosen[:-1], is_safety=is_safety, source=SOURCE)
    return Preference(chosen[:-1], chosen[-1].content, rejected[-1].content, domain=domain, source=SOURCE)


def _domain_of(file: Path) -> Domain | None:
    """The domain that the published name of a set says: `harmless-base/train.jsonl.gz`."""
    for name in (file.name, file.absolute().parent.name):
        for word, domain in _DOMAINS.items():
            if word in name.lower():
                return domain
    return None


def _text_of(row: dict[str, Any], key: str, file: Path, number: int) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        found = f"{key} is not a string" if key in row else f"{key} is missing"
        raise DataFormatError(
            file, number, f'{found}; a row of HH-RLHF holds two texts, "chosen" and "rejected"'
        )
    return value
