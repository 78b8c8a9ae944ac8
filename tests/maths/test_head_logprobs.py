"""The head and its softmax in one step against torch's own operations."""

from __future__ import annotations

import pytest
import torch
from torch.overrides import TorchFunctionMode

from llama2_chat.logprobs import head_logprobs, token_logprobs


def inputs(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    states = torch.randn(rows, 6, generator=generator) * 3
    weight = torch.randn(11, 6, generator=generator)
    targets = torch.randint(11, (rows,), generator=generator)
    return states, weight, targets, torch.randn(rows, generator=generator)


@pytest.mark.parametrize("rows", [1, 5, 128, 300])  # below, at and above the rows that are read together
@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)])
def test_values_and_gradients_equal_log_softmax(rows: int, trained: tuple[bool, bool]) -> None:
    found = []
    for of in (head_logprobs, lambda s, w, t: token_logprobs(s @ w.t(), t)):
        states, weight, targets, upstream = inputs(rows)
        states.requires_grad_(trained[0])
        weight.requires_grad_(trained[1])
        logprobs = of(states, weight, targets)
        logprobs.backward(upstream)
        found.append((logprobs.detach(), states.grad, weight.grad))
    for ours, expected in zip(*found, strict=True):
        assert (ours is None) == (expected is None)
        if ours is not None:
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=2e-5)


def test_a_second_backward_is_refused() -> None:
    """The logits are used up by the first."""
    states, weight, targets, upstream = inputs(5)
    logprobs = head_logprobs(states.requires_grad_(), weight, targets)
    logprobs.backward(upstream, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logprobs.backward(upstream)


def test_with_and_without_gradients_the_bits_are_the_same() -> None:
    states, weight, targets, _ = inputs(300)
    with torch.no_grad():
        asked = head_logprobs(states, weight, targets)
    assert torch.equal(head_logprobs(states.requires_grad_(), weight, targets).detach(), asked)


def test_under_autocast_the_product_is_bfloat16_and_the_rest_float32() -> None:
    states, weight, targets, upstream = inputs(9)
    states.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logprobs = head_logprobs(states, weight, targets)
        expected = token_logprobs(torch.nn.functional.linear(states, weight), targets)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, expected, rtol=1e-6, atol=1e-6)
    (ours,) = torch.autograd.grad(logprobs, states, upstream)
    (theirs,) = torch.autograd.grad(expected, states, upstream)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.1)  # bfloat16 rounds to 3 digits


class Largest(TorchFunctionMode):
    """The most rows that any product had."""

    def __init__(self) -> None:
        self.rows = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.mm:
            self.rows = max(self.rows, len(result))
        return result


def test_without_gradients_no_tensor_holds_all_logits() -> None:
    states, weight, targets, _ = inputs(300)
    with torch.no_grad(), Largest() as largest:
        head_logprobs(states, weight, targets)
    assert 0 < largest.rows <= 128
