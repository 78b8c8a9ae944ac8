"""Length bias against hand counts, and the best length rule against a search over every target."""

import random

import pytest

from llama2_chat.reward.length_bias import (
    LengthRule,
    best_target,
    fit_length_rule,
    is_matched,
    length_bias,
    length_rule_metrics,
    matched_length,
)
from llama2_chat.reward.metrics import wilson_interval

LENGTHS = [(10, 4), (3, 9), (5, 5), (20, 18)]
CHOSEN, REJECTED = [1.0, 0.0, 2.0, 1.0], [0.0, 1.0, 0.0, 1.0]
"""Right, wrong, right, tie."""


def test_length_bias_by_hand() -> None:
    row = length_bias(LENGTHS, CHOSEN, REJECTED)
    assert (row["mean_chosen"], row["mean_rejected"]) == (38 / 4, 36 / 4)
    # The model prefers 10, 9, 5 and both of 20 and 18 half.
    assert row["mean_preferred"] == (10 + 9 + 5 + 19) / 4
    # Of the three pairs of different length it prefers the longer, the longer, a tie: 2.5 of 3.
    assert row["prefers_longer"]["share"] == 2.5 / 3
    assert row["prefers_longer"]["count"] == 3
    assert (row["prefers_longer"]["low"], row["prefers_longer"]["high"]) == wilson_interval(2.5, 3)
    # The longer is the chosen one, is not, ties, is: 2.5 of 4.
    assert (row["longer_wins"]["accuracy"], row["shorter_wins"]["accuracy"]) == (2.5 / 4, 1.5 / 4)
    assert (row["chosen_longer"]["accuracy"], row["chosen_longer"]["count"]) == (0.75, 2)
    assert (row["rejected_longer"]["accuracy"], row["rejected_longer"]["count"]) == (0.0, 1)


@pytest.mark.parametrize(
    ("pair", "matched"),
    [
        ((10, 9), True),
        ((9, 10), True),
        ((10, 8), False),
        ((30, 27), True),
        ((30, 26), False),
        ((0, 0), True),
        ((1, 0), False),
    ],
)
def test_within_a_tenth_of_the_longer(pair: tuple[int, int], matched: bool) -> None:
    assert is_matched(pair) is matched


def test_matched_length_by_hand() -> None:
    # (5, 5) and (20, 18) are matched: right and a tie.
    row = matched_length(LENGTHS, [1.0, 0.0, 1.0, 0.5])
    assert (row["accuracy"], row["count"]) == (0.75, 2)
    # 3.8415 / (4 · 0.0625) = 15.4
    assert row["pairs_needed"] == 16
    # Sixteen pairs at 0.75 are as many as it takes.
    decided = matched_length([(5, 5)] * 16, [1.0] * 12 + [0.0] * 4)
    assert decided["low"] > 0.5
    assert decided["pairs_needed"] is None
    assert matched_length([(5, 1)], [1.0])["pairs_needed"] is None
    assert matched_length([(5, 5)] * 2, [1.0, 0.0])["pairs_needed"] is None


def test_rules() -> None:
    assert LengthRule("tokens", "longer").points(LENGTHS) == [1.0, 0.0, 0.5, 1.0]
    assert LengthRule("tokens", "shorter").points(LENGTHS) == [0.0, 1.0, 0.5, 0.0]
    # Distances from 7: 3 and 3, 4 and 2, alike, 13 and 11.
    assert LengthRule("tokens", "nearest", 7.0).points(LENGTHS) == [0.5, 0.0, 0.5, 0.0]


def test_the_best_target_by_hand() -> None:
    # Middles 5 (chosen longer), 8 (chosen longer), 15 (chosen shorter): above 8 and below 15 all three are right.
    assert best_target([(6, 4), (10, 6), (12, 18)]) == 11.5
    assert best_target([(5, 5), (6, 4)]) is None


@pytest.mark.parametrize("seed", range(5))
def test_the_best_target_is_as_good_as_any(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [(rng.randint(0, 12), rng.randint(0, 12)) for _ in range(40)]

    def right(target: float) -> float:
        return sum(LengthRule("tokens", "nearest", target).points(lengths))

    middles = [(c + r) / 2 for c, r in lengths if c != r]
    inside = [quarter / 4 for quarter in range(52) if min(middles) < quarter / 4 < max(middles)]
    target = best_target(lengths)
    assert target is not None
    # On a middle a pair ties, so the best may be no worse than any target between or on them.
    assert right(target) == max(map(right, inside))


def test_the_simplest_of_the_best_rules_is_chosen_on_the_training_pairs() -> None:
    longer = {"tokens": [(3, 1), (5, 2), (4, 9)], "characters": [(9, 2), (9, 2), (2, 9)]}
    rule, row = fit_length_rule(longer)
    assert (rule.unit, rule.kind, row["accuracy"], row["count"]) == ("tokens", "nearest", 1.0, 3)
    rule, _ = fit_length_rule({"tokens": [(3, 1), (5, 2)], "characters": [(3, 1), (5, 2)]})
    assert (rule.unit, rule.kind) == ("tokens", "longer")
    rule, _ = fit_length_rule({"tokens": [(1, 3), (5, 2)], "characters": [(1, 3), (2, 5)]})
    assert (rule.unit, rule.kind) == ("characters", "shorter")


def test_a_rule_is_fitted_on_one_set_and_judged_on_another() -> None:
    train = {"tokens": [(1, 2)] * 3, "characters": [(1, 2)] * 3}  # the shorter wins
    evaluated = {"tokens": [(1, 2), (5, 4), (7, 7), (9, 2)], "characters": [(1, 2)] * 4}
    row = length_rule_metrics(train, evaluated, [1.0, 1.0, 1.0, 0.0])
    assert (row["rule"], row["target"]) == ("shorter in tokens wins", None)
    assert row["train"]["accuracy"] == 1.0
    assert row["evaluated"]["accuracy"] == (1 + 0 + 0.5 + 0) / 4
    assert row["model_minus_rule"]["difference"] == (0 + 1 + 0.5 + 0) / 4
