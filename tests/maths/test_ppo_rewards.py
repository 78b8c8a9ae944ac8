"""Token rewards: the KL penalty at every response token, the score at the last one."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama2_chat.ppo.rewards import token_rewards

MASK = torch.tensor([[True, True, True, False], [False, True, True, False]])


def slow(logprobs, reference_logprobs, scores, mask, beta) -> list[list[float]]:
    """The definition, token by token."""
    rows = []
    for b, row in enumerate(mask.tolist()):
        last = max(t for t, inside in enumerate(row) if inside)
        rows.append(
            [
                -beta * (logprobs[b][t].item() - reference_logprobs[b][t].item())
                + (scores[b].item() if t == last else 0.0)
                if inside
                else 0.0
                for t, inside in enumerate(row)
            ]
        )
    return rows


def test_by_hand() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, -0.5, 9.0], [9.0, -1.0, -3.0, 9.0]])
    reference = torch.tensor([[-1.5, -1.0, -0.5, 7.0], [7.0, -2.0, -2.0, 7.0]])
    rewards = token_rewards(
        logprobs, reference, torch.tensor([2.0, -1.0]), response_mask=MASK, kl_coefficient=0.1
    )
    # log-ratios 0.5, -1, 0 and 1, -1: a token that the policy likes more than pi_0 does costs reward.
    expected = [[-0.05, 0.1, 0.0 + 2.0, 0.0], [0.0, -0.1, 0.1 - 1.0, 0.0]]
    torch.testing.assert_close(rewards, torch.tensor(expected), rtol=1e-6, atol=1e-7)


@given(st.integers(0, 2**31), st.floats(0, 1))
def test_equals_the_definition_and_sums_to_the_objective(seed: int, beta: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logprobs, reference = (torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    scores = torch.randn(5, generator=generator, dtype=torch.float64)
    starts = torch.randint(0, 4, (5, 1), generator=generator)
    ends = starts + torch.randint(1, 4, (5, 1), generator=generator)
    mask = (torch.arange(7) >= starts) & (torch.arange(7) < ends)
    rewards = token_rewards(logprobs, reference, scores, response_mask=mask, kl_coefficient=beta)
    expected = torch.tensor(slow(logprobs, reference, scores, mask, beta), dtype=torch.float64)
    torch.testing.assert_close(rewards, expected, rtol=1e-12, atol=1e-12)
    kl = ((logprobs - reference) * mask).sum(1)
    torch.testing.assert_close(rewards.sum(1), scores - beta * kl, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_masked_junk_touches_neither_result_nor_gradient(junk: float) -> None:
    """Zeros outside the mask against NaN and infinities there: the same result and gradient."""

    def run(filling: float):
        torch.manual_seed(0)
        inputs = [
            torch.where(MASK, torch.randn(2, 4), torch.full((2, 4), filling)).requires_grad_()
            for _ in range(2)
        ]
        scores = torch.randn(2, requires_grad=True)
        rewards = token_rewards(*inputs, scores, response_mask=MASK, kl_coefficient=0.3)
        (rewards * torch.arange(8.0).view(2, 4)).sum().backward()
        return [rewards.detach(), scores.grad, *(x.grad for x in inputs)]

    for clean, dirty in zip(run(0.0), run(junk), strict=True):
        torch.testing.assert_close(clean, dirty, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_keeps_the_dtype(dtype: torch.dtype) -> None:
    x = torch.zeros(2, 4, dtype=dtype)
    rewards = token_rewards(x, x, x[:, 0], response_mask=MASK, kl_coefficient=0.1)
    assert rewards.dtype == dtype


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (MASK.float(), "bool"),
        (MASK[:, :3], "shape"),
        (MASK[0], "B, T"),
        (torch.tensor([[True, True, True, True], [False] * 4]), r"rows \[1\]"),
        (torch.tensor([[True, False, True, True], [True] * 4]), r"rows \[0\]"),
        (torch.tensor([[True] * 4, [True, True, False, True]]), r"rows \[1\]"),
    ],
)
def test_wrong_masks_are_refused(mask: torch.Tensor, message: str) -> None:
    """Masks that are not one run of True a row, against the documented errors."""
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=message):
        token_rewards(x, x, torch.zeros(2), response_mask=mask, kl_coefficient=0.1)


def test_wrong_shapes_are_refused() -> None:
    x, scores = torch.zeros(2, 4), torch.zeros(2)
    with pytest.raises(ValueError, match="scores"):
        token_rewards(x, x, scores.unsqueeze(1), response_mask=MASK, kl_coefficient=0.1)
    with pytest.raises(ValueError, match="reference_logprobs"):
        token_rewards(x, x[:1], scores, response_mask=MASK, kl_coefficient=0.1)
