"""recipes/tiny/ghost_attention.yaml on three seeds: what docs/results.md says of Ghost Attention and holds on each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llama2_chat.evaluation.statistics import mean, share_interval
from llama2_chat.recipes.tiny.ghost_attention_tables import (
    BASELINE,
    GATT,
    LAST,
    NEVER_TRAINED,
    UNSEEN,
    flags_at,
    main,
    summary,
)

pytestmark = pytest.mark.long
RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "tiny" / "ghost_attention.yaml"


@pytest.fixture(scope="module", params=(0, 1, 2))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; with LLAMA2_CHAT_GATT_RUNS one that is kept there."""
    kept = os.environ.get("LLAMA2_CHAT_GATT_RUNS")
    folder = Path(kept) / f"seed-{request.param}" if kept else tmp_path_factory.mktemp("gatt") / "run"
    command = [sys.executable, "-m", "llama2_chat.cli.main", "run", str(RECIPE), f"seed={request.param}"]
    subprocess.run([*command, "--output-dir", str(folder)], check=True)
    return folder


def share(run: Path, policy: str, turn: int) -> float:
    return mean([float(flag) for flag in flags_at([run], policy, turn)])


def test_the_baseline_knows_what_is_asked_and_forgets_it_with_the_turn(run: Path) -> None:
    assert share(run, BASELINE, 2) >= 0.9
    assert share(run, BASELINE, 6) <= 0.5
    assert share(run, BASELINE, LAST) <= 0.1
    shown = summary(run)["evaluation"][BASELINE]["attribute_shown"]
    assert shown["1"] >= 0.9
    assert shown["10"] <= 0.1


def test_ghost_attention_keeps_what_was_stated_for_twenty_turns(run: Path) -> None:
    assert all(share(run, GATT, turn) >= 0.95 for turn in (2, 4, 6, 10, LAST))
    shown = summary(run)["evaluation"][GATT]["attribute_shown"]
    assert mean(list(shown.values())) >= 0.95


def test_attributes_that_were_never_trained_are_kept_more_often_than_by_the_baseline(run: Path) -> None:
    """Intervals apart, both of them together, at turns 6 to 20."""
    for turn in (6, 10, LAST):
        ours, theirs = (
            share_interval(flags_at([run], policy, turn, NEVER_TRAINED)) for policy in (UNSEEN, BASELINE)
        )
        assert ours["low"] > theirs["high"]


def test_ordinary_skill_stays(run: Path) -> None:
    before, after = (summary(run)["evaluation"][policy]["correctness_greedy"] for policy in (BASELINE, GATT))
    assert after > before - 0.05


def test_the_tables_are_printed(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Five of them; a folder that is no run is told."""
    assert main([str(run)]) == 0
    assert capsys.readouterr().out.count("\n|---|") == 5
    assert main([str(tmp_path)]) == 2
    assert "no summary.json there" in capsys.readouterr().err
