"""What a task family is, and the rule that keeps some of its items out of training.

An *item* is a family together with its arguments ("add", 27, 8). A family knows how its questions and its
full-sentence answers are worded, both as templates that write text and as patterns that read it: the
oracle needs nothing but the text.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from random import Random
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from llama2_chat.dialogue import RiskCategory

Split = Literal["train", "held_out"]
Arguments = Mapping[str, str]

HELD_OUT_ONE_IN = 6
"""One item in this many never occurs in training text."""


@dataclass(frozen=True, eq=False)
class Family:
    """One kind of request: how it is asked, answered, drawn and solved.

    `slots` and `value` are regular expressions; `{value}` in a statement stands for the solution. In a
    `symmetric` family the order of the arguments does not matter to what the item is. `short_answers` says
    whether the bare solution is an answer too ("35"), as against a whole sentence only.
    """

    name: str
    questions: tuple[str, ...]
    held_out_questions: tuple[str, ...]
    statements: tuple[str, ...]
    slots: Mapping[str, str]
    value: str
    sample: Callable[[Random], dict[str, str]]
    solve: Callable[[Arguments], str]
    mistake: Callable[[Arguments, Random], str]
    symmetric: bool = False
    short_answers: bool = True
    borderline: bool = False
    risk_category: RiskCategory | None = None

    def draw(self, rng: Random, split: Split) -> dict[str, str]:
        """Arguments of an item on the given side of the hold-out."""
        while True:
            arguments = self.sample(rng)
            if self.is_held_out(arguments) == (split == "held_out"):
                return arguments

    def is_held_out(self, arguments: Arguments) -> bool:
        """Whether this item belongs to held-out sets only: a fixed function of family and arguments."""
        if self.symmetric:
            parts = sorted(value.lower() for value in arguments.values())
        else:
            parts = [f"{slot}={value.lower()}" for slot, value in sorted(arguments.items())]
        return zlib.crc32("|".join((self.name, *parts)).encode()) % HELD_OUT_ONE_IN == 0

    def ask(self, arguments: Arguments, rng: Random, split: Split) -> str:
        """A question about the item, in a wording of the given side."""
        wordings = self.questions if split == "train" else self.held_out_questions
        return fill(rng.choice(wordings), arguments)

    def state(self, arguments: Arguments, value: str, rng: Random) -> str:
        """A full-sentence answer that gives `value` as the solution."""
        return fill(rng.choice(self.statements), {**arguments, "value": value})

    def read_question(self, text: str, known: Arguments = MappingProxyType({})) -> dict[str, str] | None:
        """The arguments, if `text` is one of the family's questions and has a solution.

        `known` are arguments that the text need not state.
        """
        for pattern in self._question_patterns:
            if match := pattern.fullmatch(text):
                arguments = {**known, **match.groupdict()}
                try:
                    self.solve(arguments)
                except (KeyError, ValueError):
                    continue
                return arguments
        return None

    def read_statement(self, sentence: str) -> dict[str, str] | None:
        """The slots of a full-sentence answer and its `value`, if `sentence` is one (of whatever item)."""
        for pattern in self._statement_patterns:
            if match := pattern.fullmatch(sentence):
                return match.groupdict()
        return None

    @cached_property
    def value_pattern(self) -> re.Pattern[str]:
        """Matches anything that has the form of a solution."""
        return re.compile(self.value, re.IGNORECASE)

    @cached_property
    def _question_patterns(self) -> tuple[re.Pattern[str], ...]:
        return tuple(pattern_of(q, self.slots) for q in (*self.questions, *self.held_out_questions))

    @cached_property
    def _statement_patterns(self) -> tuple[re.Pattern[str], ...]:
        slots = {**self.slots, "value": self.value}
        return tuple(pattern_of(statement.rstrip("."), slots) for statement in self.statements)


def fill(template: str, arguments: Arguments) -> str:
    """The template with its slots filled and its first letter raised."""
    text = template.format_map(arguments)
    return text[:1].upper() + text[1:]


def pattern_of(template: str, slots: Arguments) -> re.Pattern[str]:
    """A case-insensitive pattern that reads what `fill` writes; each slot becomes a named group,
    and stands for the same text wherever it is repeated."""
    pattern = ""
    seen: set[str] = set()
    for index, part in enumerate(re.split(r"\{(\w+)\}", template)):
        if index % 2 == 0:
            pattern += re.escape(part)
        elif part in seen:
            pattern += f"(?P={part})"
        else:
            pattern += f"(?P<{part}>{slots[part]})"
            seen.add(part)
    return re.compile(pattern, re.IGNORECASE)
