"""What a user may state once and expect to be kept: a name, a persona, a hobby, the language of the answers.

Name, persona and hobby are asked for later; the language is kept by answering in it. A statement ("Act as
Captain Rex.") stands before a question in the same message, usually that of the first turn, or in a system
message. Later statements take the place of earlier ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Literal

from llama2_chat.errors import UserInputError
from llama2_chat.testbed.family import Arguments, Family, Split, fill, pattern_of
from llama2_chat.testbed.lexicon import (
    FIRST_NAMES,
    HOBBY_ACTIVITIES,
    HOBBY_OBJECTS,
    LAST_NAMES,
    PERSONA_NAMES,
    TITLES,
    alternatives,
)

AttributeName = Literal["name", "persona", "hobby", "language"]


@dataclass(frozen=True, eq=False)
class Attribute:
    """One thing to keep: how it is stated and, where it can be asked for, the family that asks.

    `short` is the abbreviated statement of the Ghost Attention recipe ("Figure: Captain Rex."). The value is
    put together from two words, so that some values are held out; a language is one word, never held out.
    """

    name: AttributeName
    instructions: tuple[str, ...]
    held_out_instructions: tuple[str, ...]
    short: str
    words: tuple[tuple[str, ...], ...]
    recall: Family | None

    def draw(self, rng: Random, split: Split) -> str:
        """A value on the given side of the hold-out."""
        if self.recall is not None:
            return self.recall.draw(rng, split)["value"]
        return rng.choice(self.words[0])

    def instruct(self, value: str, rng: Random, split: Split, *, short: bool = False) -> str:
        """A sentence that states the attribute."""
        wordings = self.instructions if split == "train" else self.held_out_instructions
        return fill(self.short if short else rng.choice(wordings), {"value": value})

    def read(self, sentence: str) -> str | None:
        """The value, if `sentence` states this attribute."""
        for pattern in self._patterns:
            if match := pattern.fullmatch(sentence):
                return match["value"]
        return None

    @cached_property
    def _patterns(self) -> tuple[re.Pattern[str], ...]:
        value = r"\s".join(f"(?:{alternatives(words)})" for words in self.words)
        wordings = (*self.instructions, *self.held_out_instructions, self.short)
        return tuple(pattern_of(wording, {"value": value}) for wording in wordings)


def _draw_from(words: tuple[tuple[str, ...], ...]) -> Callable[[Random], dict[str, str]]:
    return lambda rng: {"value": " ".join(rng.choice(part) for part in words)}


def _mistake_from(words: tuple[tuple[str, ...], ...]) -> Callable[[Arguments, Random], str]:
    def mistake(arguments: Arguments, rng: Random) -> str:
        while (value := _draw_from(words)(rng)["value"]) == arguments["value"]:
            pass
        return value

    return mistake


def _recall(
    name: str,
    words: tuple[tuple[str, ...], ...],
    questions: tuple[str, ...],
    held_out_questions: tuple[str, ...],
    statements: tuple[str, ...],
) -> Family:
    """The family that asks for an attribute; its one argument, `value`, was stated earlier."""
    return Family(
        name=f"recall_{name}",
        questions=questions,
        held_out_questions=held_out_questions,
        statements=statements,
        slots={},
        value=r"\s".join(f"(?:{alternatives(part)})" for part in words),
        sample=_draw_from(words),
        solve=lambda arguments: arguments["value"],
        mistake=_mistake_from(words),
    )


_NAME_WORDS = (FIRST_NAMES, LAST_NAMES)
_PERSONA_WORDS = (TITLES, PERSONA_NAMES)
_HOBBY_WORDS = (HOBBY_ACTIVITIES, HOBBY_OBJECTS)

LANGUAGE_ANSWERS = {
    "French": "La réponse est {value}.",
    "Spanish": "La respuesta es {value}.",
    "German": "Die Antwort ist {value}.",
}
LANGUAGE_OPENERS = {"French": "Avec plaisir!", "Spanish": "Con gusto!", "German": "Sehr gerne!"}

ATTRIBUTES: dict[AttributeName, Attribute] = {
    "name": Attribute(
        name="name",
        instructions=("My name is {value}.", "Call me {value}.", "Please call me {value}."),
        held_out_instructions=("I am {value}.",),
        short="Name: {value}.",
        words=_NAME_WORDS,
        recall=_recall(
            "name",
            _NAME_WORDS,
            (
                "What is my name?",
                "Who am I?",
                "Do you know my name?",
                "Tell me who I am.",
            ),
            (
                "Tell me my name.",
                "Do you know who I am?",
            ),
            ("Your name is {value}.", "You are {value}."),
        ),
    ),
    "persona": Attribute(
        name="persona",
        instructions=("Act as {value}.", "You are {value}."),
        held_out_instructions=("Please act as {value}.",),
        short="Figure: {value}.",
        words=_PERSONA_WORDS,
        recall=_recall(
            "persona",
            _PERSONA_WORDS,
            (
                "What is your name?",
                "Who are you?",
                "Tell me your name.",
            ),
            (
                "Tell me who you are.",
                "Can you tell me your name?",
            ),
            ("My name is {value}.", "I am {value}."),
        ),
    ),
    "hobby": Attribute(
        name="hobby",
        instructions=("You enjoy {value}.", "Your hobby is {value}."),
        held_out_instructions=("You do enjoy {value}.",),
        short="Hobby: {value}.",
        words=_HOBBY_WORDS,
        recall=_recall(
            "hobby",
            _HOBBY_WORDS,
            (
                "What is your hobby?",
                "What do you enjoy?",
                "Tell me what you enjoy.",
                "Do you have a hobby?",
            ),
            (
                "Tell me your hobby.",
                "Can you tell me what you enjoy?",
            ),
            ("My hobby is {value}.", "I enjoy {value}."),
        ),
    ),
    "language": Attribute(
        name="language",
        instructions=("Speak in {value}.", "Answer in {value}.", "Please speak in {value}."),
        held_out_instructions=("Please answer in {value}.",),
        short="Language: {value}.",
        words=(tuple(LANGUAGE_ANSWERS),),
        recall=None,
    ),
}


def attributes_without(leave_out: Sequence[str]) -> list[Attribute]:
    """All attributes but those that `leave_out` names.

    Raises:
        UserInputError: it names one that there is not, or all of them.
    """
    names = ", ".join(ATTRIBUTES)
    unknown = [name for name in leave_out if name not in ATTRIBUTES]
    if unknown:
        raise UserInputError(f"leave_out: no attribute {', '.join(unknown)}; one of {names}")
    attributes = [attribute for name, attribute in ATTRIBUTES.items() if name not in leave_out]
    if not attributes:
        raise UserInputError(f"leave_out: nothing is left of {names}; leave one in")
    return attributes
