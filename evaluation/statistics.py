"""Means and shares with their 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

from llama2_chat.reward.metrics import Z_95, wilson_interval

Interval = dict[str, float | int]


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; NaN-free: an empty sequence is an error."""
    if not values:
        raise ValueError("mean of nothing")
    return math.fsum(values) / len(values)


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean, count and normal 95 % interval (unbiased variance) of independent values."""
    centre = mean(values)
    if len(values) > 1:
        variance = math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1)
        half = Z_95 * math.sqrt(variance / len(values))
    else:
        half = math.inf
    return {"mean": centre, "count": len(values), "low": centre - half, "high": centre + half}


def share_interval(flags: Sequence[bool]) -> Interval:
    """Share of True, count and Wilson 95 % interval."""
    low, high = wilson_interval(sum(flags), len(flags))
    return {"mean": mean([float(flag) for flag in flags]), "count": len(flags), "low": low, "high": high}
