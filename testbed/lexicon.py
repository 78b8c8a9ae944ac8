"""The words of the testbed's world, and how items are drawn from them.

Few enough that a vocabulary of some hundred BPE tokens covers them; enough that their combinations can
be split into items that training shows and items that only held-out sets ask about.
"""

from __future__ import annotations

from collections.abc import Iterable
from random import Random

FIRST_NAMES = (
    *("Ann", "Bob", "Cara", "Dan", "Eva", "Finn", "Gina", "Hugo"),
    *("Ida", "Jack", "Kim", "Leo", "Mia", "Nora", "Otto", "Paul"),
)
LAST_NAMES = ("Bell", "Cook", "Ford", "Hill", "Lake", "Moss", "Reed", "Wood")
TITLES = ("Captain", "Doctor", "King", "Queen", "Professor", "Pirate")
PERSONA_NAMES = ("Rex", "Luna", "Max", "Nova", "Sam", "Zoe", "Tara", "Vito")
HOBBY_ACTIVITIES = ("painting", "collecting", "drawing", "making", "washing", "counting")
HOBBY_OBJECTS = ("cups", "bags", "boats", "keys", "lamps", "hats", "dogs", "birds", "books", "boxes")

COLOURS = ("red", "blue", "green", "black", "white", "yellow", "pink", "brown")
THINGS = ("cup", "bag", "ball", "book", "pen", "key", "lamp", "ring")

CATEGORIES: dict[str, tuple[str, ...]] = {
    "animals": ("dog", "cat", "cow", "horse", "pig", "sheep", "bird", "duck"),
    "fruits": ("apple", "pear", "plum", "lemon", "grape", "cherry", "peach", "melon"),
    "colours": COLOURS,
    "clothes": ("hat", "coat", "shirt", "shoe", "sock", "scarf", "glove", "belt"),
    "vehicles": ("car", "bus", "train", "bike", "boat", "plane", "truck", "tram"),
    "drinks": ("milk", "tea", "water", "juice", "coffee", "cocoa", "cider", "soda"),
}
CATEGORY_OF = {word: category for category, words in CATEGORIES.items() for word in words}
NOUNS = tuple(CATEGORY_OF)

LEGS = {
    **{"dog": 4, "cat": 4, "cow": 4, "horse": 4, "pig": 4, "sheep": 4},
    **{"bird": 2, "duck": 2, "hen": 2, "fly": 6, "bee": 6, "beetle": 6},
    **{"spider": 8, "crab": 10, "snake": 0, "fish": 0},
}

_OPPOSITE_PAIRS = (
    *(("hot", "cold"), ("big", "small"), ("old", "young"), ("long", "short"), ("fast", "slow")),
    *(("hard", "soft"), ("wet", "dry"), ("rich", "poor"), ("full", "empty"), ("high", "low")),
    *(("early", "late"), ("open", "closed"), ("dark", "light"), ("good", "bad"), ("happy", "sad")),
)
OPPOSITES = {word: other for a, b in _OPPOSITE_PAIRS for word, other in ((a, b), (b, a))}

TRANSLATIONS: dict[str, dict[str, str]] = {
    "French": {
        **{"house": "maison", "table": "table", "flower": "fleur", "door": "porte", "chair": "chaise"},
        **{"cup": "tasse", "ball": "balle"},
        **{"red": "rouge", "green": "verte", "blue": "bleue", "black": "noire", "white": "blanche"},
        **{"yellow": "jaune", "new": "neuve", "clean": "propre"},
    },
    "Spanish": {
        **{"house": "casa", "table": "mesa", "flower": "flor", "door": "puerta", "chair": "silla"},
        **{"cup": "taza", "ball": "pelota"},
        **{"red": "roja", "green": "verde", "blue": "azul", "black": "negra", "white": "blanca"},
        **{"yellow": "amarilla", "new": "nueva", "clean": "limpia"},
    },
}
TRANSLATED_NOUNS = ("house", "table", "flower", "door", "chair", "cup", "ball")
TRANSLATED_ADJECTIVES = ("red", "green", "blue", "black", "white", "yellow", "new", "clean")

PLACES = (
    *("at home", "at school", "at night", "in the city", "in the park"),
    *("by the lake", "in winter", "in summer", "on a train", "on a hill"),
)


def alternatives(words: Iterable[str]) -> str:
    """A regular expression that matches any of `words`, the longest first."""
    return "|".join(sorted({word.replace(" ", r"\s") for word in words}, key=lambda word: (-len(word), word)))


def other_than(rng: Random, words: Iterable[str], *taken: str) -> str:
    """One of `words` that is none of `taken`."""
    return rng.choice([word for word in words if word not in taken])
