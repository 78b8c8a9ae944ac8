"""What the figures of a run are called, how they are written, and which direction is better.

A measure that is not listed is shown under its own name, so that a new stage or field needs no change here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from llama2_chat.report.markup import Html, element, joined


@dataclass(frozen=True)
class Measure:
    """One figure's name; `better` is None where neither direction is.

    `own_scale` marks scores of a run's own reward models, which another run's cannot be compared with.
    """

    label: str
    better: Literal["higher", "lower"] | None = None
    percent: bool = False
    own_scale: bool = False


POLICY_MEASURES: dict[str, Measure] = {
    "reward_helpfulness_mean": Measure("helpfulness reward", "higher", own_scale=True),
    "reward_safety_mean": Measure("safety reward", "higher", own_scale=True),
    "violation_rate": Measure("violations", "lower", percent=True),
    "correctness_greedy": Measure("correct, greedy", "higher", percent=True),
    "oracle_helpfulness": Measure("oracle helpfulness", "higher"),
    "oracle_violation_rate": Measure("oracle violations", "lower", percent=True),
    "kl_to_sft_nats": Measure("KL to SFT, nats"),
    "win_rate_vs_sft": Measure("win rate against SFT", "higher", percent=True),
    "independent_reward_mean": Measure("independent reward", "higher", own_scale=True),
    "unsafe_refusal_rate": Measure("refusals, unsafe", "higher", percent=True),
    "false_refusal_rate.helpful": Measure("false refusals, helpful", "lower", percent=True),
    "false_refusal_rate.borderline": Measure("false refusals, borderline", "lower", percent=True),
    "incomplete_rate": Measure("incomplete answers", "lower", percent=True),
}
"""Fields of a policy's evaluation in the order of the report."""

PERCENT = "\N{NO-BREAK SPACE}%"

HEADLINE = (
    "reward_helpfulness_mean",
    "violation_rate",
    "correctness_greedy",
    "kl_to_sft_nats",
    "win_rate_vs_sft",
)
"""What the first table shows."""


def policy_measure(name: str) -> Measure:
    """The measure of that name, made from the name if it is not a known one."""
    share_of = name.endswith("_rate") or name.startswith(("attribute_recall", "correctness_"))
    return POLICY_MEASURES.get(name) or Measure(readable(name), percent=share_of)


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval, where there is one."""

    value: float
    low: float | None = None
    high: float | None = None
    count: int | None = None

    @property
    def has_interval(self) -> bool:
        """Whether both ends are known."""
        return self.low is not None and self.high is not None


def estimates(evaluation: Mapping[str, Any]) -> dict[str, Estimate]:
    """Every figure of a policy's evaluation by dotted name, known measures first."""
    intervals = evaluation.get("intervals")
    intervals = intervals if isinstance(intervals, Mapping) else {}
    found = {
        name: _with_interval(value, intervals.get(name))
        for name, value in flat_numbers(
            {k: v for k, v in evaluation.items() if k not in ("intervals", "by_source")}
        )
    }
    known = [name for name in POLICY_MEASURES if name in found]
    return {name: found[name] for name in (*known, *(n for n in found if n not in known))}


def share(row: Any) -> Estimate | None:
    """An `{accuracy, count, low, high}` row as an estimate; None if nothing was counted."""
    if not isinstance(row, Mapping) or not is_number(row.get("accuracy")) or row.get("count") == 0:
        return None
    return Estimate(row["accuracy"], row.get("low"), row.get("high"), row.get("count"))


def _with_interval(value: float, row: Any) -> Estimate:
    if not isinstance(row, Mapping) or not (is_number(row.get("low")) and is_number(row.get("high"))):
        return Estimate(value)
    return Estimate(value, row["low"], row["high"], row.get("count"))


def flat_numbers(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """All numbers of a nested mapping with dotted names."""
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield from flat_numbers(value, f"{prefix}{key}.")
        elif is_number(value):
            yield f"{prefix}{key}", value


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number (not a truth value)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def difference(a: Estimate, b: Estimate) -> Estimate:
    """b − a with a 95 % interval from the two intervals, as if the two were independent.

    Source: Newcombe 1998, "Interval estimation for the difference between independent proportions", method 10.
    """
    value = b.value - a.value
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return Estimate(value)
    low = value - math.hypot(b.value - b.low, a.high - a.value)
    high = value + math.hypot(b.high - b.value, a.value - a.low)
    return Estimate(value, low, high)


def readable(name: str) -> str:
    """A field's name as words."""
    return re.sub(r"[._]+", " ", name).replace("kl ", "KL ").strip()


def number(value: float, *, percent: bool = False, signed: bool = False) -> str:
    """A figure with about three significant digits; shares in per cent."""
    sign = "+" if signed else ""
    if percent:
        text = f"{100 * value:{sign}.1f}{PERCENT}"
    elif float(value).is_integer() and abs(value) < 1e15 and isinstance(value, int):
        text = f"{value:{sign},}"
    elif value == 0:
        text = "0"
    elif 1e-4 <= abs(value) < 1e5:
        digits = 4 if abs(value) < 1e-3 else 3 if abs(value) < 1 else 2 if abs(value) < 100 else 1
        text = f"{value:{sign},.{digits}f}"
    else:
        text = f"{value:{sign}.2e}"
    return text.replace("-", "\N{MINUS SIGN}")


def written(estimate: Estimate | None, measure: Measure, *, signed: bool = False) -> Html:
    """A figure with its interval below, as a table's cell."""
    if estimate is None:
        return element("span", "–", class_="soft")
    value = number(estimate.value, percent=measure.percent, signed=signed)
    if estimate.low is None or estimate.high is None or estimate.low == estimate.high:
        return joined([value])
    low, high = (
        number(end, percent=measure.percent, signed=signed).removesuffix(PERCENT)
        for end in (estimate.low, estimate.high)
    )
    return joined([value, element("span", f"{low} to {high}", class_="interval")])


def duration(seconds: float) -> str:
    """Time in the two largest of hours, minutes and seconds."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
