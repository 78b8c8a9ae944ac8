"""Checking a data file: what it holds, in counts, and every row that cannot be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from llama2_chat.data_import import Kind
from llama2_chat.dialogue import RATINGS, Dialogue, Preference, Prompt, Row
from llama2_chat.errors import UserInputError, did_you_mean
from llama2_chat.jsonl import scan

_READERS: dict[Kind, Callable[[Row], Dialogue | Preference | Prompt]] = {
    "dialogues": Dialogue.from_row,
    "preferences": Preference.from_row,
    "prompts": Prompt.from_row,
}
_FIELDS: dict[Kind, tuple[str, ...]] = {
    "dialogues": ("messages", "is_safety", "id", "source", "group"),
    "preferences": (
        *("prompt", "chosen", "rejected", "rating"),
        *("chosen_safe", "rejected_safe", "domain", "source"),
    ),
    "prompts": ("prompt", "is_safety", "risk_category", "source"),
}
_LABELS = {True: "safe", False: "unsafe", None: "not labelled"}


@dataclass
class DataSummary:
    """Counts over the usable rows of a file, and the first problems of the others."""

    kind: Kind
    rows: int = 0
    unusable: int = 0
    turns: int = 0
    system_messages: int = 0
    empty_contents: int = 0
    identical_pairs: int = 0
    prefers_unsafe: int = 0
    ends_with_user: int = 0
    ratings: Counter[str] = field(default_factory=Counter)
    safety: Counter[str] = field(default_factory=Counter)
    categories: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    ignored_fields: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """The counts as text, `name: count`."""
        yield f"rows: {self.rows}"
        yield f"user turns: {self.turns}"
        yield f"rows with a system message: {self.system_messages}"
        yield f"rows with an empty content: {self.empty_contents}"
        if self.kind == "dialogues":
            yield f"rows that end with the user: {self.ends_with_user}"
        if self.kind == "preferences":
            yield f"rows with identical answers: {self.identical_pairs}"
            yield f"rows that prefer the unsafe answer (reward models are not trained on them): {self.prefers_unsafe}"
            for rating in RATINGS:
                yield f"rating {rating}: {self.ratings[rating]}"
            yield f"rows without rating (margin 0): {self.rows - self.ratings.total()}"
            if self.rows and not self.ratings:
                yield "warning: no row has a rating, so a margin table changes nothing"
        for name, counts in (("", self.safety), ("", self.categories), ("source ", self.sources)):
            for value, count in sorted(counts.items()):
                yield f"{name}{value}: {count}"
        for name, count in sorted(self.ignored_fields.items()):
            yield f'field "{name}" is not used{did_you_mean(name, _FIELDS[self.kind])}: {count}'


def check_file(file: Path | str, kind: Kind, *, max_problems: int = 20) -> DataSummary:
    """Read every row of a file and count; `problems` keeps the first `max_problems`.

    Raises:
        UserInputError: the file is not there or cannot be read.
    """
    summary = DataSummary(kind)
    for _, row, value in scan(file, _READERS[kind]):
        if isinstance(value, UserInputError):
            summary.unusable += 1
            if len(summary.problems) < max_problems:
                summary.problems.append(str(value))
            continue
        _count(summary, value)
        summary.ignored_fields.update(name for name in row or () if name not in _FIELDS[kind])
    return summary


def _count(summary: DataSummary, value: Dialogue | Preference | Prompt) -> None:
    messages = value.messages if isinstance(value, Dialogue | Prompt) else value.prompt
    contents = [message.content for message in messages]
    summary.rows += 1
    summary.turns += sum(message.role == "user" for message in messages)
    summary.system_messages += messages[0].role == "system"
    summary.ends_with_user += messages[-1].role == "user"
    summary.sources[value.source or "not named"] += 1
    if isinstance(value, Preference):
        contents += [value.chosen, value.rejected]
        summary.identical_pairs += value.chosen == value.rejected
        summary.prefers_unsafe += value.chosen_safe is False and value.rejected_safe is True
        if value.rating is not None:
            summary.ratings[value.rating] += 1
        summary.safety[f"chosen {_LABELS[value.chosen_safe]}, rejected {_LABELS[value.rejected_safe]}"] += 1
        summary.categories[f"domain {value.domain or 'not named'}"] += 1
    else:
        summary.safety["is_safety true" if value.is_safety else "is_safety false"] += 1
    if isinstance(value, Prompt) and value.risk_category is not None:
        summary.categories[f"risk category {value.risk_category}"] += 1
    summary.empty_contents += not all(content.strip() for content in contents)
