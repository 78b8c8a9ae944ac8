"""How much of a reward model's accuracy the length of the responses explains.

People often prefer the longer answer, and a model that has learnt that alone looks accurate. So its accuracy
is set beside that of rules that know nothing but lengths, and measured where lengths do not differ.

A length is a response's number of characters, or of tokens with the one that ends it; a pair of lengths is
(chosen, rejected). Plain Python; ties count one half.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from llama2_chat.reward.metrics import (
    Row,
    accuracy_points,
    accuracy_row,
    paired_difference,
    pairs_needed,
    wilson_interval,
)

MATCHED_DIFFERENCE = 0.1
"""Lengths are matched where they differ by at most this share of the longer."""

Unit = Literal["tokens", "characters"]
Lengths = Sequence[tuple[int, int]]
"""(chosen, rejected) of each pair."""


@dataclass(frozen=True, slots=True)
class LengthRule:
    """Which of two responses wins by length alone.

    `longer`, `shorter`, or `nearest`: the one whose length is nearer to `target`, so that the longer wins
    among short responses and the shorter among long ones.
    """

    unit: Unit
    kind: Literal["longer", "shorter", "nearest"]
    target: float | None = None

    def score(self, length: float) -> float:
        """The higher the better; only the order of two matters."""
        if self.kind == "nearest":
            assert self.target is not None
            return -abs(length - self.target)
        return length if self.kind == "longer" else -length

    def points(self, lengths: Lengths) -> list[float]:
        """1 for each pair whose chosen response wins, 0 where the rejected one does, one half for a tie."""
        return accuracy_points([self.score(c) for c, _ in lengths], [self.score(r) for _, r in lengths])

    def __str__(self) -> str:
        if self.kind == "nearest":
            return f"nearest to {self.target:g} {self.unit} wins"
        return f"{self.kind} in {self.unit} wins"


def best_target(lengths: Lengths) -> float | None:
    """The target with which `nearest` is right most often; the smallest of several; None if none is inside.

    The longer of a and b wins exactly where the target is above (a + b) / 2, so only the order of these middles
    counts: they are passed from below, and the target lies half-way to the next one.
    """
    change: dict[float, int] = {}
    for c, r in lengths:
        if c != r:
            change[(c + r) / 2] = change.get((c + r) / 2, 0) + (1 if c > r else -1)
    middles = sorted(change)
    best, target, right = None, None, 0
    for middle, following in pairwise(middles):
        right += change[middle]
        if best is None or right > best:
            best, target = right, (middle + following) / 2
    return target


def fit_length_rule(lengths: Mapping[Unit, Lengths]) -> tuple[LengthRule, Row]:
    """The rule that is right most often on these (training) pairs, with its accuracy on them.

    Of equally good ones the simplest: longer, shorter, then nearest; tokens before characters.
    """
    units: tuple[Unit, ...] = ("tokens", "characters")
    rules = [LengthRule(unit, "longer") for unit in units] + [LengthRule(unit, "shorter") for unit in units]
    for unit in units:
        target = best_target(lengths[unit])
        if target is not None:
            rules.append(LengthRule(unit, "nearest", target))
    scored = [(sum(rule.points(lengths[rule.unit])), rule) for rule in rules]
    most = max(points for points, _ in scored)
    rule = next(rule for points, rule in scored if points == most)
    return rule, accuracy_row(rule.points(lengths[rule.unit]))


def length_rule_metrics(
    train: Mapping[Unit, Lengths], lengths: Mapping[Unit, Lengths], points: Sequence[float]
) -> dict[str, Any]:
    """The best length rule of the training pairs, judged on the evaluated ones and compared with the model.

    Args:
        points: Of each evaluated pair, whether the model is right.
    """
    rule, on_train = fit_length_rule(train)
    by_rule = rule.points(lengths[rule.unit])
    return {
        "rule": str(rule),
        "unit": rule.unit,
        "kind": rule.kind,
        "target": rule.target,
        "train": on_train,
        "evaluated": accuracy_row(by_rule),
        "model_minus_rule": paired_difference(points, by_rule),
    }


def is_matched(pair: tuple[int, int]) -> bool:
    """Whether the lengths differ by at most a tenth of the longer (10 and 9 do, 10 and 8 do not)."""
    # In integers: 0.1 * 30 is above 3 in binary.
    return 10 * abs(pair[0] - pair[1]) <= max(pair)


def matched_length(lengths: Lengths, points: Sequence[float]) -> dict[str, Any]:
    """Accuracy on the pairs of matched length.

    `pairs_needed` is how many such pairs it would take for the interval to exclude 0.5 at this accuracy; None
    where it does already, where there is no pair, and at exactly 0.5.
    """
    row: dict[str, Any] = dict(accuracy_row(_where(points, map(is_matched, lengths))))
    undecided = row["count"] > 0 and row["low"] <= 0.5 <= row["high"]
    return {**row, "pairs_needed": pairs_needed(row["accuracy"]) if undecided else None}


def length_bias(lengths: Lengths, chosen: Sequence[float], rejected: Sequence[float]) -> dict[str, Any]:
    """Mean lengths and the part that length plays, in one unit.

    Returns:
        `mean_chosen`, `mean_rejected`, `mean_preferred` (by the model; a tie counts both half);
        `prefers_longer`: the share of pairs of different length in which the model prefers the longer;
        `longer_wins`, `shorter_wins`: accuracy of these rules; `chosen_longer`, `rejected_longer`: the model's
        accuracy where the chosen or the rejected response is the longer.
    """
    points = accuracy_points(chosen, rejected)
    count = len(points)
    differ = [c != r for c, r in lengths]
    # Where the chosen response is the longer, being right and preferring the longer are the same.
    longer = _where([p if c > r else 1 - p for p, (c, r) in zip(points, lengths, strict=True)], differ)
    low, high = wilson_interval(sum(longer), len(longer))
    return {
        "mean_chosen": sum(c for c, _ in lengths) / count,
        "mean_rejected": sum(r for _, r in lengths) / count,
        "mean_preferred": sum(p * c + (1 - p) * r for p, (c, r) in zip(points, lengths, strict=True)) / count,
        "prefers_longer": {
            "share": sum(longer) / len(longer) if longer else None,
            "count": len(longer),
            "low": low,
            "high": high,
        },
        "longer_wins": accuracy_row(LengthRule("tokens", "longer").points(lengths)),
        "shorter_wins": accuracy_row(LengthRule("tokens", "shorter").points(lengths)),
        "chosen_longer": accuracy_row(_where(points, (c > r for c, r in lengths))),
        "rejected_longer": accuracy_row(_where(points, (c < r for c, r in lengths))),
    }


def _where(values: Sequence[float], keep: Iterable[bool]) -> list[float]:
    return [value for value, kept in zip(values, keep, strict=True) if kept]
