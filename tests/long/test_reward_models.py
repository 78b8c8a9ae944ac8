"""recipes/tiny/reward_models.yaml at reduced size, one seed: what docs/results/reward.md says and holds well outside
the noise. What three seeds at full size leave open (whether a margin helps) is not asserted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from llama2_chat.evaluation.statistics import mean
from llama2_chat.recipes.tiny.reward_tables import RATING_COLUMNS, Scored, scored, tables
from llama2_chat.reward.metrics import accuracy_row

pytestmark = pytest.mark.long
SMALL = (
    "sweep={}",
    "data.demonstrations.rows=3000",
    "data.helpfulness_pairs.rows=2500",
    "data.safety_pairs.rows=2000",
    "data.held_out_helpfulness_pairs.rows=1500",
    "data.held_out_safety_pairs.rows=1500",
)
HELPFULNESS, SAFETY = "helpfulness_small_margin", "safety_with_loss"


@pytest.fixture(scope="module")
def run(finished_run: Callable[..., Path]) -> Path:
    """A finished run."""
    return finished_run("reward_models.yaml", *SMALL)


@pytest.mark.parametrize(("stage", "domain"), [(HELPFULNESS, "helpfulness"), (SAFETY, "safety")])
def test_accuracy_grows_with_the_rating(run: Path, stage: str, domain: str) -> None:
    """Table 8: significantly > better > slightly > negligibly better, and the first far above the last."""
    found = scored(run, stage, domain)
    accuracies = [mean(found.points(column)) for column in RATING_COLUMNS[:4]]
    assert accuracies == sorted(accuracies, reverse=True)
    assert accuracies[0] > accuracies[3] + 0.2


@pytest.mark.parametrize(
    ("home", "guest", "domain"), [(HELPFULNESS, SAFETY, "helpfulness"), (SAFETY, HELPFULNESS, "safety")]
)
def test_each_reward_model_is_best_at_home(run: Path, home: str, guest: str, domain: str) -> None:
    """Table 8, averages: the intervals of the two models on one domain's pairs lie apart."""
    ours, theirs = (accuracy_row(average(scored(run, stage, domain))) for stage in (home, guest))
    assert theirs["high"] < ours["low"]


def test_the_safety_loss_puts_unsafe_responses_below_a_half_and_safe_ones_above(run: Path) -> None:
    """Table 29 goes by recall alone; without the loss nothing ties the scores to 0.5, so both sides are counted."""
    without, ours = (scored(run, stage, "safety") for stage in ("safety_without_loss", SAFETY))
    assert mean(ours.below_half(safe=False)) > 0.95
    assert mean(ours.below_half(safe=True)) < 0.02
    assert mean(without.below_half(safe=True)) > 0.03


def test_margins_push_scores_apart(run: Path) -> None:
    """A.3.3: the larger the margin, the farther apart the two scores of a pair."""
    distances = [
        scored(run, f"helpfulness_{name}_margin", "helpfulness").distance for name in ("no", "small", "large")
    ]
    assert distances[0] < distances[1] < distances[2]


def test_the_tables_of_one_seed_can_be_printed(run: Path) -> None:
    """Two tables of margins, three of the safety loss, one crosswise; one seed has no interval over seeds."""
    printed = tables(run)
    assert printed.count("\n|---|") == 6
    assert printed.count(" | - |\n") == 2 * 5 + 4 + 4
    average_cell = accuracy_row(average(scored(run, SAFETY, "safety")))["accuracy"]
    assert f"{average_cell:.3f} (" in printed


def average(found: Scored) -> list[float]:
    """Right or wrong on every pair."""
    return found.points(RATING_COLUMNS[-1])
