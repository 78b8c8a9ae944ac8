"""Generalised advantage estimation. B responses, T response tokens; a mask is True where a token counts."""

from __future__ import annotations

import torch
from torch import Tensor

from llama2_chat.ppo.rewards import check_response_mask


def generalized_advantages(
    rewards: Tensor, values: Tensor, *, response_mask: Tensor, discount: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """How much better each token was than expected, and the return that the value model learns.

    Formula, backwards over the tokens of a response:
        delta_t = r_t + gamma V_{t+1} - V_t
        A_t = delta_t + gamma lambda A_{t+1}
        returns = A + V
    with V = 0 and A = 0 after the last response token: the response ends there, it is not cut off.

    Args:
        rewards: (B, T) reward of each token.
        values: (B, T) V_t, the expected return from the state before token t on.
        response_mask: bool (B, T), one contiguous run of True in each row.
        discount: gamma in [0, 1].
        gae_lambda: lambda in [0, 1]; 1 gives returns-to-go minus V, 0 the one-step error delta.

    Returns:
        (advantages, returns): (B, T) each, before any whitening; 0 where the mask is False.

    Raises:
        ValueError: shapes differ, the mask is not bool, or a row's True positions are none or not contiguous.

    Source: Schulman et al. 2016 (arXiv 1506.02438), equation 16. §3.2.3 names PPO without gamma and lambda:
    docs/deviations.md.
    """
    check_response_mask(response_mask, rewards=rewards, values=values)
    rewards = torch.where(response_mask, rewards, torch.zeros_like(rewards))
    values = torch.where(response_mask, values, torch.zeros_like(values))
    dtype = torch.promote_types(rewards.dtype, values.dtype)
    working = torch.promote_types(
        dtype, torch.float32
    )  # sums over a response lose too much in half precision
    rewards_BT, values_BT = rewards.to(working), values.to(working)
    following_B = torch.zeros_like(values_BT[:, 0])
    advantage_B = torch.zeros_like(following_B)
    backwards = []
    for t in range(values_BT.shape[1] - 1, -1, -1):
        delta_B = rewards_BT[:, t] + discount * following_B - values_BT[:, t]
        advantage_B = torch.where(
            response_mask[:, t], delta_B + discount * gae_lambda * advantage_B, torch.zeros_like(delta_B)
        )
        following_B = values_BT[:, t]
        backwards.append(advantage_B)
    advantages_BT = torch.stack(backwards[::-1], dim=1)
    returns_BT = advantages_BT + values_BT
    return advantages_BT.to(dtype), returns_BT.to(dtype)
