"""Instructions to be kept throughout a dialogue, and drawing the one that a dialogue gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from random import Random
from typing import Any

from llama2_chat.dialogue import Dialogue, refuse_chat_tags
from llama2_chat.errors import did_you_mean
from llama2_chat.fields import check_text, optional_text, required
from llama2_chat.ghost_attention.checks import Check, optional_checks
from llama2_chat.jsonl import read_as

_FIELDS = ("instruction", "short", "group", "check")
_ALIKE = 0.8
"""How much of two names must agree for one to be the other misspelt."""

UNGROUPED = "ungrouped"
"""The group of instructions that name none. They may contradict each other, so they are one group."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """One thing to keep, in words and, if there is one, in a short form; of one group only one is drawn.

    `checks` are programs that all hold of an answer that keeps it.
    """

    text: str
    short: str | None = None
    group: str = UNGROUPED
    checks: tuple[Check, ...] = ()

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Instruction:
        """Read one row of an instructions file; raises ValueError on any departure from the format."""
        _refuse_misspelt(row)
        text = _filled(required(row, "instruction"), "instruction")
        short = optional_text(row, "short")
        group = optional_text(row, "group")
        return cls(
            text,
            None if short is None else _filled(short, "short"),
            UNGROUPED if group is None else _filled(group, "group"),
            optional_checks(row),
        )


@dataclass(frozen=True, slots=True)
class DrawnInstruction:
    """What a dialogue is instructed to keep: one or more instructions, joined by a space.

    `checks` holds the programs of each group whose instruction has any.
    """

    text: str
    groups: tuple[str, ...]
    is_short: bool
    checks: Mapping[str, tuple[Check, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class GroupedDialogue:
    """A dialogue and the group of instructions that its questions are about, if any."""

    dialogue: Dialogue
    group: str | None

    @property
    def turns(self) -> int:
        """How often the user speaks."""
        return sum(message.role == "user" for message in self.dialogue.messages)

    def cut_after_each_question(self) -> list[Dialogue]:
        """The dialogue up to its first question, up to its second, and so on."""
        messages = self.dialogue.messages
        ends = [place + 1 for place, message in enumerate(messages) if message.role == "user"]
        return [replace(self.dialogue, messages=messages[:end]) for end in ends]


def read_instructions(files: Sequence[str]) -> dict[str, list[Instruction]]:
    """The instructions of all files by their group, groups in the order in which they first appear."""
    by_group: dict[str, list[Instruction]] = {}
    for file in files:
        for instruction in read_as(Path(file), Instruction.from_row):
            by_group.setdefault(instruction.group, []).append(instruction)
    return by_group


def read_grouped_dialogues(files: Sequence[str], groups: Sequence[str]) -> list[GroupedDialogue]:
    """The dialogues of all files; one that names a group for which there is no instruction is refused."""

    def from_row(row: Mapping[str, Any]) -> GroupedDialogue:
        group = optional_text(row, "group")
        if group is not None and group not in groups:
            raise ValueError(
                f'group "{group}" has no instruction{did_you_mean(group, groups)}; there are instructions for '
                f"{', '.join(groups)}: add one to the instructions or correct the group"
            )
        return GroupedDialogue(Dialogue.from_row(row), group)

    return [dialogue for file in files for dialogue in read_as(Path(file), from_row)]


def draw_instruction(
    by_group: Mapping[str, Sequence[Instruction]],
    rng: Random,
    *,
    about: str | None,
    max_instructions: int,
    short_fraction: float,
) -> DrawnInstruction:
    """One to `max_instructions` instructions, equally often, of different groups, in random order.

    Args:
        about: A group that one of them must be of.
        short_fraction: How often the short forms are taken, of those that have one.

    Source: A.3.5 (combined at random, half of the time shortened).
    """
    count = rng.randint(1, min(max_instructions, len(by_group)))
    fixed = [] if about is None else [about]
    groups = fixed + rng.sample([group for group in by_group if group != about], count - len(fixed))
    rng.shuffle(groups)
    drawn = [rng.choice(by_group[group]) for group in groups]
    short = rng.random() < short_fraction
    texts = [instruction.short if short and instruction.short else instruction.text for instruction in drawn]
    is_short = short and any(instruction.short for instruction in drawn)
    checks = {group: one.checks for group, one in zip(groups, drawn, strict=True) if one.checks}
    return DrawnInstruction(" ".join(texts), tuple(groups), is_short, checks)


def _refuse_misspelt(row: Mapping[str, Any]) -> None:
    """Other fields are the user's own, but an instruction whose `chek` is passed over is checked by nobody."""
    for name in row:
        if name not in _FIELDS and get_close_matches(name, _FIELDS, n=1, cutoff=_ALIKE):
            raise ValueError(
                f'field "{name}" unknown{did_you_mean(name, _FIELDS)}; correct it or give it another name'
            )


def _filled(value: object, name: str) -> str:
    """A text that says something and can stand in a user's message."""
    text = check_text(value, name).strip()
    if not text:
        raise ValueError(f"{name} is empty; write what is to be kept or remove the row")
    refuse_chat_tags(text, name)
    return text
