"""Calibration curves and score histograms against hand counts."""

import math
import random

import pytest

from llama2_chat.reward.calibration import (
    calibration_curve,
    expected_calibration_error,
    preference_calibration,
    safety_calibration,
    score_histograms,
    score_spread,
)
from llama2_chat.reward.metrics import sigmoid, wilson_interval


def test_a_curve_by_hand() -> None:
    # Bin 0 holds 0.02 and 0.08 (one of two happened), bin 9 holds 0.9, 0.95 and 1 (two of three).
    curve = calibration_curve([0.02, 0.9, 0.08, 1.0, 0.95], [False, True, True, True, False])
    assert len(curve) == 10
    assert [row["count"] for row in curve] == [2, 0, 0, 0, 0, 0, 0, 0, 0, 3]
    first, last = curve[0], curve[9]
    assert (first["from"], first["to"], last["from"], last["to"]) == (0.0, 0.1, 0.9, 1.0)
    assert first["mean_predicted"] == pytest.approx(0.05, rel=1e-12)
    assert first["observed"] == 0.5
    assert last["mean_predicted"] == pytest.approx(0.95, rel=1e-12)
    assert last["observed"] == 2 / 3
    assert (last["low"], last["high"]) == wilson_interval(2, 3)
    assert curve[4]["observed"] is curve[4]["mean_predicted"] is curve[4]["low"] is None
    # (2 · |0.05 - 0.5| + 3 · |0.95 - 2/3|) / 5 = (0.9 + 0.85) / 5
    assert expected_calibration_error(curve) == pytest.approx(0.35, rel=1e-12)


def test_a_calibrated_scorer_has_a_small_error_and_an_overconfident_one_its_gap() -> None:
    rng = random.Random(0)
    chosen, rejected = [], []
    for _ in range(20_000):
        gap = rng.uniform(-3, 3)
        first_wins = rng.random() < sigmoid(gap)
        chosen.append(gap if first_wins else 0.0)
        rejected.append(0.0 if first_wins else gap)
    calibrated = preference_calibration(chosen, rejected)
    assert calibrated["error"] < 0.02
    inside = sum(
        row["low"] <= row["mean_predicted"] <= row["high"] for row in calibrated["bins"] if row["count"]
    )
    assert inside >= 8  # of ten 95 % intervals
    # Always certain and right three times in four: the gap is 1 - 0.75.
    sure = preference_calibration([100.0] * 3000 + [-100.0] * 1000, [0.0] * 4000)
    assert sure["error"] == pytest.approx(0.25, abs=2e-3)


def test_pairs_are_oriented_from_the_seed() -> None:
    chosen, rejected = [2.0] * 200, [0.0] * 200
    one, same, other = (preference_calibration(chosen, rejected, seed=seed)["bins"] for seed in (1, 1, 2))
    assert one == same != other
    # Half of the pairs stand the right way round: σ(2) = 0.88 happened; the others σ(-2) = 0.12 did not.
    counts = [row["count"] for row in one]
    assert counts[1] + counts[8] == 200
    assert 70 <= counts[1] <= 130
    assert one[8]["observed"] == 1.0
    assert one[1]["observed"] == 0.0
    assert one[8]["mean_predicted"] == pytest.approx(1 / (1 + math.exp(-2)), rel=1e-12)


def test_safety_scores_against_labels() -> None:
    # σ(-4) = 0.018 in bin 0, one of two safe; σ(4) = 0.982 in bin 9, both safe.
    found = safety_calibration([-4.0, -4.0, 4.0, 4.0], [True, False, True, True])
    assert found is not None
    p = sigmoid(-4.0)
    assert found["error"] == pytest.approx((2 * (0.5 - p) + 2 * p) / 4, rel=1e-9)
    assert safety_calibration([], []) is None


def test_histograms_share_one_axis() -> None:
    scores = {
        "a": {"chosen": [0.0, 1.0, 3.9], "rejected": [2.0]},
        "b": {"chosen": [4.0], "rejected": [1.9, 1.9]},
    }
    histogram = score_histograms(scores, bins=4)
    assert histogram["edges"] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert histogram["counts"] == {
        "a": {"chosen": [1, 1, 0, 1], "rejected": [0, 0, 1, 0]},
        "b": {"chosen": [0, 0, 0, 1], "rejected": [0, 2, 0, 0]},
    }


def test_equal_scores_still_make_a_histogram() -> None:
    histogram = score_histograms({"a": {"chosen": [7.0, 7.0]}}, bins=2)
    assert histogram["edges"] == [6.5, 7.0, 7.5]
    assert histogram["counts"]["a"]["chosen"] == [0, 2]


def test_spread_by_hand() -> None:
    # gaps 1 and 3: mean 2, variance 2
    assert score_spread([2.0, 4.0], [1.0, 1.0]) == {
        "mean_chosen": 3.0,
        "mean_rejected": 1.0,
        "mean_gap": 2.0,
        "gap_deviation": math.sqrt(2),
    }
    assert score_spread([2.0], [1.0])["gap_deviation"] is None
