"""Generalised advantage estimation against hand arithmetic, its definition as a double sum, and its limits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama2_chat.ppo.advantages import generalized_advantages

MASK = torch.tensor([[True, True, True, False], [False, True, True, False]])


def random_case(seed: int):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(4, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    starts = torch.randint(0, 4, (4, 1), generator=generator)
    ends = starts + torch.randint(1, 5, (4, 1), generator=generator)
    return rewards, values, (torch.arange(8) >= starts) & (torch.arange(8) < ends)


def slow(rewards, values, mask, discount: float, gae_lambda: float) -> torch.Tensor:
    """A_t = sum over k of (gamma lambda)^k delta_{t+k}: forwards, as the sum that defines it."""
    advantages = torch.zeros_like(rewards)
    for b, row in enumerate(mask.tolist()):
        inside = [t for t, counts in enumerate(row) if counts]
        for t in inside:
            for s in range(t, inside[-1] + 1):
                following = values[b, s + 1] if s < inside[-1] else 0.0
                delta = rewards[b, s] + discount * following - values[b, s]
                advantages[b, t] += (discount * gae_lambda) ** (s - t) * delta
    return advantages


def test_by_hand() -> None:
    rewards = torch.tensor([[0.0, 1.0, 2.0, 50.0], [50.0, 0.0, 4.0, 50.0]])
    values = torch.tensor([[1.0, 2.0, 3.0, 70.0], [70.0, 1.0, 2.0, 70.0]])
    advantages, returns = generalized_advantages(
        rewards, values, response_mask=MASK, discount=0.5, gae_lambda=0.5
    )
    # Row 0: delta_2 = 2 + 0 - 3 = -1, delta_1 = 1 + 0.5*3 - 2 = 0.5, delta_0 = 0 + 0.5*2 - 1 = 0;
    #        A_2 = -1, A_1 = 0.5 + 0.25*(-1) = 0.25, A_0 = 0 + 0.25*0.25 = 0.0625.
    # Row 1: delta_2 = 4 - 2 = 2, delta_1 = 0 + 0.5*2 - 1 = 0; A_2 = 2, A_1 = 0.25*2 = 0.5.
    assert advantages.tolist() == [[0.0625, 0.25, -1.0, 0.0], [0.0, 0.5, 2.0, 0.0]]
    assert returns.tolist() == [[1.0625, 2.25, 2.0, 0.0], [0.0, 1.5, 4.0, 0.0]]


@given(st.integers(0, 2**31), st.floats(0, 1), st.floats(0, 1))
def test_equals_the_definition(seed: int, discount: float, gae_lambda: float) -> None:
    rewards, values, mask = random_case(seed)
    advantages, returns = generalized_advantages(
        rewards, values, response_mask=mask, discount=discount, gae_lambda=gae_lambda
    )
    torch.testing.assert_close(
        advantages, slow(rewards, values, mask, discount, gae_lambda), rtol=1e-10, atol=1e-10
    )
    torch.testing.assert_close(returns, (advantages + values) * mask, rtol=1e-10, atol=1e-10)


@given(st.integers(0, 2**31))
def test_without_discount_and_lambda_1_it_is_the_return_to_go_minus_the_value(seed: int) -> None:
    rewards, values, mask = random_case(seed)
    _, returns = generalized_advantages(rewards, values, response_mask=mask, discount=1.0, gae_lambda=1.0)
    to_go = (rewards * mask).flip(1).cumsum(1).flip(1) * mask
    torch.testing.assert_close(returns, to_go, rtol=1e-10, atol=1e-10)


@given(st.integers(0, 2**31))
def test_lambda_0_is_the_one_step_error_and_right_values_have_no_advantage(seed: int) -> None:
    rewards, values, mask = random_case(seed)
    one_step, _ = generalized_advantages(rewards, values, response_mask=mask, discount=0.9, gae_lambda=0.0)
    torch.testing.assert_close(one_step, slow(rewards, values, mask, 0.9, 0.0), rtol=1e-10, atol=1e-10)
    to_go = (rewards * mask).flip(1).cumsum(1).flip(1)
    perfect, _ = generalized_advantages(rewards, to_go, response_mask=mask, discount=1.0, gae_lambda=0.95)
    torch.testing.assert_close(perfect, torch.zeros_like(perfect), rtol=0, atol=1e-10)


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_masked_junk_touches_neither_result_nor_gradient(junk: float) -> None:
    """Zeros outside the mask against NaN and infinities there: the same result and gradient."""

    def run(filling: float):
        torch.manual_seed(0)
        inputs = [
            torch.where(MASK, torch.randn(2, 4), torch.full((2, 4), filling)).requires_grad_()
            for _ in range(2)
        ]
        advantages, returns = generalized_advantages(
            *inputs, response_mask=MASK, discount=0.9, gae_lambda=0.8
        )
        ((advantages + 2 * returns) * torch.arange(8.0).view(2, 4)).sum().backward()
        return [advantages.detach(), returns.detach(), *(x.grad for x in inputs)]

    for clean, dirty in zip(run(0.0), run(junk), strict=True):
        torch.testing.assert_close(clean, dirty, rtol=0, atol=0)


def test_half_precision_is_rounded_once() -> None:
    torch.manual_seed(0)
    rewards, values = (torch.randn(2, 200).bfloat16() for _ in range(2))
    mask = torch.ones(2, 200, dtype=torch.bool)
    arguments = {"response_mask": mask, "discount": 1.0, "gae_lambda": 1.0}
    advantages, returns = generalized_advantages(rewards, values, **arguments)
    exact = generalized_advantages(rewards.double(), values.double(), **arguments)
    assert advantages.dtype == returns.dtype == torch.bfloat16
    # Half of bfloat16's spacing is 2^-9 of the value.
    for found, wanted in zip((advantages, returns), exact, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=2**-8, atol=1e-6)


def test_wrong_inputs_are_refused() -> None:
    x = torch.zeros(2, 4)
    arguments = {"discount": 1.0, "gae_lambda": 1.0}
    with pytest.raises(ValueError, match="values"):
        generalized_advantages(x, x[:, :1], response_mask=MASK, **arguments)
    with pytest.raises(ValueError, match="bool"):
        generalized_advantages(x, x, response_mask=MASK.float(), **arguments)
    with pytest.raises(ValueError, match=r"rows \[0\]"):
        generalized_advantages(
            x, x, response_mask=torch.tensor([[True, False, True, True], [True] * 4]), **arguments
        )
