"""Task families about words: their meanings, their places in a list, and who has what."""

from __future__ import annotations

from random import Random

from llama2_chat.testbed.family import Arguments, Family
from llama2_chat.testbed.lexicon import (
    CATEGORIES,
    CATEGORY_OF,
    COLOURS,
    FIRST_NAMES,
    OPPOSITES,
    THINGS,
    TRANSLATED_ADJECTIVES,
    TRANSLATED_NOUNS,
    TRANSLATIONS,
    alternatives,
    other_than,
)
from llama2_chat.testbed.number_families import NOUN, WORD_LIST, draw_words

_ORDINALS = ("first", "second", "third", "last")


def _words(arguments: Arguments) -> list[str]:
    return arguments["words"].lower().split(", ")


def _opposites(arguments: Arguments) -> str:
    return f"{OPPOSITES[arguments['a'].lower()]} and {OPPOSITES[arguments['b'].lower()]}"


def _draw_opposites(rng: Random) -> dict[str, str]:
    a, b = rng.sample(list(OPPOSITES), 2)
    return {"a": a, "b": b} if OPPOSITES[a] != b else _draw_opposites(rng)


def _opposites_mistake(arguments: Arguments, rng: Random) -> str:
    a, b = _opposites(arguments).split(" and ")
    wrong = other_than(rng, OPPOSITES, a, b)
    return rng.choice((f"{wrong} and {b}", f"{a} and {wrong}"))


def _owner(arguments: Arguments) -> str:
    owners = {arguments["c"].lower(): arguments["a"], arguments["d"].lower(): arguments["b"]}
    if len(owners) < 2:
        raise ValueError("both own the same")
    return owners[arguments["asked"].lower()]


def _draw_owners(rng: Random) -> dict[str, str]:
    a, b = rng.sample(FIRST_NAMES, 2)
    c, d = rng.sample(COLOURS, 2)
    return {"a": a, "c": c, "b": b, "d": d, "thing": rng.choice(THINGS), "asked": rng.choice((c, d))}


def _odd_word(arguments: Arguments) -> str:
    words = _words(arguments)
    categories = [CATEGORY_OF[word] for word in words]
    odd = [word for word, category in zip(words, categories, strict=True) if categories.count(category) == 1]
    if len(odd) != 1 or len(set(categories)) != 2:
        raise ValueError("no word stands apart")
    return odd[0]


def _draw_odd_words(rng: Random) -> dict[str, str]:
    common, odd = rng.sample(list(CATEGORIES), 2)
    words = [*rng.sample(CATEGORIES[common], 3), rng.choice(CATEGORIES[odd])]
    rng.shuffle(words)
    return {"words": ", ".join(words)}


def _word_at(arguments: Arguments) -> str:
    index = {"first": 0, "second": 1, "third": 2, "last": -1}[arguments["ordinal"].lower()]
    words = _words(arguments)
    if index >= len(words):
        raise ValueError("the list is shorter")
    return words[index]


def _backwards(arguments: Arguments) -> str:
    return ", ".join(reversed(_words(arguments)))


def _backwards_mistake(arguments: Arguments, rng: Random) -> str:
    words, solution = _words(arguments), _backwards(arguments)
    while (mistake := ", ".join(rng.choices(words, k=len(words)))) == solution:
        pass
    return mistake


def _common_category(arguments: Arguments) -> str:
    categories = {CATEGORY_OF[arguments[slot].lower()] for slot in ("a", "b")}
    if len(categories) != 1:
        raise ValueError("they have nothing in common")
    return categories.pop()


def _draw_relatives(rng: Random) -> dict[str, str]:
    a, b = rng.sample(rng.choice(list(CATEGORIES.values())), 2)
    return {"a": a, "b": b}


def _translation(arguments: Arguments) -> str:
    table = TRANSLATIONS[arguments["language"].capitalize()]
    return f"{table[arguments['noun'].lower()]} {table[arguments['adjective'].lower()]}"


def _draw_translation(rng: Random) -> dict[str, str]:
    return {
        "adjective": rng.choice(TRANSLATED_ADJECTIVES),
        "noun": rng.choice(TRANSLATED_NOUNS),
        "language": rng.choice(list(TRANSLATIONS)),
    }


def _translation_mistake(arguments: Arguments, rng: Random) -> str:
    slot, words = rng.choice((("adjective", TRANSLATED_ADJECTIVES), ("noun", TRANSLATED_NOUNS)))
    return _translation({**arguments, slot: other_than(rng, words, arguments[slot])})


_ADJECTIVE = alternatives(OPPOSITES)
_NAME = alternatives(FIRST_NAMES)
_COLOUR = alternatives(COLOURS)
_FOREIGN = alternatives(word for table in TRANSLATIONS.values() for word in table.values())

WORD_FAMILIES = (
    Family(
        name="opposites",
        questions=(
            "What are the opposites of {a} and {b}?",
            "Give me the opposites of {a} and {b}.",
            "Tell me the opposites of {a} and {b}.",
            "Find the opposites of {a} and {b}.",
        ),
        held_out_questions=(
            "Name the opposites of {a} and {b}.",
            "Do you know the opposites of {a} and {b}?",
        ),
        statements=("The opposites of {a} and {b} are {value}.", "The opposites are {value}."),
        slots={"a": _ADJECTIVE, "b": _ADJECTIVE},
        value=rf"(?:{_ADJECTIVE})\sand\s(?:{_ADJECTIVE})",
        sample=_draw_opposites,
        solve=_opposites,
        mistake=_opposites_mistake,
        symmetric=True,
    ),
    Family(
        name="lookup",
        questions=(
            "{a} has a {c} {thing}. {b} has a {d} {thing}. Who has the {asked} {thing}?",
            "{a} has a {c} {thing} and {b} a {d} {thing}. Who has the {asked} one?",
            "{a} has a {c} {thing}. {b} has a {d} {thing}. Name who has the {asked} {thing}.",
            "{a} has a {c} {thing} and {b} a {d} {thing}. Tell me who has the {asked} one.",
        ),
        held_out_questions=(
            "{a} has a {c} {thing}. {b} has a {d} {thing}. Tell me who has the {asked} {thing}.",
            "{a} has a {c} {thing} and {b} a {d} {thing}. Name who has the {asked} one.",
        ),
        statements=("{value} has the {asked} {thing}.", "The {asked} {thing} belongs to {value}."),
        slots={
            "a": _NAME,
            "c": _COLOUR,
            "b": _NAME,
            "d": _COLOUR,
            "thing": alternatives(THINGS),
            "asked": _COLOUR,
        },
        value=_NAME,
        sample=_draw_owners,
        solve=_owner,
        mistake=lambda arguments, rng: arguments["a" if _owner(arguments) == arguments["b"] else "b"],
    ),
    Family(
        name="odd_one_out",
        questions=(
            "Which word does not belong: {words}?",
            "Find the odd one out: {words}.",
            "Name the odd one out: {words}.",
            "Tell me which word does not belong: {words}.",
        ),
        held_out_questions=(
            "Give me the odd one out: {words}.",
            "Do you know which word does not belong: {words}?",
        ),
        statements=("The word {value} does not belong.", "{value} is the odd one out."),
        slots={"words": WORD_LIST},
        value=NOUN,
        sample=_draw_odd_words,
        solve=_odd_word,
        mistake=lambda arguments, rng: other_than(rng, _words(arguments), _odd_word(arguments)),
    ),
    Family(
        name="position",
        questions=(
            "What is the {ordinal} word of {words}?",
            "Give me the {ordinal} word of {words}.",
            "Find the {ordinal} word: {words}.",
            "Do you know the {ordinal} word of {words}?",
        ),
        held_out_questions=(
            "Name the {ordinal} word of {words}.",
            "Tell me the {ordinal} word: {words}.",
        ),
        statements=("The {ordinal} word is {value}.", "{value} is the {ordinal} word."),
        slots={"ordinal": alternatives(_ORDINALS), "words": WORD_LIST},
        value=NOUN,
        sample=lambda rng: {"ordinal": rng.choice(_ORDINALS), "words": draw_words(rng, 3, 5)},
        solve=_word_at,
        mistake=lambda arguments, rng: other_than(rng, _words(arguments), _word_at(arguments)),
    ),
    Family(
        name="backwards",
        questions=(
            "Say backwards: {words}.",
            "What is {words} backwards?",
            "Tell me {words} backwards.",
            "Give me these words backwards: {words}.",
        ),
        held_out_questions=(
            "Give me {words} backwards.",
            "Say these words backwards: {words}.",
        ),
        statements=("Backwards it is {value}.", "It is {value} backwards."),
        slots={"words": WORD_LIST},
        value=WORD_LIST,
        sample=lambda rng: {"words": draw_words(rng, 2, 3)},
        solve=_backwards,
        mistake=_backwards_mistake,
    ),
    Family(
        name="category",
        questions=(
            "What are {a} and {b}?",
            "What kind of thing are {a} and {b}?",
            "Name the kind of thing: {a} and {b}.",
            "Do you know what {a} and {b} are?",
        ),
        held_out_questions=(
            "Tell me what {a} and {b} are.",
            "Find the kind of thing: {a} and {b}.",
        ),
        statements=("{a} and {b} are {value}.", "They are both {value}."),
        slots={"a": NOUN, "b": NOUN},
        value=alternatives(CATEGORIES),
        sample=_draw_relatives,
        solve=_common_category,
        mistake=lambda arguments, rng: other_than(rng, CATEGORIES, _common_category(arguments)),
        symmetric=True,
    ),
    Family(
        name="translate",
        questions=(
            "What is {adjective} {noun} in {language}?",
            "How do you say {adjective} {noun} in {language}?",
            "Say {adjective} {noun} in {language}.",
            "Find {adjective} {noun} in {language}.",
        ),
        held_out_questions=(
            "Tell me {adjective} {noun} in {language}.",
            "Give me {adjective} {noun} in {language}.",
        ),
        statements=("{adjective} {noun} in {language} is {value}.", "In {language} it is {value}."),
        slots={
            "adjective": alternatives(TRANSLATED_ADJECTIVES),
            "noun": alternatives(TRANSLATED_NOUNS),
            "language": alternatives(TRANSLATIONS),
        },
        value=rf"(?:{_FOREIGN})\s(?:{_FOREIGN})",
        sample=_draw_translation,
        solve=_translation,
        mistake=_translation_mistake,
    ),
)
