"""What is measured of a batch of responses beside its losses. B responses, T response tokens, True masks count.

Ratios are written as differences of log-probabilities, so that nothing overflows before the last exp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llama2_chat.masked_stats import check_shapes, masked_mean


def response_kl(
    logprobs: Tensor, reference_logprobs: Tensor, *, response_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Two one-sample estimates of each response's KL to the reference, from tokens that the policy drew.

    Formula, with d = log pi_0 - log pi at each token: k1 = sum of -d; k3 = sum of exp(d) - 1 - d. Both have the mean
    KL(pi || pi_0); k1 is what the reward is charged with and may be negative, k3 never is and varies less.

    Args:
        logprobs: (B, T) log-probability of each token under the policy that drew it, in nats.
        reference_logprobs: (B, T) the same under pi_0.
        response_mask: bool (B, T).

    Returns:
        (k1, k3): (B,) each, in nats a response.

    Raises:
        ValueError: shapes differ or the mask is not bool.

    Source: Schulman 2020, "Approximating KL Divergence" (joschu.net/blog/kl-approx.html).
    """
    check_shapes(response_mask, logprobs=logprobs, reference_logprobs=reference_logprobs)
    differences_BT = _difference(reference_logprobs, logprobs, response_mask)
    return -differences_BT.sum(1), (torch.expm1(differences_BT) - differences_BT).sum(1)


def update_measures(logprobs: Tensor, old_logprobs: Tensor, *, response_mask: Tensor) -> dict[str, Tensor]:
    """How far the policy in training is from the one that drew the batch, over all True tokens together.

    Formula, with rho = exp(logprobs - old_logprobs): the mean and the largest rho, and the mean of
    rho - 1 - log rho, an estimate of KL(old || new) a token that is never negative.

    Args:
        logprobs: (B, T) under the policy in training, in nats.
        old_logprobs: (B, T) when the batch was drawn.
        response_mask: bool (B, T).

    Returns:
        Scalars: `ratio_mean`, `ratio_max`, `update_kl_nats`.

    Raises:
        ValueError: shapes differ, the mask is not bool or selects nothing.

    Source: as `response_kl`; here the old policy drew the tokens, so the ratio stands the other way round.
    """
    check_shapes(response_mask, logprobs=logprobs, old_logprobs=old_logprobs)
    log_ratios_BT = _difference(logprobs, old_logprobs, response_mask)
    ratios_BT = log_ratios_BT.exp()
    return {
        "ratio_mean": masked_mean(ratios_BT, response_mask),
        "ratio_max": torch.where(response_mask, ratios_BT, 0.0).amax(),
        "update_kl_nats": masked_mean(torch.expm1(log_ratios_BT) - log_ratios_BT, response_mask),
    }


def explained_variance(values: Tensor, returns: Tensor, *, response_mask: Tensor) -> float:
    """The share of the returns' variance that the values account for.

    Formula: 1 - Var(returns - values) / Var(returns) over all True tokens; 1 is perfect, 0 as good as a constant,
    below 0 worse. 0 where the returns do not vary.

    Args:
        values: (B, T).
        returns: (B, T).
        response_mask: bool (B, T).

    Raises:
        ValueError: shapes differ or the mask is not bool.
    """
    check_shapes(response_mask, values=values, returns=returns)
    errors, spread = (returns - values)[response_mask], returns[response_mask].var(correction=0)
    return (1 - errors.var(correction=0) / spread).item() if spread > 0 else 0.0


def logprob_difference(logprobs: Tensor, other: Tensor, *, response_mask: Tensor) -> tuple[float, float]:
    """How far two computations of the same log-probabilities are apart.

    Formula: mean and maximum of |logprobs - other| over all True tokens.

    Args:
        logprobs: (B, T) in nats.
        other: (B, T) the same tokens, computed by other code.
        response_mask: bool (B, T).

    Returns:
        (mean, maximum) in nats a token.

    Raises:
        ValueError: shapes differ, the mask is not bool or selects nothing.
    """
    check_shapes(response_mask, logprobs=logprobs, other=other)
    distances_BT = _difference(logprobs, other, response_mask).abs()
    return masked_mean(distances_BT, response_mask).item(), distances_BT.max().item()


def _difference(left: Tensor, right: Tensor, mask: Tensor) -> Tensor:
    """left - right in float64, 0 where the mask is False, whatever stands there.

    exp(d) - 1 - d is about d^2 / 2, of which float32 leaves little where a step has moved the policy by 1e-3.
    """
    return torch.where(mask, left, 0.0).double() - torch.where(mask, right, 0.0).double()
