"""What the scores say as probabilities (calibration) and how they are spread (histograms).

Plain Python on lists of raw scores. σ(r_c - r_r) should be the probability that people prefer the first of two
responses; σ(score) of a safety reward model, trained with the auxiliary loss, that a response is safe.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from llama2_chat.reward.metrics import sigmoid, wilson_interval

CALIBRATION_BINS = 10
HISTOGRAM_BINS = 40


def calibration_curve(
    probabilities: Sequence[float], outcomes: Sequence[bool], *, bins: int = CALIBRATION_BINS
) -> list[dict[str, Any]]:
    """Predicted and observed share in bins of equal width over [0, 1].

    Returns:
        For each bin `from`, `to`, `count`, `mean_predicted`, `observed` and its 95 % interval `low`, `high`;
        the last four are None where the bin is empty.
    """
    members: list[list[tuple[float, bool]]] = [[] for _ in range(bins)]
    for probability, outcome in zip(probabilities, outcomes, strict=True):
        members[min(int(probability * bins), bins - 1)].append((probability, outcome))
    curve = []
    for place, rows in enumerate(members):
        count, observed = len(rows), sum(outcome for _, outcome in rows)
        low, high = wilson_interval(observed, count)
        curve.append(
            {
                "from": place / bins,
                "to": (place + 1) / bins,
                "count": count,
                "mean_predicted": math.fsum(p for p, _ in rows) / count if count else None,
                "observed": observed / count if count else None,
                "low": low if count else None,
                "high": high if count else None,
            }
        )
    return curve


def expected_calibration_error(curve: Sequence[Mapping[str, Any]]) -> float:
    """Mean of |predicted - observed| over the bins, weighted by their counts."""
    total = sum(row["count"] for row in curve)
    gaps = (row["count"] * abs(row["mean_predicted"] - row["observed"]) for row in curve if row["count"])
    return math.fsum(gaps) / total if total else 0.0


def preference_calibration(
    chosen: Sequence[float], rejected: Sequence[float], *, seed: int = 0
) -> dict[str, Any]:
    """Calibration of σ(r_c - r_r) as the probability that the first of two responses is preferred.

    Each pair is oriented at random (from the seed), since with the preferred one always first every
    outcome would be 1. Returns `error` (ECE), `bins` (the curve) and `seed`.
    """
    rng = random.Random(seed)
    probabilities, preferred_first = [], []
    for c, r in zip(chosen, rejected, strict=True):
        preferred_first.append(rng.random() < 0.5)
        probabilities.append(sigmoid(c - r if preferred_first[-1] else r - c))
    curve = calibration_curve(probabilities, preferred_first)
    return {"error": expected_calibration_error(curve), "seed": seed, "bins": curve}


def safety_calibration(scores: Sequence[float], safe: Sequence[bool]) -> dict[str, Any] | None:
    """Calibration of σ(score) as the probability that a response is safe; None where none is labelled."""
    if not scores:
        return None
    curve = calibration_curve([sigmoid(score) for score in scores], safe)
    return {"error": expected_calibration_error(curve), "bins": curve}


def score_histograms(
    scores: Mapping[str, Mapping[str, Sequence[float]]], *, bins: int = HISTOGRAM_BINS
) -> dict[str, Any]:
    """How often each score occurs, on one axis for all models so that a shift shows (Figure 27).

    Args:
        scores: For each model the raw scores of each group, for example `{"model": {"chosen": […], …}}`.

    Returns:
        `edges` (bins + 1 raw scores, from the lowest score of all to the highest) and `counts`: for each
        model and group as many counts as there are bins.
    """
    everything = [score for groups in scores.values() for values in groups.values() for score in values]
    low, high = (min(everything), max(everything)) if everything else (0.0, 0.0)
    if low == high:
        low, high = low - 0.5, high + 0.5
    width = (high - low) / bins

    def counted(values: Sequence[float]) -> list[int]:
        counts = [0] * bins
        for value in values:
            counts[min(int((value - low) / width), bins - 1)] += 1
        return counts

    return {
        "edges": [low + place * width for place in range(bins)] + [high],
        "counts": {
            model: {group: counted(values) for group, values in groups.items()}
            for model, groups in scores.items()
        },
    }


def score_spread(chosen: Sequence[float], rejected: Sequence[float]) -> dict[str, float | None]:
    """Mean raw score of the chosen and the rejected, mean gap r_c - r_r and the gap's standard deviation.

    A margin in the loss pushes the two apart (Figure 27). The deviation is None for a single pair.
    """
    gaps = [c - r for c, r in zip(chosen, rejected, strict=True)]
    count = len(gaps)
    mean_gap = math.fsum(gaps) / count
    variance = math.fsum((gap - mean_gap) ** 2 for gap in gaps) / (count - 1) if count > 1 else None
    return {
        "mean_chosen": math.fsum(chosen) / count,
        "mean_rejected": math.fsum(rejected) / count,
        "mean_gap": mean_gap,
        "gap_deviation": None if variance is None else math.sqrt(variance),
    }
