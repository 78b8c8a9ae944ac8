"""The line of an iteration in `metrics.jsonl`: what its batch says of the policy, and what its steps did."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llama2_chat.generation.answers import Answer
from llama2_chat.masked_stats import masked_mean
from llama2_chat.ppo.experience import Experience
from llama2_chat.ppo.measures import explained_variance, logprob_difference, response_kl
from llama2_chat.ppo.rollout import raw_combined
from llama2_chat.reward.scoring import Score

STATUSES = ("complete", "cut_off", "empty", "chat_tag")
"""What becomes of a response; only the first is an answer."""

_OF_STEPS = (
    *("policy_loss", "value_loss", "clip_fraction", "ratio_mean", "ratio_max", "update_kl_nats"),
    *("policy_grad_norm", "value_grad_norm"),
)

Measures = dict[str, float | None]


def batch_measures(
    scores: Sequence[Score],
    answers: Sequence[Answer],
    rewards: Tensor,
    experience: Experience,
    kl_coefficient: float,
) -> Measures:
    """What an iteration's batch says of the policy and value model that it was sampled with.

    Args:
        rewards: (B,) R̃_c, as the responses were charged with it.
        kl_coefficient: β of this iteration.
    """
    mask, count = experience.mask, len(scores)
    k1_B, k3_B = response_kl(experience.logprobs, experience.reference_logprobs, response_mask=mask)
    kl, whitened = k1_B.mean().item(), rewards.mean().item()
    lengths_B = mask.sum(1).double()
    difference, largest = logprob_difference(
        experience.logprobs, sampled_logprobs(answers, mask), response_mask=mask
    )
    return {
        **score_means(scores),
        "whitened_score_mean": whitened,
        "kl_penalty_mean": kl_coefficient * kl,
        "reward_mean": whitened - kl_coefficient * kl,
        "kl_nats": kl,
        "kl_k3_nats": k3_B.mean().item(),
        "entropy_nats": -masked_mean(experience.logprobs, mask).item(),
        "explained_variance": explained_variance(experience.values, experience.returns, response_mask=mask),
        "response_tokens_mean": mask.sum().item() / count,
        "response_tokens_std": lengths_B.std(correction=0).item(),
        "incomplete_share": sum(answer.status != "complete" for answer in answers) / count,
        **status_shares(answers),
        "sampler_logprob_difference": difference,
        "sampler_logprob_difference_max": largest,
    }


def score_means(scores: Sequence[Score]) -> Measures:
    """Raw scores as measured: the mean of each reward model and of R_c, R_c's spread, how often safety decided."""
    count = len(scores)
    combined = [raw_combined(score) for score in scores]
    safety = [score.safety for score in scores if score.safety is not None]
    return {
        "score_mean": sum(combined) / count,
        "helpfulness_mean": sum(score.helpfulness for score in scores) / count,
        "safety_mean": sum(safety) / count if safety else None,
        "score_std": statistics.pstdev(combined),
        "safety_branch_share": sum(score.branch == "safety" for score in scores) / count,
    }


def status_shares(answers: Sequence[Answer]) -> Measures:
    """The share of each status among the answers; together 1."""
    return {
        f"{status}_share": sum(answer.status == status for answer in answers) / len(answers)
        for status in STATUSES
    }


def sampled_logprobs(answers: Sequence[Answer], mask: Tensor) -> Tensor:
    """(B, T) what the sampler gave each token, at temperature 1; 0 where the mask is False."""
    grid = torch.zeros(mask.shape, device=mask.device)
    grid[mask] = torch.tensor(
        [logprob for answer in answers for logprob in answer.response.logprobs], device=mask.device
    )
    return grid


def step_measures(steps: Sequence[Mapping[str, float]]) -> Measures:
    """Means over an iteration's gradient steps (the largest of a `_max`); None for what the warm-up does not do."""

    def over_steps(name: str) -> float:
        values = [step[name] for step in steps]
        return max(values) if name.endswith("_max") else sum(values) / len(values)

    # Of a trunk that both losses train `policy_loss` is the sum, and this the policy's part of it.
    names = [*_OF_STEPS, *(["surrogate_loss"] if "surrogate_loss" in steps[0] else [])]
    return {name: over_steps(name) if name in steps[0] else None for name in names}


def finite_row(measures: Mapping[str, Any]) -> dict[str, Any]:
    """The measures with null in place of NaN and infinities, which JSON has not, and `not_finite` naming them."""
    bad = [name for name, value in measures.items() if isinstance(value, float) and not math.isfinite(value)]
    row = {name: None if name in bad else value for name, value in measures.items()}
    return row | {"not_finite": bad} if bad else row
