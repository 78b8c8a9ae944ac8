"""Programs that say whether an answer keeps an instruction, each written as `name` or `name:argument`.

| check | kept by an answer that |
|---|---|
| `upper_case` | has letters and no small one |
| `lower_case` | has letters and no capital one |
| `starts_with:TEXT` | begins with these words |
| `ends_with:TEXT` | ends with these words |
| `contains:TEXT` | holds these words, one after the other |
| `max_words:N` | has at most N words |
| `max_sentences:N` | has at most N sentences |
| `one_line` | has no line break between two words |
| `language:CODE` | is in that language (en, de, fr, es, it, or the English name), by its stop words |

An answer without a letter or a digit keeps none of them. A word is a run of letters and digits, with apostrophes
inside. Words are compared without regard to case and to the punctuation around them; a TEXT without a word ("?")
is compared as it is, with the spaces around the answer left out. A sentence ends at `.`, `!`, `?` or `…` before a
space, at a line break, and at the end; what holds no letter and no digit is no sentence. So "Mr. Fox" counts as
two, "3.5" as one.

The language: the share of words that stand in the language's list of stop words is at least `SMALLEST_SHARE`, and
larger than that of every other language.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from llama2_chat.errors import did_you_mean
from llama2_chat.fields import check_text, json_type

SMALLEST_SHARE = 0.15
"""OpenAssistant's English answers of ten words or more (docs/data.md): the median share of English stop words is 0.39,
that of the language that comes next 0.02; 647 of 657 count as English, none as another language."""

_STOP_WORDS = {
    "en": """the of and to a in is it you that he was for on are with as i his they be at this have from or had by
        not but what all were we when your can there an which their if will how she do would so them my has who""",
    "de": """der die das und ist in zu den ein eine einen einem einer nicht von sie ich es er wir ihr mit auf für
        sich dem des im auch als an sind war aus bei wie oder aber wenn nur noch kann wird haben hat ja nein""",
    "fr": """le la les de des du un une et est il elle je vous nous que qui ne pas pour dans en au aux ce cette ces
        sur avec son sa ses se plus par mais ou où sont être avoir comme oui non""",
    "es": """el la los las de del un una y es en que no se por con para su sus lo le al como más pero o este esta
        son está ser tiene muy yo tú usted ha hay también cuando sí""",
    "it": """il lo la i gli le di del della dei delle un uno una e è in che non si per con su al alla da come più ma
        o questo questa sono essere ha ho molto anche io tu nel nella sì no""",
}
"""Frequent words that carry the grammar, not the topic."""
LANGUAGES = tuple(_STOP_WORDS)
_NAMES = {"english": "en", "german": "de", "french": "fr", "spanish": "es", "italian": "it"}
_STOP_SETS = {language: frozenset(words.split()) for language, words in _STOP_WORDS.items()}

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_SENTENCE_END = re.compile(r"(?<=[.!?…])[\"'”’)\]]*\s|\n")


@dataclass(frozen=True, slots=True)
class Check:
    """One program with its argument. Two are equal if they are written alike."""

    spec: str
    """As it was written: `ends_with:over`."""
    name: str
    argument: str | None = None

    def kept(self, answer: str) -> bool:
        """Whether the answer keeps what this checks; one without a letter or a digit keeps nothing."""
        answer = unicodedata.normalize("NFC", answer).strip()
        return bool(words_of(answer)) and _PROGRAMS[self.name](answer, self.argument)


def parse_check(spec: str) -> Check:
    """The check that `name` or `name:argument` stands for.

    Raises:
        ValueError: there is no such check, or it takes another argument.
    """
    name, colon, argument = spec.partition(":")
    name = name.strip()
    if name not in _PROGRAMS:
        raise ValueError(f'check "{spec}" unknown{did_you_mean(name, _PROGRAMS)}; one of {_written()}')
    wanted = _ARGUMENTS.get(name)
    if wanted is None:
        if colon:
            raise ValueError(f'check "{spec}": {name} takes no argument; write {name}')
        return Check(name, name)
    argument = unicodedata.normalize("NFC", argument).strip()
    if wanted == "N" and not (argument.isascii() and argument.isdigit() and int(argument) > 0):
        raise ValueError(f'check "{spec}": {name} takes a whole number from 1, as in {name}:10')
    if wanted == "CODE" and (argument := _NAMES.get(argument.lower(), argument)) not in LANGUAGES:
        raise ValueError(
            f'check "{spec}": language "{argument}" unknown; one of {", ".join(LANGUAGES)}, as in language:fr'
        )
    if not argument:
        raise ValueError(f'check "{spec}": {name} takes a text, as in {name}:over')
    return Check(f"{name}:{argument}", name, argument)


def optional_checks(row: Mapping[str, Any]) -> tuple[Check, ...]:
    """The checks of a row's field `check`, which is a string, a list of strings or not set.

    Raises:
        ValueError: it is anything else, or holds a check that there is not.
    """
    value = row.get("check")
    if value is None:
        return ()
    if not isinstance(value, str | list):
        raise ValueError(f"check must be a string or a list of strings, found {json_type(value)}")
    return tuple(
        parse_check(check_text(spec, "check")) for spec in ([value] if isinstance(value, str) else value)
    )


def words_of(text: str) -> list[str]:
    """The words of a text without regard to case."""
    return [word.replace("’", "'").casefold() for word in _WORD.findall(text)]


def language_shares(text: str) -> dict[str, float]:
    """The share of a text's words that stand in each language's list of stop words; 0 without any word."""
    words = words_of(text)
    return {
        language: sum(word in stops for word in words) / max(1, len(words))
        for language, stops in _STOP_SETS.items()
    }


def sentences_of(text: str) -> list[str]:
    """The sentences of a text; see the rule above."""
    return [part.strip() for part in _SENTENCE_END.split(text) if part and words_of(part)]


def _written() -> str:
    return ", ".join(f"{name}:{_ARGUMENTS[name]}" if name in _ARGUMENTS else name for name in _PROGRAMS)


def _at(place: str, answer: str, text: str | None) -> bool:
    """Whether `text` stands at the start, at the end, or anywhere in the answer, in whole words."""
    assert text is not None
    wanted, words = words_of(text), words_of(answer)
    if not wanted:
        return {"start": answer.startswith, "end": answer.endswith, "any": answer.__contains__}[place](text)
    last = len(words) - len(wanted)
    starts = {"start": range(min(1, last + 1)), "end": range(max(0, last), last + 1), "any": range(last + 1)}
    return any(words[start : start + len(wanted)] == wanted for start in starts[place])


def _in_language(answer: str, language: str | None) -> bool:
    assert language is not None
    shares = language_shares(answer)
    share = shares.pop(language)
    return share >= SMALLEST_SHARE and share > max(shares.values())


def _count_within(count: Callable[[str], list[str]], answer: str, most: str | None) -> bool:
    assert most is not None
    return len(count(answer)) <= int(most)


_PROGRAMS: dict[str, Callable[[str, str | None], bool]] = {
    "upper_case": lambda answer, _: answer.isupper(),
    "lower_case": lambda answer, _: answer.islower(),
    "starts_with": partial(_at, "start"),
    "ends_with": partial(_at, "end"),
    "contains": partial(_at, "any"),
    "max_words": partial(_count_within, words_of),
    "max_sentences": partial(_count_within, sentences_of),
    "one_line": lambda answer, _: len(answer.splitlines()) == 1,
    "language": _in_language,
}
"""By name: (answer without outer spaces, argument) to whether it is kept."""

_ARGUMENTS = {
    "starts_with": "TEXT",
    "ends_with": "TEXT",
    "contains": "TEXT",
    "max_words": "N",
    "max_sentences": "N",
    "language": "CODE",
}
