"""Which of a prompt's samples are trained on."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, Literal


def select(
    candidates: Sequence[Mapping[str, Any]],
    *,
    rule: Literal["best", "random"],
    rng: random.Random,
    keep: int = 1,
) -> list[int]:
    """Indices of the kept samples, the best (or first drawn) first; none where no answer is complete.

    Args:
        candidates: Rows of `samples.jsonl` for one prompt; only those with status "complete" may be kept.
        rule: "best" keeps the highest combined scores (the first of equals), "random" any complete answers.
        rng: Used by "random" alone.
        keep: Most answers to keep; they differ from one another.

    Source: §3.2.3, rejection-sampling fine-tuning.
    """
    places = eligible(candidates)
    if rule == "random":
        order = rng.sample(places, len(places))
    else:
        order = sorted(places, key=lambda place: (-candidates[place]["scores"]["combined"], place))
    first: dict[str, int] = {}
    for place in order:
        first.setdefault(candidates[place]["response"], place)
        if len(first) == keep:
            break
    return list(first.values())


def eligible(candidates: Sequence[Mapping[str, Any]]) -> list[int]:
    """Indices of the answers that ended by themselves, are not empty, hold no chat tag and could be scored."""
    return [place for place, candidate in enumerate(candidates) if candidate["status"] == "complete"]


def all_unsafe(candidates: Sequence[Mapping[str, Any]]) -> bool:
    """Whether there are complete answers and the safety model takes every one for unsafe, σ(score) < 0.5.

    Without a safety model none is unsafe.
    """
    scores = [candidates[place]["scores"]["safety"] for place in eligible(candidates)]
    return bool(scores) and all(score is not None and score < 0 for score in scores)
