"""Task families about numbers: their arithmetic, their order, and how many there are of something."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from llama2_chat.testbed.family import Arguments, Family
from llama2_chat.testbed.lexicon import FIRST_NAMES, LEGS, NOUNS, THINGS, alternatives

NUMBER = r"\d{1,3}"
NOUN = alternatives(NOUNS)
WORD_LIST = rf"(?:{NOUN})(?:,\s(?:{NOUN}))+"


def near_miss(solve: Callable[[Arguments], str]) -> Callable[[Arguments, Random], str]:
    """Wrong numbers of the kind that slips make: off by one, two or ten."""

    def mistake(arguments: Arguments, rng: Random) -> str:
        value = int(solve(arguments))
        return rng.choice([str(value + step) for step in (-10, -2, -1, 1, 2, 10) if value + step >= 0])

    return mistake


def draw_words(rng: Random, fewest: int, most: int) -> str:
    """A list of different nouns, "dog, milk, bus"."""
    return ", ".join(rng.sample(NOUNS, rng.randint(fewest, most)))


def _sum(arguments: Arguments) -> str:
    return str(int(arguments["a"]) + int(arguments["b"]))


def _difference(arguments: Arguments) -> str:
    return str(int(arguments["a"]) - int(arguments["b"]))


def _neighbour(arguments: Arguments) -> str:
    return str(int(arguments["a"]) + {"after": 1, "before": -1}[arguments["side"].lower()])


def _extreme(arguments: Arguments) -> str:
    choose = {"larger": max, "smaller": min}[arguments["which"].lower()]
    return str(choose(int(arguments["a"]), int(arguments["b"])))


def _legs_together(arguments: Arguments) -> str:
    return str(LEGS[arguments["a"].lower()] + LEGS[arguments["b"].lower()])


def _length(arguments: Arguments) -> str:
    return str(len(arguments["words"].split(",")))


def _richer(arguments: Arguments) -> str:
    first, second = int(arguments["m"]), int(arguments["n"])
    if first == second:
        raise ValueError("nobody has more")
    return arguments["a"] if first > second else arguments["b"]


def _two_numbers(rng: Random) -> tuple[str, str]:
    a, b = rng.sample(range(10, 100), 2)
    return str(a), str(b)


def _draw_comparison(rng: Random) -> dict[str, str]:
    a, b = _two_numbers(rng)
    return {"which": rng.choice(("larger", "smaller")), "a": a, "b": b}


def _draw_owners(rng: Random) -> dict[str, str]:
    a, b = rng.sample(FIRST_NAMES, 2)
    m, n = rng.sample(range(2, 30), 2)
    return {"a": a, "m": str(m), "b": b, "n": str(n), "things": rng.choice(THINGS) + "s"}


def _draw_animals(rng: Random) -> dict[str, str]:
    a, b = rng.sample(list(LEGS), 2)
    return {"a": a, "b": b}


_ANIMAL = alternatives(LEGS)
_NAME = alternatives(FIRST_NAMES)

NUMBER_FAMILIES = (
    Family(
        name="add",
        questions=(
            "What is {a} plus {b}?",
            "Add {a} and {b}.",
            "What is the sum of {a} and {b}?",
            "Tell me {a} plus {b}.",
            "Name the sum of {a} and {b}.",
        ),
        held_out_questions=(
            "Find the sum of {a} and {b}.",
            "Give me {a} plus {b}.",
        ),
        statements=("{a} plus {b} is {value}.", "The sum of {a} and {b} is {value}."),
        slots={"a": NUMBER, "b": NUMBER},
        value=NUMBER,
        sample=lambda rng: {"a": str(rng.randint(10, 69)), "b": str(rng.randint(2, 9))},
        solve=_sum,
        mistake=near_miss(_sum),
        symmetric=True,
    ),
    Family(
        name="subtract",
        questions=(
            "What is {a} minus {b}?",
            "Take {b} away from {a}.",
            "Find {a} minus {b}.",
            "Give me {a} minus {b}.",
        ),
        held_out_questions=(
            "Tell me {a} minus {b}.",
            "Name {a} minus {b}.",
        ),
        statements=("{a} minus {b} is {value}.", "{b} from {a} leaves {value}."),
        slots={"a": NUMBER, "b": NUMBER},
        value=NUMBER,
        sample=lambda rng: {"a": str(rng.randint(12, 79)), "b": str(rng.randint(2, 9))},
        solve=_difference,
        mistake=near_miss(_difference),
    ),
    Family(
        name="neighbour",
        questions=(
            "Which number comes {side} {a}?",
            "What comes right {side} {a}?",
            "Name the number {side} {a}.",
            "Give me the number {side} {a}.",
        ),
        held_out_questions=(
            "Tell me the number {side} {a}.",
            "Find the number {side} {a}.",
        ),
        statements=("{value} comes {side} {a}.", "The number {side} {a} is {value}."),
        slots={"side": "after|before", "a": NUMBER},
        value=NUMBER,
        sample=lambda rng: {"side": rng.choice(("after", "before")), "a": str(rng.randint(11, 149))},
        solve=_neighbour,
        mistake=near_miss(_neighbour),
    ),
    Family(
        name="compare",
        questions=(
            "Which is {which}, {a} or {b}?",
            "Which number is {which}: {a} or {b}?",
            "Find the {which} number: {a} or {b}.",
            "Tell me which is {which}, {a} or {b}.",
        ),
        held_out_questions=(
            "Name the {which} number: {a} or {b}.",
            "Give me the {which} number: {a} or {b}.",
        ),
        statements=("{value} is {which}.", "The {which} number is {value}."),
        slots={"which": "larger|smaller", "a": NUMBER, "b": NUMBER},
        value=NUMBER,
        sample=_draw_comparison,
        solve=_extreme,
        mistake=lambda arguments, rng: arguments["a" if _extreme(arguments) == arguments["b"] else "b"],
        symmetric=True,
    ),
    Family(
        name="legs",
        questions=(
            "How many legs do a {a} and a {b} have?",
            "Count the legs of a {a} and a {b}.",
            "Tell me how many legs a {a} and a {b} have.",
        ),
        held_out_questions=(
            "Do you know how many legs a {a} and a {b} have?",
            "Find how many legs a {a} and a {b} have.",
        ),
        statements=("A {a} and a {b} have {value} legs.", "Together they have {value} legs."),
        slots={"a": _ANIMAL, "b": _ANIMAL},
        value=NUMBER,
        sample=_draw_animals,
        solve=_legs_together,
        mistake=near_miss(_legs_together),
        symmetric=True,
    ),
    Family(
        name="count",
        questions=(
            "How many words are here: {words}?",
            "Count these words: {words}.",
            "Do you know how many words are here: {words}?",
            "Find how many words are here: {words}.",
        ),
        held_out_questions=(
            "Tell me how many words are here: {words}.",
            "Count the words: {words}.",
        ),
        statements=("There are {value} words.", "I count {value} words."),
        slots={"words": WORD_LIST},
        value=NUMBER,
        sample=lambda rng: {"words": draw_words(rng, 2, 6)},
        solve=_length,
        mistake=near_miss(_length),
    ),
    Family(
        name="more",
        questions=(
            "{a} has {m} {things}. {b} has {n} {things}. Who has more?",
            "{a} has {m} {things} and {b} has {n}. Who has more {things}?",
            "{a} has {m} {things}. {b} has {n} {things}. Name who has more.",
            "{a} has {m} {things} and {b} has {n}. Tell me who has more {things}.",
        ),
        held_out_questions=(
            "{a} has {m} {things}. {b} has {n} {things}. Tell me who has more.",
            "{a} has {m} {things} and {b} has {n}. Name who has more {things}.",
        ),
        statements=("{value} has more {things}.", "{value} has the most {things}."),
        slots={
            "a": _NAME,
            "m": NUMBER,
            "b": _NAME,
            "n": NUMBER,
            "things": alternatives(t + "s" for t in THINGS),
        },
        value=_NAME,
        sample=_draw_owners,
        solve=_richer,
        mistake=lambda arguments, rng: arguments["a" if _richer(arguments) == arguments["b"] else "b"],
    ),
)
