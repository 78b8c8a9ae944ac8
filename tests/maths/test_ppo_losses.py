"""PPO's clipped losses: every side of the clipping by hand, the definition as a loop, gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama2_chat.ppo.losses import policy_loss, value_loss

MASK = torch.tensor([[True, True, True], [True, False, False]])


def grid(values: list[list[float]]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_policy_loss_by_hand() -> None:
    logprobs = grid([[math.log(1.5), math.log(0.5), math.log(1.5)], [math.log(0.5), 0.0, 0.0]])
    advantages = grid([[2.0, 2.0, -2.0], [-2.0, 9.0, 9.0]])
    loss, clipped = policy_loss(
        logprobs, torch.zeros_like(logprobs), advantages, response_mask=MASK, clip_range=0.2
    )
    # ratio 1.5, A 2: min(3, 1.2*2) = 2.4, clipped; ratio 0.5, A 2: min(1, 0.8*2) = 1;
    # ratio 1.5, A -2: min(-3, -2.4) = -3; ratio 0.5, A -2: min(-1, 0.8*-2) = -1.6, clipped.
    assert loss.item() == pytest.approx(-(2.4 + 1.0 - 3.0 - 1.6) / 4, rel=1e-12)
    assert clipped.item() == 2 / 4


def test_value_loss_by_hand() -> None:
    values = grid([[1.0, 1.0, 0.1], [-1.0, 50.0, 50.0]])
    returns = grid([[2.0, -1.0, 1.0], [-1.0, 9.0, 9.0]])
    loss = value_loss(values, torch.zeros_like(values), returns, response_mask=MASK, clip_range=0.2)
    # The clipped values are 0.2, 0.2, 0.1, -0.2. Larger squares: (0.2-2)^2 = 3.24 over (1-2)^2;
    # (1+1)^2 = 4 over (0.2+1)^2; (0.1-1)^2 = 0.81 twice; (-0.2+1)^2 = 0.64 over 0.
    assert loss.item() == pytest.approx(0.5 * (3.24 + 4.0 + 0.81 + 0.64) / 4, rel=1e-12)


def slow_policy_loss(logprobs, old, advantages, mask, clip: float) -> tuple[float, float]:
    terms, clipped = [], 0
    for b, t in mask.nonzero().tolist():
        ratio = math.exp(logprobs[b, t].item() - old[b, t].item())
        advantage = advantages[b, t].item()
        held = max(1 - clip, min(1 + clip, ratio))
        terms.append(min(ratio * advantage, held * advantage))
        clipped += held * advantage < ratio * advantage
    return -sum(terms) / len(terms), clipped / len(terms)


def slow_value_loss(values, old, returns, mask, clip: float) -> float:
    terms = []
    for b, t in mask.nonzero().tolist():
        v, before, target = (x[b, t].item() for x in (values, old, returns))
        held = max(before - clip, min(before + clip, v))
        terms.append(max((v - target) ** 2, (held - target) ** 2))
    return 0.5 * sum(terms) / len(terms)


@given(st.integers(0, 2**31), st.floats(0.01, 0.9))
def test_both_equal_their_definitions(seed: int, clip: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b, c = (torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(4, 6, generator=generator) < 0.5
    mask[0, 0] = True
    loss, clipped = policy_loss(a, b, c, response_mask=mask, clip_range=clip)
    expected = slow_policy_loss(a, b, c, mask, clip)
    assert (loss.item(), clipped.item()) == pytest.approx(expected, rel=1e-6)
    found = value_loss(a, b, c, response_mask=mask, clip_range=clip).item()
    assert found == pytest.approx(slow_value_loss(a, b, c, mask, clip), rel=1e-9)


def test_at_the_old_policy_the_gradient_is_the_policy_gradient() -> None:
    logprobs = grid([[-1.0, -2.0, -3.0], [-4.0, 0.0, 0.0]]).requires_grad_()
    advantages = grid([[1.0, -2.0, 3.0], [0.5, 9.0, 9.0]])
    loss, clipped = policy_loss(logprobs, logprobs.detach(), advantages, response_mask=MASK, clip_range=0.2)
    loss.backward()
    assert clipped.item() == 0.0
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, -advantages * MASK / 4)


def test_a_clipped_token_has_no_gradient() -> None:
    logprobs = grid([[math.log(1.5), math.log(0.5)]]).requires_grad_()
    mask = torch.ones(1, 2, dtype=torch.bool)
    policy_loss(logprobs, torch.zeros(1, 2).double(), grid([[1.0, 1.0]]), response_mask=mask, clip_range=0.2)[
        0
    ].backward()
    # Only the second: its ratio fell while its advantage says rise.
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, grid([[0.0, -0.5 / 2]]))
    values = grid([[1.0, 1.0]]).requires_grad_()
    value_loss(
        values, torch.zeros(1, 2).double(), grid([[2.0, -1.0]]), response_mask=mask, clip_range=0.2
    ).backward()
    # The first moved past the range towards its return; the second away from it.
    assert values.grad is not None
    torch.testing.assert_close(values.grad, grid([[0.0, (1.0 + 1.0) / 2]]))


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("loss", ["policy", "value"])
def test_masked_junk_touches_neither_result_nor_gradient(junk: float, loss: str) -> None:
    """Zeros outside the mask against NaN and infinities there: the same result and gradient."""

    def run(filling: float):
        torch.manual_seed(0)
        inputs = [
            torch.where(MASK, torch.randn(2, 3), torch.full((2, 3), filling)).requires_grad_()
            for _ in range(3)
        ]
        result = (
            policy_loss(*inputs, response_mask=MASK, clip_range=0.2)[0]
            if loss == "policy"
            else value_loss(*inputs, response_mask=MASK, clip_range=0.2)
        )
        result.backward()
        return [result.detach(), *(x.grad for x in inputs)]

    for clean, dirty in zip(run(0.0), run(junk), strict=True):
        torch.testing.assert_close(clean, dirty, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_any_float_dtype(dtype: torch.dtype) -> None:
    x = torch.zeros(2, 3, dtype=dtype)
    loss, clipped = policy_loss(x, x, x + 1, response_mask=MASK, clip_range=0.2)
    assert (loss.item(), clipped.item(), loss.dtype) == (-1.0, 0.0, dtype)
    squared = value_loss(x, x, x + 1, response_mask=MASK, clip_range=0.2)
    assert (squared.item(), squared.dtype) == (0.5, dtype)


def test_wrong_inputs_are_refused() -> None:
    x = torch.zeros(2, 3)
    for function in (policy_loss, value_loss):
        for place in range(3):
            inputs = [x, x, x]
            inputs[place] = x[:, :1]
            with pytest.raises(ValueError, match="shape"):
                function(*inputs, response_mask=MASK, clip_range=0.2)
        with pytest.raises(ValueError, match="bool"):
            function(x, x, x, response_mask=MASK.float(), clip_range=0.2)
        with pytest.raises(ValueError, match="no position"):
            function(x, x, x, response_mask=torch.zeros_like(MASK), clip_range=0.2)
