"""What is measured beside PPO's losses: by hand, as loops from the definition, against exact expectations."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama2_chat.ppo.measures import explained_variance, logprob_difference, response_kl, update_measures

MASK = torch.tensor([[True, True, True], [True, False, False]])
ANYTHING = math.nan
"""What may stand outside the mask."""


def grid(values: list[list[float]]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_kl_of_responses_by_hand() -> None:
    logprobs = grid([[math.log(0.5), math.log(0.25), -1.0], [math.log(0.2), ANYTHING, math.inf]])
    reference = grid([[math.log(0.25), math.log(0.5), -1.0], [math.log(0.1), -math.inf, ANYTHING]])
    k1, k3 = response_kl(logprobs, reference, response_mask=MASK)
    # Ratios pi_0 / pi: 1/2, 2, 1 and 1/2. k1: log 2 - log 2 + 0; log 2.
    assert k1.tolist() == pytest.approx([0.0, math.log(2)], abs=1e-12)
    # r - 1 - log r: (-1/2 + log 2) + (1 - log 2) + 0 = 1/2; -1/2 + log 2.
    assert k3.tolist() == pytest.approx([0.5, math.log(2) - 0.5], abs=1e-12)


def test_both_estimates_have_the_mean_kl() -> None:
    """Their expectation over a small vocabulary, taken exactly, against KL(pi || pi_0) from its definition."""
    policy = torch.tensor([0.6, 0.25, 0.1, 0.05], dtype=torch.float64)
    reference = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64)
    exact = sum(p * math.log(p / q) for p, q in zip(policy.tolist(), reference.tolist(), strict=True))
    mask = torch.ones(4, 1, dtype=torch.bool)
    k1, k3 = response_kl(policy.log()[:, None], reference.log()[:, None], response_mask=mask)
    assert (policy * k1).sum().item() == pytest.approx(exact, rel=1e-12)
    assert (policy * k3).sum().item() == pytest.approx(exact, rel=1e-12)
    assert bool((k3 >= 0).all())
    # Less spread around the mean: what k3 is for.
    variance = [(policy * (k - exact).square()).sum().item() for k in (k1, k3)]
    assert variance[1] < variance[0]


def test_update_by_hand() -> None:
    logprobs = grid([[math.log(1.5), math.log(0.5), 0.0], [math.log(2.0), 90.0, ANYTHING]]) - 3
    old = torch.where(MASK, -3.0, ANYTHING).double()
    found = {name: value.item() for name, value in update_measures(logprobs, old, response_mask=MASK).items()}
    # Ratios 1.5, 0.5, 1 and 2.
    kl = (0.5 - math.log(1.5)) + (-0.5 - math.log(0.5)) + 0.0 + (1.0 - math.log(2.0))
    assert found == pytest.approx(
        {"ratio_mean": 5.0 / 4, "ratio_max": 2.0, "update_kl_nats": kl / 4}, rel=1e-12
    )


def test_nothing_has_moved() -> None:
    logprobs = -torch.rand(2, 3)
    found = {n: v.item() for n, v in update_measures(logprobs, logprobs, response_mask=MASK).items()}
    assert found == {"ratio_mean": 1.0, "ratio_max": 1.0, "update_kl_nats": 0.0}


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 6))
def test_update_equals_the_definition(seed: int, rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    new, old = torch.randn(2, rows, columns, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, columns, generator=generator) < 0.6
    mask[0, 0] = True
    places = mask.nonzero().tolist()
    ratios = [math.exp(new[b, t].item()) / math.exp(old[b, t].item()) for b, t in places]
    found = update_measures(new, old, response_mask=mask)
    assert found["ratio_mean"].item() == pytest.approx(sum(ratios) / len(ratios), rel=1e-9)
    assert found["ratio_max"].item() == pytest.approx(max(ratios), rel=1e-9)
    terms = [r - 1 - math.log(r) for r in ratios]
    assert found["update_kl_nats"].item() == pytest.approx(sum(terms) / len(terms), rel=1e-9, abs=1e-12)


def test_explained_variance_by_hand() -> None:
    returns = grid([[1.0, 2.0, 3.0], [2.0, ANYTHING, ANYTHING]])
    values = grid([[1.0, 2.0, 2.0], [2.0, ANYTHING, ANYTHING]])
    # Variance of 1, 2, 3, 2: 1/2. Errors 0, 0, 1, 0: 3/16.
    assert explained_variance(values, returns, response_mask=MASK) == pytest.approx(1 - (3 / 16) / 0.5)
    assert explained_variance(returns, returns, response_mask=MASK) == 1.0
    assert explained_variance(returns * 0 + 7.0, returns, response_mask=MASK) == 0.0
    assert explained_variance(-returns, returns, response_mask=MASK) < 0.0
    assert explained_variance(values, returns * 0 + 1.0, response_mask=MASK) == 0.0


def test_difference_of_sampler_and_trainer_by_hand() -> None:
    left = grid([[-1.0, -2.0, -3.0], [-4.0, ANYTHING, 5.0]])
    right = grid([[-1.0, -2.5, -2.0], [-4.1, 0.0, 99.0]])
    mean, largest = logprob_difference(left, right, response_mask=MASK)
    assert (mean, largest) == pytest.approx(((0.0 + 0.5 + 1.0 + 0.1) / 4, 1.0), rel=1e-12)
    assert logprob_difference(left, left, response_mask=MASK) == (0.0, 0.0)


@pytest.mark.parametrize(
    "measure",
    [
        lambda a, mask: response_kl(a, MASK.float(), response_mask=mask),
        lambda a, mask: update_measures(a, MASK.float(), response_mask=mask),
        lambda a, mask: explained_variance(a, MASK.float(), response_mask=mask),
        lambda a, mask: logprob_difference(a, MASK.float(), response_mask=mask),
    ],
)
def test_wrong_shapes_and_masks_are_refused(measure) -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        measure(torch.zeros(3), MASK)
    with pytest.raises(ValueError, match="must be bool"):
        measure(torch.zeros(2, 3), MASK.float())
