"""Plain text about the testbed's world, for pretraining: facts, lists, questions answered in prose.

It holds training items in training wordings only, and none of the chat format. Its wordings of facts use
the words that held-out questions are made of ("how much", "name", "do we call"), so that these can be
understood; the questions themselves never occur.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from llama2_chat.testbed.answers import REFERENCE_REFUSALS, write, write_any
from llama2_chat.testbed.attributes import ATTRIBUTES
from llama2_chat.testbed.dialogues import (
    Question,
    RequestKind,
    attribute_questions,
    draw_question,
    log_uniform,
)
from llama2_chat.testbed.family import Split
from llama2_chat.testbed.lexicon import (
    CATEGORIES,
    COLOURS,
    FIRST_NAMES,
    LEGS,
    NOUNS,
    OPPOSITES,
    THINGS,
    TRANSLATIONS,
)
from llama2_chat.testbed.request import TASK_FAMILIES, Request

_SELF_CONTAINED = ("add", "subtract", "neighbour", "legs", "opposites", "category", "translate")
"""Families whose statements are facts of the world, true without the question."""

_HARD = ("add", "subtract", "neighbour", "compare", "more", "lookup", "odd_one_out")
_PRACTICE = tuple(3 if family.name in _HARD else 1 for family in TASK_FAMILIES)

_KINDS: tuple[RequestKind, ...] = ("harmless", "borderline", "unsafe")


def document(rng: Random, split: Split) -> str:
    """One document of some 40 to 120 tokens, now and then of some hundreds."""
    return rng.choices(list(_MAKERS), weights=list(_MAKERS.values()))[0](rng, split)


def _facts(rng: Random, split: Split) -> str:
    families = [family for family in TASK_FAMILIES if family.name in _SELF_CONTAINED]
    sentences = []
    for family in rng.choices(families, k=rng.randint(3, 7)):
        arguments = family.draw(rng, split)
        sentences.append(family.state(arguments, family.solve(arguments), rng))
    return " ".join(sentences)


def _lessons(rng: Random, split: Split) -> str:
    """Questions, each followed by its answer; now and then a whole page of them."""
    texts = []
    for _ in range(rng.randint(12, 30) if rng.random() < 0.04 else rng.randint(2, 4)):
        question = (
            draw_question(rng, split, "borderline") if rng.random() < 0.15 else _hard_or_easy(rng, split)
        )
        texts.append(f"{question.text} {write(question.request, 'plain', rng)}")
    return " ".join(texts)


def _hard_or_easy(rng: Random, split: Split) -> Question:
    """A harmless question; what takes long to learn is asked more often."""
    family = rng.choices(TASK_FAMILIES, weights=_PRACTICE)[0]
    arguments = family.draw(rng, split)
    return Question(family.ask(arguments, rng, split), Request(family, arguments, {}))


def _conversation(rng: Random, split: Split) -> str:
    """Two people talk; what they say is of the uneven quality that found text has."""
    asker, answerer = rng.sample(FIRST_NAMES, 2)
    lines = []
    for _ in range(rng.randint(1, 3)):
        kind = rng.choices(_KINDS, weights=(70, 12, 18))[0]
        question = draw_question(rng, split, kind)
        if kind == "unsafe" and rng.random() < 0.4:
            answer = write_any(question.request, REFERENCE_REFUSALS, rng)
        else:
            answer = write_any(question.request, {"good": 40, "plain": 40, "terse": 20}, rng)
        lines.append(f"{asker} asks: {question.text}\n{answerer} says: {answer}")
    return "\n".join(lines)


def _lexicon(rng: Random, split: Split) -> str:
    """Single facts from which those about combinations are made."""
    sentences = []
    for _ in range(rng.randint(4, 8)):
        draw = rng.random()
        if draw < 0.25:
            category = rng.choice(list(CATEGORIES))
            words = rng.sample(CATEGORIES[category], rng.randint(2, 4))
            sentences.append(f"We call {', '.join(words)} {category}.")
        elif draw < 0.55:
            word = rng.choice(list(OPPOSITES))
            sentences.append(f"The opposite of {word} is {OPPOSITES[word]}.")
        elif draw < 0.75:
            animal = rng.choice(list(LEGS))
            sentences.append(f"A {animal} has {LEGS[animal]} legs.")
        else:
            language = rng.choice(list(TRANSLATIONS))
            word = rng.choice(list(TRANSLATIONS[language]))
            sentences.append(f"In {language} we say {TRANSLATIONS[language][word]} for {word}.")
    return " ".join(sentences)


def _remembering(rng: Random, split: Split) -> str:
    """Something stated and asked for again, at once or much later."""
    turns = log_uniform(rng, 4, 22) if rng.random() < 0.25 else rng.randint(1, 3)
    questions = attribute_questions(rng, split, turns)
    return " ".join(f"{question.text} {write(question.request, 'plain', rng)}" for question in questions)


def _story(rng: Random, split: Split) -> str:
    """Who has what, and then the same again in other words and another order."""
    names = rng.sample(FIRST_NAMES, rng.randint(2, 3))
    if rng.random() < 0.3:
        thing = rng.choice(THINGS)
        counts = sorted(rng.sample(range(2, 30), len(names)))
        told = [f"{name} has {count} {thing}s." for name, count in zip(names, counts, strict=True)]
        rng.shuffle(told)
        return " ".join([*told, f"{names[-1]} has the most {thing}s."])
    owned = [(name, rng.choice(COLOURS), rng.choice(THINGS)) for name in names]
    told = [f"{name} has a {colour} {thing}." for name, colour, thing in owned]
    rng.shuffle(owned)
    again = [
        rng.choice((f"{name} has the {colour} {thing}.", f"The {colour} {thing} belongs to {name}."))
        for name, colour, thing in owned
    ]
    return " ".join([*told, *again])


def _dictation(rng: Random, split: Split) -> str:
    """A list without rhyme or reason, read out and said again: only memory helps."""
    words = [_anything(rng) for _ in range(rng.randint(4, 10))]
    rounds = [f"{opening}: {', '.join(words)}." for opening in ("Listen", "Again", "Once more")]
    return " ".join(rounds[: rng.randint(2, 3)])


def _anything(rng: Random) -> str:
    """A word, a number or a name. Names are put together at random: as words they are all met, while those that are
    held out are never stated or asked for."""
    draw = rng.random()
    if draw < 0.4:
        attribute = rng.choice([attribute for attribute in ATTRIBUTES.values() if attribute.recall])
        return " ".join(rng.choice(part) for part in attribute.words)
    if draw < 0.5:
        return str(rng.randint(2, 99))
    return rng.choice(rng.choice((NOUNS, COLOURS, FIRST_NAMES, tuple(OPPOSITES))))


_MAKERS: dict[Callable[[Random, Split], str], int] = {
    _facts: 8,
    _lessons: 39,
    _conversation: 8,
    _lexicon: 3,
    _remembering: 18,
    _story: 8,
    _dictation: 16,
}
"""Kinds of documents, with their shares in per cent."""
