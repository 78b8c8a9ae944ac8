"""PPO's two clipped losses. B responses, T response tokens; a mask is True where a token counts."""

from __future__ import annotations

import torch
from torch import Tensor

from llama2_chat.masked_stats import check_shapes, masked_mean


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, response_mask: Tensor, clip_range: float
) -> tuple[Tensor, Tensor]:
    """The clipped surrogate objective, as a loss.

    Formula: -mean of min(rho A, clip(rho, 1 - epsilon, 1 + epsilon) A) with rho = exp(logprobs - old_logprobs),
    over all True tokens together.

    Args:
        logprobs: (B, T) log-probability of each token under the policy that is trained, in nats.
        old_logprobs: (B, T) the same under the policy as it was when the batch was sampled.
        advantages: (B, T).
        response_mask: bool (B, T).
        clip_range: epsilon > 0.

    Returns:
        (loss, clip_fraction): scalars; the share of True tokens where clip(rho) A < rho A, that is, where the
        clipping takes effect and the token gives no gradient.

    Raises:
        ValueError: shapes differ, the mask is not bool or selects nothing.

    Source: Schulman et al. 2017 (arXiv 1707.06347), equation 7; §3.2.3 (clip 0.2).
    """
    check_shapes(response_mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    ratios = torch.exp(_inside(logprobs, response_mask) - _inside(old_logprobs, response_mask))
    advantages = _inside(advantages, response_mask)
    plain = ratios * advantages
    clipped = ratios.clamp(1 - clip_range, 1 + clip_range) * advantages
    loss = -masked_mean(torch.minimum(plain, clipped), response_mask)
    return loss, masked_mean((clipped < plain).float(), response_mask)


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, *, response_mask: Tensor, clip_range: float
) -> Tensor:
    """Squared error of the values, which may leave the old ones by no more than the clip range at a gain.

    Formula: 0.5 mean of max((V - R)^2, (V_old + clip(V - V_old, -epsilon, epsilon) - R)^2), over all True
    tokens together.

    Args:
        values: (B, T) values of the model that is trained.
        old_values: (B, T) the same when the batch was sampled.
        returns: (B, T) what the values should be.
        response_mask: bool (B, T).
        clip_range: epsilon > 0, in the unit of the values.

    Returns:
        A scalar tensor.

    Raises:
        ValueError: shapes differ, the mask is not bool or selects nothing.

    Source: the reference implementation of PPO (openai/baselines, ppo2); the paper names no value loss.
    """
    check_shapes(response_mask, values=values, old_values=old_values, returns=returns)
    values, old_values, returns = (_inside(x, response_mask) for x in (values, old_values, returns))
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    squares = torch.maximum((values - returns).square(), (clipped - returns).square())
    return 0.5 * masked_mean(squares, response_mask)


def _inside(x: Tensor, mask: Tensor) -> Tensor:
    """0 where the mask is False, so that whatever stands there reaches neither result nor gradient."""
    return torch.where(mask, x, torch.zeros_like(x))
