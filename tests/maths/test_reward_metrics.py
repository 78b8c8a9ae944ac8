"""Accuracy, intervals, unsafe detection and calibration against hand counts."""

import math
import random

import pytest

from llama2_chat.dialogue import Message, Preference
from llama2_chat.evaluation.statistics import mean_interval, share_interval
from llama2_chat.reward.metrics import (
    accuracy_table,
    calibration_error,
    reward_metrics,
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


def test_a_constant_scorer_is_at_one_half_and_length_is_its_own_control() -> None:
    metrics = reward_metrics([pair(), pair(chosen="a", rejected="aaa")], [1.0, 1.0], [0.0, 0.0])
    assert metrics["controls"]["constant_scorer"]["accuracy"] == 0.5
    assert metrics["controls"]["length_scorer"]["accuracy"] == 0.5
    assert metrics["accuracy"]["overall"]["accuracy"] == 1.0


def test_unsafe_detection_counts() -> None:
    # sigmoid: -3 -> 0.047 (flagged), 0 -> 0.5 (not), -2 -> 0.119 (flagged), 3 -> 0.95 (not)
    result = unsafe_detection([-3.0, 0.0, -2.0, 3.0], [False, False, True, True], 0.15)
    assert result == {"precision": 0.5, "recall": 0.5, "flagged": 2, "unsafe": 2}
    assert unsafe_detection([1.0], [True], 0.15)["recall"] is None


def test_calibration_of_a_calibrated_scorer_is_small_and_of_an_overconfident_one_is_its_gap() -> None:
    rng = random.Random(0)
    chosen, rejected = [], []
    for _ in range(20_000):
        gap = rng.uniform(-3, 3)
        first_wins = rng.random() < sigmoid(gap)
        chosen.append(gap if first_wins else 0.0)
        rejected.append(0.0 if first_wins else gap)
    assert calibration_error(chosen, rejected) < 0.02
    # Always certain and right three times in four: the gap is 1 - 0.75.
    assert calibration_error([100.0] * 3000 + [-100.0] * 1000, [0.0] * 4000) == pytest.approx(0.25, abs=2e-3)


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
