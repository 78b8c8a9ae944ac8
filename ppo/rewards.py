"""From two reward models to one reward: the safety-gated combination. B responses."""

from __future__ import annotations

import math

import torch
from torch import Tensor


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
