"""recipes/tiny/sampling.yaml on three seeds: what docs/results/sampling.md says of sampling and holds on each."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from llama2_chat.recipes.tiny.sampling_tables import RARE, main, searched
from llama2_chat.rejection_sampling.best_of import expected_maximum, true_score_of_best

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def whole_run(finished_run: Callable[..., Path]) -> Path:
    """A finished run of all seeds; with LLAMA2_CHAT_SAMPLING_RUN the one that is kept there, as it is."""
    kept = os.environ.get("LLAMA2_CHAT_SAMPLING_RUN")
    return Path(kept) if kept else finished_run("sampling.yaml")


def evaluation(run: Path, policy: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())["evaluation"][policy]
    return found


def test_the_true_score_of_the_best_rises_with_n(run: Path) -> None:
    """Of the SFT policy at temperature 1, up to n = 8; means over all subsets of n."""
    rewards, truths = searched(run, "sft")[1.0]
    best = [true_score_of_best(rewards, truths, size=n).mean().item() for n in (1, 2, 4, 8)]
    assert all(later > earlier + 0.02 for earlier, later in pairwise(best))
    highest = [expected_maximum(rewards, size=n).mean().item() for n in (1, 2, 4, 8, 16)]
    assert highest == sorted(highest)


def test_rejection_sampling_makes_the_policy_more_helpful_and_safer(run: Path) -> None:
    """95 % intervals apart, both by the oracle's word."""
    sft, after = (evaluation(run, name)["intervals"] for name in ("sft", "rejection_sampling"))
    assert after["oracle_helpfulness"]["low"] > sft["oracle_helpfulness"]["high"]
    assert after["oracle_violation_rate"]["high"] < sft["oracle_violation_rate"]["low"]


@pytest.mark.parametrize("skill", RARE)
def test_the_last_iteration_alone_forgets_what_the_pool_keeps(run: Path, skill: str) -> None:
    before, last, pool = (
        evaluation(run, name)["correctness_greedy_by_family"][skill] for name in ("v1", "v2_last", "v2_pool")
    )
    assert last < before - 0.3
    assert pool > last + 0.3


def test_the_tables_are_printed(whole_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(whole_run)]) == 0
    assert capsys.readouterr().out.count("\n\n") == 3
