"""What the best and the middle of n samples are worth, against all subsets and against drawing them."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations
from statistics import median

import numpy as np
import pytest
import torch

from llama2_chat.rejection_sampling.best_of import (
    best_of_curves,
    bootstrap_interval,
    expected_maximum,
    expected_median,
    order_statistic_weights,
    sample_counts,
    true_score_of_best,
)


@pytest.fixture(scope="module")
def scores() -> torch.Tensor:
    """(4, 7), with a row of ties and one with ineligible samples as 0."""
    made = torch.from_numpy(np.random.default_rng(0).random((4, 7)))
    made[1, :] = 0.25
    made[2, 2:] = 0.0
    return made


@pytest.mark.parametrize("size", range(1, 8))
def test_both_are_the_means_over_all_subsets(scores, size: int) -> None:
    for estimate, of_subset in ((expected_maximum, max), (expected_median, median)):
        slow = [np.mean([of_subset(s) for s in combinations(row, size)]) for row in scores.tolist()]
        np.testing.assert_allclose(estimate(scores, size=size).numpy(), slow, rtol=1e-12, atol=1e-15)


def test_by_hand() -> None:
    """Of 1, 2, 4: the pairs are 12, 14, 24, so the best is 2, 4, 4 and the middle 1.5, 2.5, 3."""
    scores = torch.tensor([[4.0, 1.0, 2.0]])
    assert expected_maximum(scores, size=2).item() == pytest.approx(10 / 3, rel=1e-15)
    assert expected_median(scores, size=2).item() == pytest.approx(7 / 3, rel=1e-15)
    assert expected_median(scores, size=3).item() == 2.0
    assert expected_maximum(scores, size=1).item() == pytest.approx(7 / 3, rel=1e-15)


def test_against_drawing_subsets() -> None:
    rng = np.random.default_rng(1)
    scores = rng.random((1, 30))
    draws = rng.permuted(np.tile(scores, (300_000, 1)), axis=1)[:, :8]
    for estimate, found in ((expected_maximum, draws.max(1)), (expected_median, np.median(draws, 1))):
        error = found.std() / np.sqrt(len(found))
        assert abs(estimate(torch.from_numpy(scores), size=8).item() - found.mean()) < 4 * error < 1e-3


@pytest.mark.parametrize(("samples", "size", "rank"), [(5, 3, 2), (100, 50, 25), (400, 200, 200)])
def test_weights_are_a_distribution(samples: int, size: int, rank: int) -> None:
    weights = order_statistic_weights(samples, size=size, rank=rank)
    assert sum(map(Fraction, weights.tolist())) == pytest.approx(1, abs=1e-13)
    assert weights[: rank - 1].sum() == 0
    assert weights[samples - size + rank :].sum() == 0


def test_the_maximum_grows_and_is_concave_and_the_middle_of_symmetric_scores_is_flat() -> None:
    scores = torch.linspace(0, 1, 16)[None]
    best = [expected_maximum(scores, size=n).item() for n in range(1, 17)]
    gains = np.diff(best)
    assert (gains > 0).all()
    assert (np.diff(gains) < 1e-12).all()
    middle = [expected_median(scores, size=n).item() for n in range(1, 17)]
    np.testing.assert_allclose(middle, 0.5, atol=1e-7)


def test_interval_against_numpy_and_its_seed() -> None:
    values = torch.from_numpy(np.random.default_rng(2).normal(size=(200, 2)))
    low, high = bootstrap_interval(values, seed=3, resamples=4000)
    rng = np.random.default_rng(4)
    means = np.array([values.numpy()[rng.integers(200, size=200)].mean(0) for _ in range(4000)])
    expected = np.quantile(means, [0.025, 0.975], axis=0)
    width = (expected[1] - expected[0]).mean()
    np.testing.assert_allclose(np.stack([low, high]), expected, atol=0.05 * width)
    again = bootstrap_interval(values, seed=3, resamples=4000)
    assert torch.equal(again[0], low)
    assert not torch.equal(bootstrap_interval(values, seed=5, resamples=4000)[0], low)


def test_curves_have_a_row_for_each_size(scores) -> None:
    curves = best_of_curves(scores, sizes=[1, 2, 7], seed=0)
    for name, estimate in (("maximum", expected_maximum), ("median", expected_median)):
        assert [row["n"] for row in curves[name]] == [1, 2, 7]
        for row in curves[name]:
            assert row["mean"] == pytest.approx(estimate(scores, size=row["n"]).mean().item(), rel=1e-12)
            assert row["low"] <= row["mean"] <= row["high"]
    assert curves["maximum"][0]["mean"] == pytest.approx(curves["median"][0]["mean"], rel=1e-12)


@pytest.mark.parametrize(
    ("samples", "counts"), [(1, [1]), (2, [1, 2]), (8, [1, 2, 4, 8]), (10, [1, 2, 4, 8, 10])]
)
def test_sizes_are_powers_of_two_and_all(samples: int, counts: list[int]) -> None:
    assert sample_counts(samples) == counts


@pytest.mark.parametrize(("size", "rank"), [(0, 1), (6, 1), (3, 0), (3, 4)])
def test_what_is_out_of_range_is_refused(size: int, rank: int) -> None:
    with pytest.raises(ValueError, match="to"):
        order_statistic_weights(5, size=size, rank=rank)


def test_scores_have_two_dimensions() -> None:
    with pytest.raises(ValueError, match="prompts, samples"):
        expected_maximum(torch.zeros(3), size=1)


def mean_truth_of_best(rewards: list[float], truths: list[float], size: int) -> float:
    """The definition: over all subsets the truth of the one with the highest reward; of ties their mean."""
    worth = []
    for subset in combinations(range(len(rewards)), size):
        # Ties are broken at random among all samples of that reward, so each stands for their mean.
        best = max(rewards[i] for i in subset)
        tied = [truths[i] for i in range(len(rewards)) if rewards[i] == best]
        worth.append(sum(tied) / len(tied))
    return sum(worth) / len(worth)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_the_truth_of_the_best_is_the_mean_over_all_subsets(size: int) -> None:
    rewards = [[0.3, 0.9, 0.3, 0.1, 0.9], [0.0, 0.0, 0.0, 0.0, 0.0], [5.0, 4.0, 3.0, 2.0, 1.0]]
    truths = [[1.0, 0.0, 0.5, 0.2, 0.7], [0.1, 0.2, 0.3, 0.4, 0.5], [0.0, 1.0, 0.0, 1.0, 0.0]]
    found = true_score_of_best(torch.tensor(rewards), torch.tensor(truths), size=size)
    expected = [mean_truth_of_best(*row, size) for row in zip(rewards, truths, strict=True)]
    assert found.tolist() == pytest.approx(expected, abs=1e-7)
    if size == 5:
        assert found.tolist() == pytest.approx([0.35, 0.3, 0.0], abs=1e-7)


def test_the_truth_of_the_best_needs_equal_shapes() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        true_score_of_best(torch.zeros(2, 3), torch.zeros(3, 2), size=1)
