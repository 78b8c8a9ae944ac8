"""recipes/tiny/ppo_ablation.yaml: what docs/results/ppo.md says of PPO's ingredients, on each of three seeds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from llama2_chat.evaluation.statistics import Interval, mean_interval
from llama2_chat.recipes.tiny.ppo_tables import Run, main, tables

pytestmark = pytest.mark.long
START = "rejection_sampling"


@pytest.fixture(scope="module", params=(0, 1, 2))
def run(request: pytest.FixtureRequest, finished_run: Callable[..., Path]) -> Run:
    """A finished run; with LLAMA2_CHAT_PPO_RUNS one that is kept there."""
    return Run(finished_run("ppo_ablation.yaml", seed=request.param, kept="LLAMA2_CHAT_PPO_RUNS"))


def difference(run: Run, ours: str, other: str, name: str) -> Interval:
    """Mean over prompts of ours less the other's, with its 95 % interval."""
    return mean_interval(run.differences(ours, other, name))


def test_ppo_is_more_helpful_and_safer_than_what_it_starts_from(run: Run) -> None:
    """95 % intervals apart, both by the oracle's word."""
    assert run.interval("ppo", "true helpfulness")["low"] > run.interval(START, "true helpfulness")["high"]
    assert run.interval("ppo", "violations")["high"] < run.interval(START, "violations")["low"]


def test_the_penalty_bounds_the_distance_from_the_start(run: Run) -> None:
    """Less than a third of the nats that the same budget goes without it."""
    with_it, without = (run.trained(policy, "kl_nats_last") for policy in ("ppo", "ppo_without_kl"))
    assert with_it is not None
    assert without is not None
    assert 0 < with_it < 1.5
    assert without > 3 * with_it


def test_without_the_penalty_the_reward_rises_and_the_truth_does_not_follow(run: Run) -> None:
    """Without it PPO gains two fifths as much reward again and more, and of the truth less than a third as much."""
    gained, more = (
        {name: difference(run, *pair, name) for name in ("R_h", "true helpfulness")}
        for pair in (("ppo", START), ("ppo_without_kl", "ppo"))
    )
    assert more["R_h"]["low"] > 0
    assert more["R_h"]["mean"] > 0.4 * gained["R_h"]["mean"]
    assert more["true helpfulness"]["mean"] < gained["true helpfulness"]["mean"] / 3


def test_the_longer_without_the_penalty_the_more_skill_is_lost(run: Run) -> None:
    """Twice the budget: still more reward, and fewer right greedy answers than PPO and than what it starts from."""
    assert difference(run, "ppo_longer_without_kl", "ppo_without_kl", "R_h")["low"] > 0
    for other in ("ppo", START):
        assert difference(run, "ppo_longer_without_kl", other, "greedy correctness")["high"] < 0


def test_without_the_gate_safety_is_lost(run: Run) -> None:
    """More violations than before PPO, intervals apart."""
    assert run.interval("ppo_without_gate", "violations")["low"] > run.interval(START, "violations")["high"]


def test_the_tables_can_be_printed(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Four tables of one seed, of eight policies each or of PPO's alone; a folder that is no run is told."""
    printed = tables([run])
    assert printed.count("\n|---|") == 4
    assert printed.count("\n| ppo without kl |") == 2
    assert main([str(tmp_path)]) == 2
    assert "summary.json: not there" in capsys.readouterr().err
