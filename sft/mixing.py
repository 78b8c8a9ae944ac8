"""Several files of dialogues as one training set, each with a weight."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from llama2_chat.dialogue import Dialogue
from llama2_chat.errors import UserInputError
from llama2_chat.jsonl import read_dialogues


@dataclass(frozen=True, slots=True)
class MixedFile:
    """What one file gave: its dialogues, how often each is meant to occur, and how many rows that made."""

    file: str
    dialogues: int
    weight: float
    used: int
    share: float

    def to_row(self) -> dict[str, Any]:
        """As metrics; the file by its name alone, since its folder differs between machines."""
        return {**asdict(self), "file": Path(self.file).name}


def mix(
    files: Sequence[str], weights: Sequence[float] | None, seed: int
) -> tuple[list[Dialogue], list[MixedFile]]:
    """The files' dialogues, file after file, each as often as its weight says, and the mix that resulted.

    A dialogue occurs as many times as the whole part of the weight says; the rest of the weight is the share of the
    file, drawn without replacement, that occurs once more. Order within a file is kept.

    Args:
        weights: One for each file; None takes every dialogue once.

    Raises:
        UserInputError: the weights leave no dialogue.
    """
    drawn: list[list[Dialogue]] = []
    found: list[int] = []
    weights = [1.0] * len(files) if weights is None else weights
    for number, (file, weight) in enumerate(zip(files, weights, strict=True)):
        dialogues = list(read_dialogues(Path(file)))
        places = repeated(len(dialogues), weight, random.Random(f"{seed} {number}"))
        drawn.append([dialogues[place] for place in places])
        found.append(len(dialogues))
    chosen = list(chain.from_iterable(drawn))
    if not chosen:
        raise UserInputError(f"weights: {list(weights)} leave none of the {sum(found)} dialogues")
    parts = [
        MixedFile(file, count, weight, len(used), len(used) / len(chosen))
        for file, count, weight, used in zip(files, found, weights, drawn, strict=True)
    ]
    return chosen, parts


def repeated(count: int, weight: float, rng: random.Random) -> list[int]:
    """Indices below `count`, each floor(weight) or one more times, round(count · weight) in all, in order."""
    whole = int(weight)
    extra = set(rng.sample(range(count), round(count * weight) - count * whole))
    return [index for index in range(count) for _ in range(whole + (index in extra))]
