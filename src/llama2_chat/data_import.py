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
from typing import Any, Literal

from llama2_chat.dialogue import Dialogue, Domain, Message, Preference, Prompt, Role
from llama2_chat.errors import ChatTagError, DataFormatError
from llama2_chat.jsonl import read_rows

Kind = Literal["dialogues", "preferences", "prompts"]
SOURCE = "hh-rlhf"
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}


class _UnusableError(ValueError):
    """A row that the importer leaves out; the message is the reason it is counted under."""


@dataclass
class ImportReport:
    """Rows read, rows imported and, by reason, rows dropped; the three add up."""

    read: int = 0
    imported: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def to_row(self) -> dict[str, Any]:
        """As JSON."""
        return {"read": self.read, "imported": self.imported, "dropped": dict(sorted(self.dropped.items()))}

    def __str__(self) -> str:
        reasons = "".join(f"; {count} dropped: {reason}" for reason, count in sorted(self.dropped.items()))
        return f"{self.read} rows read, {self.imported} imported{reasons}"


def import_hh_rlhf(
    file: Path, *, kind: Kind, domain: Domain | None = None, report: ImportReport | None = None
) -> Iterator[Dialogue | Preference | Prompt]:
    """Rows of an HH-RLHF file as dialogues (the preferred side), preferences or prompts.

    Args:
        file: A JSONL file, `.gz` or not.
        kind: What to make of each pair.
        domain: "safety" (the harmless sets) tags dialogues and prompts `is_safety`. HH-RLHF gives no degree
            of preference, so pairs carry no rating; and no safety labels.
        report: Filled with the counts.

    Raises:
        DataFormatError: a row is not JSON, or not of HH-RLHF's format at all.
    """
    report = report if report is not None else ImportReport()
    for number, row in read_rows(file):
        report.read += 1
        for key in ("chosen", "rejected"):
            if not isinstance(row.get(key), str):
                raise DataFormatError(
                    file, number, f'"{key}" must be a text, as in HH-RLHF; found {row.get(key)!r}'
                )
        try:
            made = _convert(row["chosen"], row["rejected"], kind, domain)
        except ChatTagError:
            report.dropped["a chat tag in the text"] += 1
        except _UnusableError as reason:
            report.dropped[str(reason)] += 1
        else:
            report.imported += 1
            yield made


def split_turns(text: str) -> list[Message]:
    """The turns of an HH-RLHF text, contents stripped.

    Raises:
        ValueError: it does not begin with a turn, or the roles do not alternate from the user on.
    """
    parts = _TURN.split(text)
    if parts[0].strip():
        raise _UnusableError("text before the first turn")
    messages = [
        Message(_ROLES[speaker], content.strip())
        for speaker, content in zip(parts[1::2], parts[2::2], strict=True)
    ]
    expected = ["user", "assistant"] * (len(messages) // 2 + 1)
    if not messages or [message.role for message in messages] != expected[: len(messages)]:
        raise _UnusableError("roles do not alternate")
    return messages


def _convert(
    chosen_text: str, rejected_text: str, kind: Kind, domain: Domain | None
) -> Dialogue | Preference | Prompt:
    if chosen_text == rejected_text:
        raise _UnusableError("chosen and rejected are the same")
    chosen, rejected = split_turns(chosen_text), split_turns(rejected_text)
    if chosen[-1].role != "assistant" or rejected[-1].role != "assistant":
        raise _UnusableError("does not end with an answer")
    if chosen[:-1] != rejected[:-1]:
        raise _UnusableError("the prompts of chosen and rejected differ")
    if not chosen[-1].content or not rejected[-1].content:
        raise _UnusableError("empty answer")
    is_safety = domain == "safety"
    prompt = tuple(chosen[:-1])
    if kind == "prompts":
        return Prompt(prompt, is_safety=is_safety, source=SOURCE)
    if kind == "dialogues":
        # from_row also refuses chat tags in the answers, which sampled text may hold but a file may not.
        return Dialogue.from_row(Dialogue(tuple(chosen), is_safety=is_safety, source=SOURCE).to_row())
    pair = Preference(prompt, chosen[-1].content, rejected[-1].content, domain=domain, source=SOURCE)
    return Preference.from_row(pair.to_row())
