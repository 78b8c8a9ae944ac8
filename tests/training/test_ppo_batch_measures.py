"""The line of an iteration: each number against hand arithmetic on a batch of three responses."""

from __future__ import annotations

import math

import pytest
import torch

from llama2_chat.generation.answers import Answer
from llama2_chat.generation.engine import Response
from llama2_chat.ppo.batch_measures import batch_measures, finite_row, sampled_logprobs, step_measures
from llama2_chat.ppo.experience import Experience
from llama2_chat.ppo.response_tokens import response_mask
from llama2_chat.reward.scoring import Score

SAMPLED = ([-1.0, -2.0], [-0.5], [-1.5, -1.0, -0.5])
"""What the sampler said of each token of the three responses."""

ANSWERS = [
    Answer("a", status, Response([7] * len(logprobs), logprobs, "stop"))
    for status, logprobs in zip(("complete", "cut_off", "chat_tag"), SAMPLED, strict=True)
]
SCORES = [
    Score(2.0, 1.0, 0.9, 0.7, "helpfulness", 0.9),
    Score(3.0, -3.0, 0.9, 0.1, "safety", 0.1),
    Score(-1.0, 4.0, 0.3, 0.9, "helpfulness", 0.3),
]
"""Raw combined scores 2, -3 and -1."""


def measured(**changes):
    mask = response_mask([answer.response.token_ids for answer in ANSWERS])
    logprobs = torch.zeros(mask.shape)
    logprobs[mask] = torch.tensor([value for row in SAMPLED for value in row])
    values = {
        "mask": mask,
        "logprobs": logprobs,
        "reference_logprobs": logprobs - 0.5 * mask,
        "values": torch.zeros(mask.shape),
        "advantages": torch.zeros(mask.shape),
        "returns": torch.arange(9.0).view(3, 3) * mask,
        **changes,
    }
    rewards = torch.tensor([1.0, -1.5, 2.0])
    return batch_measures(SCORES, ANSWERS, rewards, Experience(**values), 0.1)


def test_by_hand() -> None:
    found = measured()
    assert found["score_mean"] == pytest.approx((2 - 3 - 1) / 3)
    # Squared distances from -2/3: (8/3)^2, (7/3)^2, (1/3)^2.
    assert found["score_std"] == pytest.approx(math.sqrt((64 + 49 + 1) / 27))
    assert found["helpfulness_mean"] == pytest.approx(4 / 3)
    assert found["safety_mean"] == pytest.approx(2 / 3)
    assert found["safety_branch_share"] == pytest.approx(1 / 3)
    # Half a nat at each of 2, 1 and 3 tokens; the ratio pi_0 / pi is exp(-1/2).
    assert found["kl_nats"] == pytest.approx(1.0)
    assert found["kl_k3_nats"] == pytest.approx(2 * (math.exp(-0.5) - 1 + 0.5))
    assert found["kl_penalty_mean"] == pytest.approx(0.1)
    assert found["whitened_score_mean"] == pytest.approx(0.5)
    assert found["reward_mean"] == pytest.approx(0.4)
    assert found["entropy_nats"] == pytest.approx(6.5 / 6)
    assert found["response_tokens_mean"] == pytest.approx(2.0)
    assert found["response_tokens_std"] == pytest.approx(math.sqrt(2 / 3))
    assert found["incomplete_share"] == pytest.approx(2 / 3)
    shares = [found[f"{status}_share"] for status in ("complete", "cut_off", "empty", "chat_tag")]
    assert shares == pytest.approx([1 / 3, 1 / 3, 0.0, 1 / 3])
    assert found["explained_variance"] == 0.0  # by values that are all 0
    assert (found["sampler_logprob_difference"], found["sampler_logprob_difference_max"]) == (0.0, 0.0)


def test_the_sampler_s_and_the_trainer_s_log_probabilities_token_by_token() -> None:
    mask = response_mask([[1, 1], [1], [1, 1, 1]])
    grid = sampled_logprobs(ANSWERS, mask)
    assert grid.tolist() == [[-1.0, -2.0, 0.0], [-0.5, 0.0, 0.0], [-1.5, -1.0, -0.5]]
    shifted = grid.clone()
    shifted[2, 1] += 0.6
    found = measured(logprobs=shifted)
    assert found["sampler_logprob_difference"] == pytest.approx(0.1)
    assert found["sampler_logprob_difference_max"] == pytest.approx(0.6)


def test_over_the_steps() -> None:
    names = ("policy_loss", "value_loss", "clip_fraction", "ratio_mean", "ratio_max", "update_kl_nats")
    norms = ("policy_grad_norm", "value_grad_norm")
    steps = [dict.fromkeys((*names, *norms), value) for value in (1.0, 4.0, 1.0)]
    expected = dict.fromkeys((*names, *norms), 2.0) | {"ratio_max": 4.0}
    assert step_measures(steps) == expected
    # The warm-up has steps of the value model alone.
    still = step_measures([{"value_loss": 1.0, "value_grad_norm": 3.0}])
    assert still == dict.fromkeys((*names, *norms), None) | {"value_loss": 1.0, "value_grad_norm": 3.0}


def test_what_json_has_not() -> None:
    assert finite_row({"a": 1.0, "b": None, "c": 3}) == {"a": 1.0, "b": None, "c": 3}
    row = finite_row({"a": math.nan, "b": -math.inf, "c": 2.0})
    assert row == {"a": None, "b": None, "c": 2.0, "not_finite": ["a", "b"]}
