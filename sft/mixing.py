"""Several files of dialogues as one training set, each with a weight or a number of dialogues."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama2_chat.dialogue import Dialogue
from llama2_chat.errors import UserInputError
from llama2_chat.jsonl import read_dialogues
from llama2_chat.sft.config import MOST_REPEATS


@dataclass(frozen=True, slots=True)
class MixedFile:
    """What one file gave: how many dialogues it holds, the weight or number asked for, and those that are used."""

    file: str
    dialogues: int
    weight: float | None
    """How often each dialogue is meant to occur; None where a number was asked for."""
    count: int | None
    """The number asked for; None where a weight decides."""
    used: list[Dialogue]
    """In the file's order; one that occurs twice stands there twice."""

    def to_row(self, all_used: int) -> dict[str, Any]:
        """As metrics, with the share among `all_used` dialogues; the file by its name alone."""
        return {
            "file": Path(self.file).name,
            "dialogues": self.dialogues,
            "weight": self.weight,
            "count": self.count,
            "used": len(self.used),
            "share": len(self.used) / all_used,
        }


def mix(
    files: Sequence[str],
    *,
    weights: Sequence[float] | None,
    counts: Sequence[int | None] | None,
    seed: int,
) -> list[MixedFile]:
    """Each file's dialogues, as often as its weight or number says.

    A number is drawn without replacement. Where it is more than the file holds, every dialogue occurs as many
    times as whole passes fit into it, and a random rest of them once more. A weight stands for the number of the
    file's dialogues times the weight, rounded.

    Args:
        weights: One for each file; None takes every dialogue once.
        counts: One for each file, in place of weights; None for a file takes every dialogue once.

    Raises:
        UserInputError: no dialogue is left, or a number is more than `MOST_REPEATS` passes over its file.
    """
    parts = []
    for number, file in enumerate(files):
        found = list(read_dialogues(Path(file)))
        count = None if counts is None else counts[number]
        weight = None
        if count is None:
            weight = 1.0 if weights is None else weights[number]
            wanted = round(len(found) * weight)
            if weight > 0 and found and wanted == 0:
                raise UserInputError(
                    f"weights: {weight} of the {len(found)} dialogues in {file} is none of them; give a larger "
                    "weight, or 0 to leave the file out"
                )
        else:
            wanted = count
        if wanted > MOST_REPEATS * len(found):
            raise UserInputError(
                f"counts: {wanted} of the {len(found)} dialogues in {file}; at most {MOST_REPEATS} times as many as "
                "there are can be taken"
            )
        places = drawn(len(found), wanted, random.Random(f"{seed} {number}"))
        parts.append(MixedFile(file, len(found), weight, count, [found[place] for place in places]))
    if not any(part.used for part in parts):
        asked = f"weights: {weights}" if counts is None else f"counts: {counts}"
        raise UserInputError(f"{asked} leave none of the {sum(part.dialogues for part in parts)} dialogues")
    return parts


def drawn(found: int, wanted: int, rng: random.Random) -> list[int]:
    """`wanted` indices below `found`, in order, each floor(wanted / found) or one more times."""
    whole, rest = divmod(wanted, found)
    extra = set(rng.sample(range(found), rest))
    return [index for index in range(found) for _ in range(whole + (index in extra))]
