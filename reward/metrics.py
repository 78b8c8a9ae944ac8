"""What is reported of a reward model: accuracy with its uncertainty, recall of unsafe responses, calibration.

Plain Python on lists of raw scores; ties count one half, so a constant scorer has accuracy 0.5.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

from llama2_chat.dialogue import RATINGS, Preference

Z_95 = 1.959963984540054
GATE_THRESHOLD = 0.15
CALIBRATION_BINS = 10


def wilson_interval(successes: float, count: int) -> tuple[float, float]:
    """95 % score interval of a proportion.

    Source: Wilson 1927; https://en.wikipedia.org/wiki/Binomial_proportion_confidence_interval
    """
    if count == 0:
        return 0.0, 1.0
    share, z2 = successes / count, Z_95**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z_95 * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    return low, 1.0 if successes == count else min(1.0, centre + half)


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)) without overflow."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def accuracy_row(points: Sequence[float]) -> dict[str, float | int | None]:
    """Accuracy, count and 95 % interval; accuracy None where there is no pair."""
    low, high = wilson_interval(sum(points), len(points))
    accuracy = sum(points) / len(points) if points else None
    return {"accuracy": accuracy, "count": len(points), "low": low, "high": high}


def safety_class(pair: Preference) -> str | None:
    """Columns of Table 29: which of the two responses are safe; None where a label is missing."""
    classes: dict[tuple[bool | None, bool | None], str] = {
        (True, False): "safe_unsafe",
        (True, True): "both_safe",
        (False, False): "both_unsafe",
    }
    return classes.get((pair.chosen_safe, pair.rejected_safe))


def accuracy_table(
    pairs: Sequence[Preference], chosen: Sequence[float], rejected: Sequence[float]
) -> dict[str, Any]:
    """Accuracy overall, by rating (Table 8) and by safety labels (Table 29)."""
    points = [1.0 if c > r else 0.5 if c == r else 0.0 for c, r in zip(chosen, rejected, strict=True)]

    def where(keep: Callable[[Preference], bool]) -> dict[str, float | int | None]:
        return accuracy_row([point for pair, point in zip(pairs, points, strict=True) if keep(pair)])

    classes = sorted({name for pair in pairs if (name := safety_class(pair)) is not None})
    return {
        "overall": accuracy_row(points),
        "by_rating": {rating: where(lambda pair, r=rating: pair.rating == r) for rating in RATINGS},  # type: ignore[misc]
        "by_safety": {name: where(lambda pair, n=name: safety_class(pair) == n) for name in classes},  # type: ignore[misc]
    }


def unsafe_detection(scores: Sequence[float], safe: Sequence[bool], threshold: float) -> dict[str, Any]:
    """Precision and recall of "σ(score) < threshold" as a detector of unsafe responses; None where undefined."""
    flagged = [sigmoid(score) < threshold for score in scores]
    hits = sum(flag and not ok for flag, ok in zip(flagged, safe, strict=True))
    unsafe = sum(not ok for ok in safe)
    return {
        "precision": hits / sum(flagged) if any(flagged) else None,
        "recall": hits / unsafe if unsafe else None,
        "flagged": sum(flagged),
        "unsafe": unsafe,
    }


def calibration_error(chosen: Sequence[float], rejected: Sequence[float], *, seed: int = 0) -> float:
    """Expected calibration error of σ(r_c - r_r) as the probability that the first of two is preferred.

    Each pair is oriented at random (from the seed), since with the preferred one always first every
    outcome would be 1. Ten bins of equal width, weighted by their counts.
    """
    rng = random.Random(seed)
    bins: list[list[tuple[float, int]]] = [[] for _ in range(CALIBRATION_BINS)]
    for c, r in zip(chosen, rejected, strict=True):
        preferred_first = rng.random() < 0.5
        probability = sigmoid(c - r) if preferred_first else sigmoid(r - c)
        bins[min(int(probability * CALIBRATION_BINS), CALIBRATION_BINS - 1)].append(
            (probability, int(preferred_first))
        )
    total = sum(len(members) for members in bins)
    gaps = (
        abs(sum(p for p, _ in members) - sum(outcome for _, outcome in members))
        for members in bins
        if members
    )
    return sum(gaps) / total if total else 0.0


def reward_metrics(
    pairs: Sequence[Preference], chosen: Sequence[float], rejected: Sequence[float]
) -> dict[str, Any]:
    """All of a reward stage's held-out metrics in `summary.json`'s form."""
    labelled = [
        (score, safe)
        for pair, c, r in zip(pairs, chosen, rejected, strict=True)
        for score, safe in ((c, pair.chosen_safe), (r, pair.rejected_safe))
        if safe is not None
    ]
    scores, safe = [score for score, _ in labelled], [ok for _, ok in labelled]
    lengths = [(float(len(p.chosen)), float(len(p.rejected))) for p in pairs]
    return {
        "accuracy": accuracy_table(pairs, chosen, rejected),
        "unsafe_recall": unsafe_detection(scores, safe, 0.5)["recall"],
        "gate": unsafe_detection(scores, safe, GATE_THRESHOLD),
        "calibration_error": calibration_error(chosen, rejected),
        "controls": {
            "constant_scorer": accuracy_table(pairs, [0.0] * len(pairs), [0.0] * len(pairs))["overall"],
            "length_scorer": accuracy_table(pairs, [c for c, _ in lengths], [r for _, r in lengths])[
                "overall"
            ],
        },
    }
