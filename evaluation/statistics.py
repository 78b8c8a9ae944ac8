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


def share_interval_by_prompt(flags: Sequence[Sequence[bool]]) -> Interval:
    """Share of True over answers of which several, K, belong to each prompt; count is the prompts'.

    Answers to one prompt are alike, so as many answers as N K would make the interval too narrow. It is Wilson's at the
    effective number of answers p (1 - p) / v, with v the variance of the mean of the N prompts' shares, within N and
    N K; N where all answers agree, which says nothing of v. For K = 1 it is `share_interval`.

    Args:
        flags: One row for each prompt, of its answers; none is empty.

    Source: effective sample size as in Korn and Graubard 1998, "Confidence intervals for proportions with small
    expected number of positive counts estimated from survey data".
    """
    if all(len(row) == 1 for row in flags):
        return share_interval([row[0] for row in flags])
    shares = [mean([float(flag) for flag in row]) for row in flags]
    share, prompts, answers = mean(shares), len(flags), sum(map(len, flags))
    effective = float(prompts)
    if prompts > 1 and 0 < share < 1:
        spread = math.fsum((one - share) ** 2 for one in shares) / (prompts - 1) / prompts
        effective = min(max(share * (1 - share) / spread, prompts), answers) if spread else float(answers)
    low, high = wilson_interval(share * effective, effective)
    return {"mean": share, "count": prompts, "low": low, "high": high}
