"""Choosing one of the K samples of each prompt."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any


def select(candidates: Sequence[Mapping[str, Any]], *, rule: str, rng: random.Random) -> int | None:
    """Index of the kept sample; None where no answer is complete.

    Args:
        candidates: Rows of `samples.jsonl` for one prompt; only those with status "complete" may be kept.
        rule: "best" keeps the highest combined score (the first of equals), "random" any complete answer.
        rng: Used by "random" alone.

    Source: §3.2.3, rejection-sampling fine-tuning.
    """
    eligible = [i for i, candidate in enumerate(candidates) if candidate["status"] == "complete"]
    if not eligible:
        return None
    if rule == "random":
        return rng.choice(eligible)
    return max(eligible, key=lambda i: (candidates[i]["scores"]["combined"], -i))
