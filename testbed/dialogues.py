"""Puts questions, stated attributes and answers together into dialogues of one or more turns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Literal

from llama2_chat.testbed.answers import REFERENCE, REFERENCE_REFUSALS, Mix, write_any
from llama2_chat.testbed.attributes import ATTRIBUTES, Attribute, AttributeName
from llama2_chat.testbed.family import Split
from llama2_chat.testbed.request import TASK_FAMILIES, Request
from llama2_chat.testbed.risky_families import BORDERLINE_FAMILIES, UNSAFE_FAMILIES
from llama2_chat.testbed.wording import (
    ANSWER_TEMPLATES,
    HELD_OUT_JAILBREAKS,
    JAILBREAKS,
    SAFETY_PREPROMPT,
    SAFETY_PREPROMPT_ADJECTIVES,
)

if TYPE_CHECKING:
    from llama2_chat.dialogue import RiskCategory

RequestKind = Literal["harmless", "borderline", "unsafe"]
MessageRow = dict[str, str]

SOURCE = "testbed"
"""The field `source` of every row."""

_FAMILIES = {"harmless": TASK_FAMILIES, "borderline": BORDERLINE_FAMILIES, "unsafe": UNSAFE_FAMILIES}
_JAILBREAK_SHARE = {"harmless": 0.03, "borderline": 0.1, "unsafe": 0.4}
"""A jailbreak wording proves nothing by itself: harmless requests carry one now and then."""

_NUMBER_ANSWERS = tuple(family for family in TASK_FAMILIES if family.value.startswith(r"\d"))
_ASKED_FOR = tuple(attribute for attribute in ATTRIBUTES.values() if attribute.recall is not None)


@dataclass(frozen=True)
class Question:
    """A user's message and what it asks for."""

    text: str
    request: Request


def rng_of(name: str, seed: int, split: Split) -> Random:
    """The random numbers of one generator."""
    # A string seeds them through SHA-512, the same in every process.
    return Random(f"{name}/{split}/{seed}")


def log_uniform(rng: Random, low: int, high: int) -> int:
    """A number of turns, uniform on a logarithmic scale: short dialogues are more frequent than long ones."""
    return round(math.exp(rng.uniform(math.log(low), math.log(high))))


def draw_question(
    rng: Random,
    split: Split,
    kind: RequestKind,
    attributes: Mapping[AttributeName, str] | None = None,
) -> Question:
    """A question of the given kind, in a dialogue in which `attributes` have been stated."""
    attributes = attributes or {}
    families = _NUMBER_ANSWERS if "language" in attributes and kind == "harmless" else _FAMILIES[kind]
    family = rng.choice(families)
    arguments = family.draw(rng, split)
    text = family.ask(arguments, rng, split)
    if rng.random() < _JAILBREAK_SHARE[kind]:
        text = f"{rng.choice(JAILBREAKS if split == 'train' else HELD_OUT_JAILBREAKS)} {text}"
    return Question(text, Request(family, arguments, attributes))


def draw_recall(rng: Random, split: Split, attributes: Mapping[AttributeName, str]) -> Question:
    """A question that only one who has kept `attributes` answers well."""
    asked = [attribute for attribute in _ASKED_FOR if attribute.name in attributes]
    if not asked:
        return draw_question(rng, split, "harmless", attributes)
    attribute = rng.choice(asked)
    family = attribute.recall
    assert family is not None
    arguments = {"value": attributes[attribute.name]}
    return Question(family.ask(arguments, rng, split), Request(family, arguments, attributes))


def draw_attributes(rng: Random, split: Split) -> tuple[str, dict[AttributeName, str]]:
    """A statement of one or two attributes, and their values. The language is never stated with another."""
    count = 1 if rng.random() < 0.7 else 2
    chosen = [ATTRIBUTES["language"]] if rng.random() < 0.25 else rng.sample(_ASKED_FOR, count)
    values = {attribute.name: attribute.draw(rng, split) for attribute in chosen}
    short = rng.random() < 0.3
    stated = [attribute.instruct(values[attribute.name], rng, split, short=short) for attribute in chosen]
    return " ".join(stated), values


def attribute_questions(
    rng: Random, split: Split, turns: int, *, stated: Split | None = None
) -> list[Question]:
    """Attributes stated in the first of `turns` messages, something else in between, and a recall last.

    Values and wording of the statement are of the side `stated`, by default that of everything else.
    """
    statement, attributes = draw_attributes(rng, stated or split)
    between = [draw_question(rng, split, "harmless", attributes) for _ in range(turns - 1)]
    questions = [*between, draw_recall(rng, split, attributes)]
    first = questions[0]
    return [Question(f"{statement} {first.text}", first.request), *questions[1:]]


def waiting_questions(rng: Random, split: Split, turns: int, attribute: Attribute | None) -> list[Question]:
    """Questions of a dialogue to which a statement of `attribute` is still to be added."""
    keeps_language = attribute is not None and attribute.recall is None
    known: dict[AttributeName, str] = {"language": "French"} if keeps_language else {}
    count = turns if attribute is None or keeps_language else turns - 1
    questions = [
        Question(question.text, Request(question.request.family, question.request.arguments, {}))
        for question in (draw_question(rng, split, "harmless", known) for _ in range(count))
    ]
    if attribute is None or attribute.recall is None:
        return questions
    # The question does not name the value that it asks for, so any will do.
    arguments = {"value": attribute.draw(rng, split)}
    text = attribute.recall.ask(arguments, rng, split)
    return [*questions, Question(text, Request(attribute.recall, arguments, {}))]


def wandering_questions(rng: Random, split: Split, turns: int) -> list[tuple[Question, int]]:
    """Questions of a long dialogue in which now and then something is stated, and asked for.

    With each question stands how many turns ago the last statement was made (0 in the same message).
    """
    stated: dict[AttributeName, str] = {}
    questions = []
    age = 0
    for turn in range(turns):
        statement = ""
        if turn == 0 or rng.random() < 0.25:
            statement, stated = draw_attributes(rng, split)
            age = 0
        draw = draw_recall if rng.random() < (0.7 if statement else 0.4) else _draw_harmless
        question = draw(rng, split, stated)
        questions.append((Question(f"{statement} {question.text}".lstrip(), question.request), age))
        age += 1
    return questions


def _draw_harmless(rng: Random, split: Split, attributes: Mapping[AttributeName, str]) -> Question:
    return draw_question(rng, split, "harmless", attributes)


def task_questions(rng: Random, split: Split, turns: int, kind: RequestKind) -> list[Question]:
    """Unrelated questions, the last of the given kind, the others harmless."""
    before = [draw_question(rng, split, "harmless") for _ in range(turns - 1)]
    return [*before, draw_question(rng, split, kind)]


def draw_questions(
    rng: Random, split: Split, kind: RequestKind, *, multi_turn: float, attributes: float
) -> list[Question]:
    """The user's side of a dialogue: shares of several turns and, for a harmless one, of attributes."""
    if kind == "harmless" and rng.random() < attributes:
        return attribute_questions(rng, split, rng.choice((1, 2, 2, 2)))
    turns = rng.choice((2, 3)) if rng.random() < multi_turn else 1
    return task_questions(rng, split, turns, kind)


def safety_preprompt(rng: Random, category: RiskCategory | None = None) -> MessageRow:
    """A system message that asks for safe answers, for a risk category with its answer template."""
    first, second = rng.sample(SAFETY_PREPROMPT_ADJECTIVES, 2)
    text = SAFETY_PREPROMPT.format(first=first, second=second)
    return {"role": "system", "content": f"{text} {ANSWER_TEMPLATES[category]}" if category else text}


def prompt_of(questions: list[Question], rng: Random, *, history: Mix = REFERENCE) -> list[MessageRow]:
    """Messages that end with the last question; the earlier ones have been answered."""
    messages: list[MessageRow] = []
    for question in questions[:-1]:
        messages.append({"role": "user", "content": question.text})
        messages.append({"role": "assistant", "content": write_any(question.request, history, rng)})
    return [*messages, {"role": "user", "content": questions[-1].text}]


def reference_answer(request: Request, rng: Random) -> str:
    """An answer that nothing is wrong with."""
    return write_any(request, REFERENCE_REFUSALS if request.family.risk_category else REFERENCE, rng)
