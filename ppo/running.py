"""What PPO carries from one iteration to the next besides its models: statistics of the scores, and β.

Pure values: an iteration makes new ones from the old, so a run that was stopped within it goes on from the old.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from llama2_chat.masked_stats import whiten

_MOST_ERROR = 0.2
"""Ziegler et al. clip the relative error of the KL to this."""


@dataclass(frozen=True, slots=True)
class RunningMoments:
    """Count, mean and summed squared deviations of all values so far."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    @property
    def variance(self) -> float:
        """Biased variance; 0 before the first value."""
        return self.squares / self.count if self.count else 0.0

    def merged(self, values: Tensor) -> RunningMoments:
        """The moments of the values so far and of `values` (any shape, at least one) together, in float64.

        Formula, with n_a, m_a, S_a so far and n_b, m_b, S_b of `values`, d = m_b - m_a and n = n_a + n_b:
            m = m_a + d n_b / n
            S = S_a + S_b + d^2 n_a n_b / n

        Source: Chan, Golub and LeVeque 1979, updating formulae for sample variances.
        """
        added = values.double()
        count = self.count + added.numel()
        mean = added.mean().item()
        distance = mean - self.mean
        squares = (added - mean).square().sum().item()
        return RunningMoments(
            count,
            self.mean + distance * added.numel() / count,
            self.squares + squares + distance**2 * self.count * added.numel() / count,
        )


def whiten_scores(
    scores: Tensor, seen: RunningMoments, *, over: Literal["batch", "running", "none"], eps: float = 1e-8
) -> Tensor:
    """R̃_c from raw scores: mean 0 and variance 1 over the batch, or by the statistics of all batches.

    Formula: (s - mean) / sqrt(variance + eps), biased variance, of this batch or of all batches so far.

    Args:
        scores: (B,).
        seen: Of all batches so far, this one included; in the first both choices agree.
        over: "none" leaves the scores as they are.
        eps: Added to the variance.

    Returns:
        (B,), in the dtype of `scores`.

    Source: §3.2.3 (whiten); over what, the paper does not say: docs/deviations.md.
    """
    if over == "none":
        return scores
    if over == "batch":
        return whiten(scores, torch.ones_like(scores, dtype=torch.bool), eps=eps)
    return ((scores.double() - seen.mean) / math.sqrt(seen.variance + eps)).to(scores.dtype)


def next_kl_coefficient(
    kl_coefficient: float, kl_nats: float, *, target: float, responses: int, horizon: int
) -> float:
    """β of the next iteration: larger where the policy is further from the reference than it should be.

    Formula: beta (1 + clip(KL / target - 1, -0.2, 0.2) responses / horizon).

    Args:
        kl_coefficient: beta of this iteration.
        kl_nats: Mean over its responses of log pi - log pi_0, summed over a response.
        target: The KL wanted, in nats, > 0.
        responses: In this iteration.
        horizon: Responses in which beta grows or shrinks by the error.

    Raises:
        ValueError: more responses than 5 horizons: one step could make beta negative.

    Source: Ziegler et al. 2019 (arXiv 1909.08593), section 2.2; §3.2.3 has a constant beta.
    """
    if responses * _MOST_ERROR >= horizon:
        raise ValueError(f"{responses} responses are too many for a horizon of {horizon}")
    error = min(max(kl_nats / target - 1, -_MOST_ERROR), _MOST_ERROR)
    return kl_coefficient * (1 + error * responses / horizon)


@dataclass(frozen=True, slots=True)
class RunningState:
    """What a checkpoint holds besides weights and optimisers."""

    kl_coefficient: float
    """β of the next iteration."""
    scores: RunningMoments = RunningMoments()
    """Of the scores of all iterations so far, unfit answers' replaced."""

    def with_scores(self, scores: Tensor) -> RunningState:
        """After the scores (B,) of another iteration."""
        return replace(self, scores=self.scores.merged(scores))

    def to_json(self) -> dict[str, Any]:
        """JSON values; floats come back to the bit."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RunningState:
        """What `to_json` gave."""
        return cls(values["kl_coefficient"], RunningMoments(**values["scores"]))
