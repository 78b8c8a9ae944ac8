"""Advantages and whitening against what TRL 1.12.0 computed (`record_trl_1_12.py`)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from llama2_chat.masked_stats import whiten
from llama2_chat.ppo.advantages import generalized_advantages

RECORD = json.loads(Path(__file__).with_name("trl_1_12_advantages.json").read_text(encoding="utf-8"))
CASES = RECORD["cases"]


def mask_of(case: dict) -> torch.Tensor:
    return torch.arange(len(case["values"][0])) < torch.tensor(case["lengths"])[:, None]


def test_the_record_is_trl_s_and_whole() -> None:
    assert RECORD["trl"] == "1.12.0"
    assert len(CASES) == 12
    assert sum("whitened" in case for case in CASES) == 9


@pytest.mark.parametrize("case", CASES)
def test_advantages_and_returns_equal_trl_s(case: dict) -> None:
    mask = mask_of(case)
    advantages, returns = generalized_advantages(
        torch.tensor(case["rewards"]),
        torch.tensor(case["values"]),
        response_mask=mask,
        discount=case["discount"],
        gae_lambda=case["gae_lambda"],
    )
    for ours, theirs in ((advantages, case["advantages"]), (returns, case["returns"])):
        torch.testing.assert_close(ours[mask], torch.tensor(theirs)[mask], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", [case for case in CASES if "whitened" in case])
def test_whitening_equals_trl_s_but_for_the_unbiased_variance(case: dict) -> None:
    """TRL divides by n − 1, we by n; what lies outside the mask it whitens as well, we leave 0."""
    mask, advantages = mask_of(case), torch.tensor(case["advantages"])
    count = int(mask.sum())
    theirs = torch.tensor(case["whitened"])
    ours = whiten(advantages, mask)
    factor = math.sqrt((count - 1) / count)
    torch.testing.assert_close(ours[mask] * factor, theirs[mask], rtol=1e-5, atol=1e-6)
    assert bool((ours[~mask] == 0).all())
    if bool((~mask).any()):
        assert bool((theirs[~mask] != 0).any())
    mean = advantages[mask].mean()
    around = whiten(advantages, mask, centre=False) - mean
    theirs_around = torch.tensor(case["whitened_around_the_mean"]) - mean
    torch.testing.assert_close(around[mask] * factor, theirs_around[mask], rtol=1e-4, atol=1e-5)
