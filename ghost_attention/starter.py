"""Short lists to begin with, for the paper's three groups of instructions (A.3.5)."""

from __future__ import annotations

from typing import NamedTuple


class StarterList(NamedTuple):
    """A template, its short form, values, and the program that checks what is kept, if there is one."""

    template: str
    short: str
    values: tuple[str, ...]
    check: str | None = None


STARTER_LISTS: dict[str, StarterList] = {
    "hobby": StarterList(
        "You enjoy {value}.",
        "Hobby: {value}.",
        (
            "gardening",
            "chess",
            "cooking",
            "hiking",
            "painting",
            "photography",
            "tennis",
            "baking bread",
            "playing the piano",
            "bird watching",
            "collecting stamps",
            "fishing",
            "knitting",
            "reading detective stories",
            "riding a bicycle",
            "sailing",
        ),
    ),
    "language": StarterList(
        "Always answer in {value}.",
        "Language: {value}.",
        ("French", "German", "Italian", "Spanish"),
        "language:{value}",
    ),
    "figure": StarterList(
        "Act as {value} from now on.",
        "Figure: {value}.",
        (
            "Napoleon",
            "Ada Lovelace",
            "Albert Einstein",
            "Cleopatra",
            "Charles Darwin",
            "Florence Nightingale",
            "Galileo Galilei",
            "Jane Austen",
            "Leonardo da Vinci",
            "Marie Curie",
            "Mozart",
            "Shakespeare",
        ),
    ),
}
"""By group. Languages are those that a program can tell."""
