"""Accuracy, intervals, paired differences and unsafe detection against hand counts and published examples."""

import math

import pytest

from llama2_chat.dialogue import Message, Preference
from llama2_chat.evaluation.statistics import mean_interval, share_interval, share_interval_by_prompt
from llama2_chat.reward.metrics import (
    MOST_SOURCES,
    accuracy_by,
    accuracy_points,
    accuracy_table,
    paired_difference,
    pairs_needed,
    sigmoid,
    unsafe_detection,
    wilson_interval,
)

PROMPT = (Message("user", "q"),)


def pair(rating=None, chosen_safe=None, rejected_safe=None, chosen="aa", rejected="a") -> Preference:
    return Preference(PROMPT, chosen, rejected, rating, chosen_safe, rejected_safe)


def test_wilson_interval_published_example() -> None:
    # 81 of 263: Newcombe 1998, Statistics in Medicine 17:857, table I, method 3: 0.2553 to 0.3662.
    low, high = wilson_interval(81, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_accuracy_by_rating_and_ties() -> None:
    pairs = [pair("better"), pair("better"), pair("slightly_better"), pair(None)]
    table = accuracy_table(pairs, [1.0, 0.0, 2.0, 5.0], [0.0, 1.0, 2.0, 1.0])
    assert table["overall"]["accuracy"] == (1 + 0 + 0.5 + 1) / 4
    assert table["by_rating"]["better"]["accuracy"] == 0.5
    assert table["by_rating"]["better"]["count"] == 2
    assert table["by_rating"]["slightly_better"]["accuracy"] == 0.5
    assert table["by_rating"]["significantly_better"]["accuracy"] is None


def test_safety_classes() -> None:
    pairs = [
        pair(None, True, False),
        pair(None, True, True),
        pair(None, False, False),
        pair(None, None, True),
    ]
    table = accuracy_table(pairs, [1.0] * 4, [0.0, 2.0, 0.0, 0.0])["by_safety"]
    assert {name: row["accuracy"] for name, row in table.items()} == {
        "safe_unsafe": 1.0,
        "both_safe": 0.0,
        "both_unsafe": 1.0,
    }


def test_pairs_needed_by_hand() -> None:
    # 1.96² = 3.8415; at 0.6: 3.8415 / (4 · 0.01) = 96.04, so 97. At 0.55: 3.8415 / 0.01 = 384.1, so 385.
    assert [pairs_needed(p) for p in (0.6, 0.4, 0.55, 1.0)] == [97, 97, 385, 4]
    assert pairs_needed(0.5) is None


@pytest.mark.parametrize("accuracy", [0.51, 0.538, 0.62, 0.9, 0.3])
def test_pairs_needed_is_where_the_interval_lets_go_of_one_half(accuracy: float) -> None:
    def excluded(count: int) -> bool:
        low, high = wilson_interval(accuracy * count, count)
        return not low <= 0.5 <= high

    needed = pairs_needed(accuracy)
    assert excluded(needed)
    assert not excluded(needed - 1)


def test_paired_difference_published_example() -> None:
    # statpsych's ci.prop.ps(.05, 12, 4, 26, 6) gives 0.2548067 to 0.6251933 (Bonett and Price 2012).
    right_wrong, wrong_right, rest = 26, 4, 18
    points = [1.0] * right_wrong + [0.0] * wrong_right + [1.0] * rest
    other = [0.0] * right_wrong + [1.0] * wrong_right + [1.0] * rest
    row = paired_difference(points, other)
    assert row["difference"] == pytest.approx(22 / 48, rel=1e-12)
    assert row["low"] == pytest.approx(0.2548067, abs=1e-7)
    assert row["high"] == pytest.approx(0.6251933, abs=1e-7)


def test_paired_difference_of_ties_and_of_nothing() -> None:
    # d = 0.5, -0.5, 1, 0: sum 1, squares 1.5. Centre 1/6; variance (3.5/6 - 1/36)/6 = 20/216.
    row = paired_difference([0.5, 0.5, 1.0, 1.0], [0.0, 1.0, 0.0, 1.0])
    half = 1.959963984540054 * math.sqrt(20 / 216)
    assert (row["difference"], row["count"]) == (0.25, 4)
    assert row["low"] == pytest.approx(1 / 6 - half, rel=1e-9)
    assert row["high"] == pytest.approx(1 / 6 + half, rel=1e-9)
    assert paired_difference([], []) == {"difference": None, "count": 0, "low": -1.0, "high": 1.0}


def test_each_set_has_its_own_table_and_many_small_ones_share_one() -> None:
    pairs = [pair("better")] * 4
    tables = accuracy_by(["b", "a", "b", "b"], pairs, [1.0, 1.0, 0.0, 2.0], [0.0, 2.0, 1.0, 2.0])
    assert list(tables) == ["a", "b"]
    assert tables["a"]["overall"]["accuracy"] == 0.0
    assert tables["b"]["by_rating"]["better"]["accuracy"] == 0.5  # right, wrong, tie
    names = ["large", *(f"small {n:02}" for n in range(MOST_SOURCES + 4)), "large"]
    tables = accuracy_by(names, [pair()] * len(names), [1.0] * len(names), [0.0] * len(names))
    assert len(tables) == MOST_SOURCES + 1
    assert tables["large"]["overall"]["count"] == 2
    assert tables["5 others"]["overall"]["count"] == 5


def test_unsafe_detection_counts() -> None:
    # sigmoid: -3 -> 0.047 (flagged), 0 -> 0.5 (not), -2 -> 0.119 (flagged), 3 -> 0.95 (not), -4 -> 0.018 (flagged)
    result = unsafe_detection([-3.0, 0.0, -2.0, 3.0, -4.0], [False, False, True, True, False], 0.15)
    counts = {name: result[name] for name in ("hits", "flagged", "unsafe", "count")}
    assert counts == {"hits": 2, "flagged": 3, "unsafe": 3, "count": 5}
    assert (result["precision"], result["recall"]) == (2 / 3, 2 / 3)
    assert (result["precision_low"], result["precision_high"]) == wilson_interval(2, 3)
    more = unsafe_detection([-3.0, 1.0], [False, False], 0.15)
    assert (more["recall_low"], more["recall_high"]) == wilson_interval(1, 2)
    assert (more["precision_low"], more["precision_high"]) == wilson_interval(1, 1)
    nothing = unsafe_detection([1.0], [True], 0.15)
    assert nothing["recall"] is nothing["precision"] is None


def test_points() -> None:
    assert accuracy_points([1.0, 1.0, 0.0], [0.0, 1.0, 1.0]) == [1.0, 0.5, 0.0]


def test_sigmoid_far_out() -> None:
    assert sigmoid(-800.0) == 0.0
    assert sigmoid(800.0) == 1.0
    assert sigmoid(0.3) == pytest.approx(1 / (1 + math.exp(-0.3)), rel=1e-12)


def test_mean_interval_by_hand() -> None:
    # values 1, 2, 3: variance 1, half width 1.96 / sqrt(3)
    interval = mean_interval([1.0, 2.0, 3.0])
    assert interval["mean"] == 2.0
    assert interval["high"] == pytest.approx(2 + 1.959963984540054 / math.sqrt(3), rel=1e-9)
    assert share_interval([True, False, True, True])["mean"] == 0.75


def test_shares_with_several_answers_to_a_prompt() -> None:
    """By hand where answers to a prompt are alike, unlike, or drawn by themselves."""
    flags = [True, False, True, True, False]
    assert share_interval_by_prompt([[flag] for flag in flags]) == share_interval(flags)
    copies = share_interval_by_prompt([[flag] * 7 for flag in flags])  # copies say nothing new
    assert copies == pytest.approx(share_interval(flags), abs=1e-12)
    unlike = share_interval_by_prompt([[True, False]] * 5)  # the prompts do not differ: ten answers
    assert (unlike["low"], unlike["high"]) == pytest.approx(wilson_interval(5, 10), abs=1e-12)
    assert unlike["count"] == 5
    # p = 1/2, shares 1, 1/2, 1/2, 0: v = (1/4 + 1/4) / 3 / 4 = 1/24, (1/4) / (1/24) = 6 answers of the eight.
    mixed = share_interval_by_prompt([[True, True], [True, False], [False, True], [False, False]])
    assert (mixed["low"], mixed["high"]) == pytest.approx(wilson_interval(3, 6), abs=1e-12)
    never = share_interval_by_prompt([[False] * 8] * 20)
    assert never == share_interval([False] * 20)
