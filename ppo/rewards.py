"""From two reward models to the reward of each token: the safety-gated combination, then the KL penalty.

B responses, T response tokens; a mask is True where a token counts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llama2_chat.masked_stats import check_shapes


def combine_scores(
    helpfulness_scores: Tensor, safety_scores: Tensor, *, is_safety: Tensor, safety_threshold: float = 0.15
) -> tuple[Tensor, Tensor]:
    """R_c: the safety score where the prompt is tagged or the response looks unsafe, else helpfulness.

    Formula: use safety where is_safety or sigmoid(safety) < threshold (strictly). Raw scores go in and
    come out; the comparison is made on them, as safety < logit(threshold), so that nothing saturates.

    Args:
        helpfulness_scores: (B,) raw scores (logits).
        safety_scores: (B,) raw scores.
        is_safety: bool (B,), True where the prompt is tagged as a safety prompt.
        safety_threshold: Probability in (0, 1).

    Returns:
        (scores, used_safety): (B,) raw combined scores and bool (B,), True where the safety branch was taken.

    Raises:
        ValueError: shapes differ, `is_safety` is not bool, or the threshold is outside (0, 1).

    Source: §3.2.3, the definition of R_c.
    """
    if not helpfulness_scores.shape == safety_scores.shape == is_safety.shape:
        raise ValueError(
            f"helpfulness {tuple(helpfulness_scores.shape)}, safety {tuple(safety_scores.shape)} and is_safety "
            f"{tuple(is_safety.shape)} differ in shape"
        )
    if is_safety.dtype != torch.bool:
        raise ValueError(f"is_safety must be bool, got {is_safety.dtype}")
    if not 0 < safety_threshold < 1:
        raise ValueError(f"safety_threshold must lie in (0, 1), got {safety_threshold}")
    used_safety = is_safety | (safety_scores < math.log(safety_threshold / (1 - safety_threshold)))
    return torch.where(used_safety, safety_scores, helpfulness_scores), used_safety


def token_rewards(
    logprobs: Tensor,
    reference_logprobs: Tensor,
    scores: Tensor,
    *,
    response_mask: Tensor,
    kl_coefficient: float,
) -> Tensor:
    """The reward of each response token: a KL penalty everywhere, the response's score at its last token.

    Formula: r_t = -beta (log pi(a_t) - log pi_0(a_t)), plus the score where t is the last True position. Summed
    over a response this is R(g | p) with a one-sample estimate of its KL term.

    Args:
        logprobs: (B, T) log-probability of each token under the policy that sampled it, in nats.
        reference_logprobs: (B, T) the same under pi_0.
        scores: (B,) one score a response, whitened or not.
        response_mask: bool (B, T), one contiguous run of True in each row.
        kl_coefficient: beta.

    Returns:
        (B, T) rewards; 0 where the mask is False.

    Raises:
        ValueError: shapes differ, the mask is not bool, or a row's True positions are none or not contiguous.

    Source: §3.2.3, R(g | p) = R~_c(g | p) - beta D_KL(pi_theta || pi_0).
    """
    check_response_mask(response_mask, logprobs=logprobs, reference_logprobs=reference_logprobs)
    if scores.shape != response_mask.shape[:1]:
        raise ValueError(f"scores {tuple(scores.shape)} must hold one score for each of {len(logprobs)} rows")
    zeros = torch.zeros_like(logprobs)
    log_ratios = torch.where(response_mask, logprobs, zeros) - torch.where(
        response_mask, reference_logprobs, zeros
    )
    followed = torch.zeros_like(response_mask)
    followed[:, :-1] = response_mask[:, 1:]
    is_last = response_mask & ~followed
    return -kl_coefficient * log_ratios + torch.where(is_last, scores.unsqueeze(1), 0.0)


def check_response_mask(response_mask: Tensor, **tensors: Tensor) -> None:
    """Refuse what is not one contiguous run of True in each row, or tensors of another shape.

    Raises:
        ValueError: the mask is not bool (B, T), a row has no True position or a gap, or shapes differ.
    """
    if response_mask.dim() != 2:
        raise ValueError(f"response_mask must be (B, T), got {tuple(response_mask.shape)}")
    check_shapes(response_mask, **tensors)
    starts = response_mask.clone()
    starts[:, 1:] &= ~response_mask[:, :-1]
    wrong = (starts.sum(1) != 1).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(f"each row of response_mask needs one contiguous run of True; rows {wrong} have not")
