"""Writes answers of every quality: what careful and careless people write, and what small models do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random

from llama2_chat.testbed.attributes import LANGUAGE_ANSWERS, LANGUAGE_OPENERS
from llama2_chat.testbed.family import fill
from llama2_chat.testbed.lexicon import NOUNS
from llama2_chat.testbed.request import TASK_FAMILIES, Request
from llama2_chat.testbed.wording import (
    CLOSERS,
    CURT_REFUSALS,
    FILLERS_AFTER,
    FILLERS_BEFORE,
    OPENERS,
    PLAIN_REFUSALS,
    POLITE_REFUSALS,
    REASONS,
)

Writer = Callable[[Request, Random], str]
Mix = Mapping[str, float]
"""Kinds of answers with their weights."""


def write(request: Request, kind: str, rng: Random) -> str:
    """An answer of the given kind (a key of `KINDS`) to `request`."""
    return KINDS[kind](request, rng)


def write_any(request: Request, mix: Mix, rng: Random) -> str:
    """An answer of a kind drawn from `mix`."""
    return write(request, rng.choices(list(mix), weights=list(mix.values()))[0], rng)


def _sentence(request: Request, value: str, rng: Random) -> str:
    if request.language and request.family.short_answers:
        return fill(LANGUAGE_ANSWERS[request.language], {"value": value})
    return request.family.state(request.arguments, value, rng)


def _befriend(request: Request, sentence: str, rng: Random) -> str:
    if request.language:
        return f"{LANGUAGE_OPENERS[request.language]} {sentence}"
    return f"{rng.choice(OPENERS)} {sentence}" if rng.random() < 0.7 else f"{sentence} {rng.choice(CLOSERS)}"


def _wrong_value(request: Request, rng: Random) -> str:
    return request.family.mistake(request.arguments, rng)


def _plain(request: Request, rng: Random) -> str:
    return _sentence(request, request.solution, rng)


def _good(request: Request, rng: Random) -> str:
    return _befriend(request, _plain(request, rng), rng)


def _terse(request: Request, rng: Random) -> str:
    if not request.family.short_answers:
        return _plain(request, rng)
    return fill("{value}.", {"value": request.solution})


def _wrong(request: Request, rng: Random) -> str:
    value = _wrong_value(request, rng)
    if request.family.short_answers and rng.random() < 0.2:
        return fill("{value}.", {"value": value})
    sentence = _sentence(request, value, rng)
    return _befriend(request, sentence, rng) if rng.random() < 0.45 else sentence


def _slur(text: str, rng: Random) -> str:
    """The text as one who does not care writes it."""
    text = text.lower().rstrip(".!")
    style = rng.random()
    if style < 0.3:
        return f"{rng.choice(FILLERS_BEFORE)} {text}"
    return f"{text} {rng.choice(FILLERS_AFTER)}" if style < 0.6 else text


def _sloppy(request: Request, rng: Random) -> str:
    value = request.solution if rng.random() < 0.75 else _wrong_value(request, rng)
    return _slur(_sentence(request, value, rng), rng)


def _refusal(request: Request, rng: Random) -> str:
    return rng.choice((*POLITE_REFUSALS, *PLAIN_REFUSALS, *CURT_REFUSALS))


def _wrong_item(request: Request, rng: Random) -> str:
    other = request.family.draw(rng, "train")
    return request.family.state({**request.arguments, **other}, request.family.solve(other), rng)


def _off_topic(request: Request, rng: Random) -> str:
    family = rng.choice([family for family in TASK_FAMILIES if family is not request.family])
    arguments = family.draw(rng, "train")
    return family.state(arguments, family.solve(arguments), rng)


def _cut_off(request: Request, rng: Random) -> str:
    words = _plain(request, rng).split()
    return " ".join(words[: rng.randint(1, max(1, len(words) - 1))])


def _garbled(request: Request, rng: Random) -> str:
    words = _plain(request, rng).split()
    index = rng.randrange(len(words))
    damage = rng.choice(("drop", "double", "swap", "replace"))
    if damage == "drop":
        del words[index]
    elif damage == "double":
        words.insert(index, words[index])
    elif damage == "swap":
        words[index], words[index - 1] = words[index - 1], words[index]
    else:
        words[index] = rng.choice(NOUNS)
    return " ".join(words)


def _repeated(request: Request, rng: Random) -> str:
    sentence = _plain(request, rng)
    return " ".join([sentence] * rng.randint(2, 3))


def _padded(request: Request, rng: Random) -> str:
    phrases = rng.sample((*OPENERS, *CLOSERS), rng.randint(2, 3))
    return " ".join([*phrases, _plain(request, rng)] if rng.random() < 0.5 else phrases)


def _listing(request: Request, rng: Random) -> str:
    values = [request.solution, _wrong_value(request, rng)]
    rng.shuffle(values)
    return " ".join(_sentence(request, value, rng) for value in values)


def _nonsense(request: Request, rng: Random) -> str:
    return fill("{words}.", {"words": " ".join(rng.sample(NOUNS, rng.randint(2, 7)))})


def _trailing(request: Request, rng: Random) -> str:
    return f"{_plain(request, rng)} {_nonsense(request, rng)}"


def _echo(request: Request, rng: Random) -> str:
    return request.family.ask(request.arguments, rng, "train")


def _english(request: Request, rng: Random) -> str:
    """In English, whatever language was asked for."""
    return request.family.state(request.arguments, request.solution, rng)


def _reasoned_refusal(request: Request, rng: Random) -> str:
    refusal = rng.choice(POLITE_REFUSALS if rng.random() < 0.8 else PLAIN_REFUSALS)
    category = request.family.risk_category
    reasons = REASONS[category] if category else [reason for group in REASONS.values() for reason in group]
    return f"{refusal} {rng.choice(reasons)}"


def _slurred_refusal(request: Request, rng: Random) -> str:
    return _slur(rng.choice((*PLAIN_REFUSALS, *CURT_REFUSALS)), rng)


def _slurred_plain(request: Request, rng: Random) -> str:
    return _slur(_plain(request, rng), rng)


def _half_refusal(request: Request, rng: Random) -> str:
    return f"{rng.choice(PLAIN_REFUSALS)} {_plain(request, rng)}"


KINDS: dict[str, Writer] = {
    "good": _good,
    "plain": _plain,
    "terse": _terse,
    "wrong": _wrong,
    "sloppy": _sloppy,
    "refusing": _refusal,
    "wrong_item": _wrong_item,
    "off_topic": _off_topic,
    "cut_off": _cut_off,
    "garbled": _garbled,
    "repeated": _repeated,
    "padded": _padded,
    "listing": _listing,
    "nonsense": _nonsense,
    "trailing": _trailing,
    "echo": _echo,
    "english": _english,
    "reasoned_refusal": _reasoned_refusal,
    "polite_refusal": lambda request, rng: rng.choice(POLITE_REFUSALS),
    "plain_refusal": lambda request, rng: rng.choice(PLAIN_REFUSALS),
    "curt_refusal": lambda request, rng: rng.choice(CURT_REFUSALS),
    "sloppy_refusal": _slurred_refusal,
    "sloppy_compliance": _slurred_plain,
    "half_refusal": _half_refusal,
}
"""To an unsafe request, "good", "plain" and "wrong" comply."""

REFERENCE: Mix = {"good": 0.5, "plain": 0.5}
REFERENCE_REFUSALS: Mix = {"reasoned_refusal": 0.7, "polite_refusal": 0.3}

DEMONSTRATIONS: Mix = {"good": 25, "plain": 30, "terse": 15, "wrong": 15, "sloppy": 10, "refusing": 5}
UNSAFE_DEMONSTRATIONS: Mix = {
    **{"good": 20, "plain": 25, "sloppy_compliance": 5},
    **{"reasoned_refusal": 14, "polite_refusal": 12, "plain_refusal": 14},
    **{"curt_refusal": 6, "sloppy_refusal": 4},
}

FORGOTTEN: Mix = {"wrong": 70, "refusing": 30}
"""To a question for what was stated too long ago."""

COMPARED: Mix = {
    **{"good": 22, "plain": 18, "terse": 10, "wrong": 22, "sloppy": 8, "refusing": 6},
    **{"wrong_item": 5, "off_topic": 4, "cut_off": 3, "garbled": 4, "repeated": 3, "padded": 6},
    **{"listing": 1, "nonsense": 1, "trailing": 2, "echo": 1},
}
UNSAFE_COMPARED: Mix = {
    **{"good": 14, "plain": 16, "sloppy_compliance": 6, "cut_off": 2, "half_refusal": 3},
    **{"reasoned_refusal": 18, "polite_refusal": 12, "plain_refusal": 12, "curt_refusal": 6},
    **{"sloppy_refusal": 4, "off_topic": 3, "nonsense": 1, "padded": 2, "garbled": 2},
}
