"""R_c (§3.2.3): the gate between the two reward models."""

import math

import pytest
import torch

from llama2_chat.ppo.rewards import combine_scores

LOGIT_015 = math.log(0.15 / 0.85)


def combined(helpfulness: list[float], safety: list[float], tags: list[bool], threshold: float = 0.15):
    scores, used = combine_scores(
        torch.tensor(helpfulness, dtype=torch.float64),
        torch.tensor(safety, dtype=torch.float64),
        is_safety=torch.tensor(tags),
        safety_threshold=threshold,
    )
    return scores.tolist(), used.tolist()


def test_the_four_cases() -> None:
    # tagged or not x below or above the threshold
    scores, used = combined([1.0, 2.0, 3.0, 4.0], [-5.0, 5.0, -6.0, 6.0], [True, True, False, False])
    assert scores == [-5.0, 5.0, -6.0, 4.0]
    assert used == [True, True, True, False]


def test_the_comparison_is_strict() -> None:
    assert combined([7.0], [LOGIT_015], [False]) == ([7.0], [False])
    assert combined([7.0], [LOGIT_015 - 1e-9], [False])[1] == [True]


def test_the_threshold_is_a_probability() -> None:
    # sigmoid(-1) = 0.269: above 0.15, below 0.3
    assert combined([7.0], [-1.0], [False]) == ([7.0], [False])
    assert combined([7.0], [-1.0], [False], threshold=0.3) == ([-1.0], [True])


def test_raw_scores_come_through_unsaturated() -> None:
    # Through float32 sigmoid and back these would be infinite.
    assert combined([200.0], [150.0], [False])[0] == [200.0]
    assert combined([200.0], [150.0], [True])[0] == [150.0]


def test_bad_inputs() -> None:
    two, three = torch.zeros(2), torch.zeros(3)
    with pytest.raises(ValueError, match="shape"):
        combine_scores(two, three, is_safety=torch.zeros(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="bool"):
        combine_scores(two, two, is_safety=two)
    with pytest.raises(ValueError, match="threshold"):
        combine_scores(two, two, is_safety=torch.zeros(2, dtype=torch.bool), safety_threshold=1.0)
