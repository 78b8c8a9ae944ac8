"""masked_mean and whiten against hand arithmetic, and masked junk that must not matter."""

import math

import pytest
import torch

from llama2_chat.masked_stats import masked_mean, whiten

X = torch.tensor([[1.0, 2.0, 100.0], [6.0, -100.0, -100.0]])
MASK = torch.tensor([[True, True, False], [True, False, False]])


def test_mean_is_over_all_tokens_not_over_row_means() -> None:
    """Rows of unequal length: the mean of all tokens by hand, against which a mean of row means differs."""
    # (1 + 2 + 6) / 3 = 3; the mean of row means would be (1.5 + 6) / 2 = 3.75.
    assert masked_mean(X, MASK).item() == 3.0


def test_whiten_by_hand() -> None:
    """Mean and biased variance worked out by hand."""
    # mean 3, deviations -2, -1, 3; biased variance (4 + 1 + 9) / 3 = 14/3.
    scale = math.sqrt(14 / 3)
    expected = torch.tensor([[-2 / scale, -1 / scale, 0.0], [3 / scale, 0.0, 0.0]])
    torch.testing.assert_close(whiten(X, MASK), expected, rtol=1e-6, atol=1e-6)


def test_whiten_without_centring_adds_the_mean_back_only_inside_the_mask() -> None:
    """The whitened values plus the mean, zero outside the mask."""
    scale = math.sqrt(14 / 3)
    expected = torch.tensor([[3 - 2 / scale, 3 - 1 / scale, 0.0], [3 + 3 / scale, 0.0, 0.0]])
    torch.testing.assert_close(whiten(X, MASK, centre=False), expected, rtol=1e-6, atol=1e-6)


def test_eps_stands_inside_the_root() -> None:
    """A variance as small as eps, by hand."""
    x, mask = torch.tensor([1.0, 3.0]), torch.tensor([True, True])
    # variance 1, eps 3: (x - 2) / sqrt(4)
    torch.testing.assert_close(whiten(x, mask, eps=3.0), torch.tensor([-0.5, 0.5]), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_masked_junk_touches_neither_result_nor_gradient(junk: float) -> None:
    """Zeros outside the mask against NaN and infinities there: the same result and gradient."""
    clean = X.clone().requires_grad_()
    dirty = torch.where(MASK, X, torch.full_like(X, junk)).requires_grad_()
    for function in (masked_mean, whiten, lambda x, m: whiten(x, m, centre=False)):
        results = []
        for x in (clean, dirty):
            x.grad = None
            result = function(x, MASK)
            (result * torch.arange(1.0, 1.0 + result.numel()).view(result.shape)).sum().backward()
            results.append((result.detach(), x.grad.clone()))
        torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=0)
        torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=0)


@pytest.mark.parametrize("function", [masked_mean, whiten])
def test_wrong_masks_are_refused(function) -> None:
    """Masks that are not bool, of another shape, or empty, against the documented errors."""
    with pytest.raises(ValueError, match="bool"):
        function(X, MASK.float())
    with pytest.raises(ValueError, match="shape"):
        function(X, MASK[:1])
    with pytest.raises(ValueError, match="no position"):
        function(X, torch.zeros_like(MASK))
