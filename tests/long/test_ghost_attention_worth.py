"""recipes/tiny/ghost_attention.yaml: what docs/results/ghost-attention.md says, on each of three seeds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from llama2_chat.evaluation.statistics import mean
from llama2_chat.recipes.tiny.ghost_attention_figures import measure
from llama2_chat.recipes.tiny.ghost_attention_tables import (
    BASELINE,
    GATT,
    LAST,
    WITHOUT,
    flags_at,
    main,
    summary,
)

pytestmark = pytest.mark.long


@pytest.fixture(scope="module", params=(0, 1, 2))
def run(request: pytest.FixtureRequest, finished_run: Callable[..., Path]) -> Path:
    """A finished run; with LLAMA2_CHAT_GATT_RUNS one that is kept there."""
    return finished_run("ghost_attention.yaml", seed=request.param, kept="LLAMA2_CHAT_GATT_RUNS")


def share(run: Path, policy: str, turn: int) -> float:
    return mean([float(flag) for flag in flags_at([run], policy, turn)])


def test_the_baseline_knows_what_is_asked_and_forgets_it_with_the_turn(run: Path) -> None:
    assert share(run, BASELINE, 2) >= 0.9
    assert share(run, BASELINE, 6) <= 0.5
    assert share(run, BASELINE, LAST) <= 0.1
    shown = summary(run)["evaluation"][BASELINE]["attribute_shown"]
    assert shown["1"] >= 0.75
    assert shown["10"] <= 0.1


def test_ghost_attention_keeps_what_was_stated_for_twenty_turns(run: Path) -> None:
    assert all(share(run, GATT, turn) >= 0.95 for turn in (2, 4, 6, 10, LAST))
    shown = summary(run)["evaluation"][GATT]["attribute_shown"]
    assert mean(list(shown.values())) >= 0.95


@pytest.mark.parametrize("policy", WITHOUT)
def test_hobbies_are_kept_more_often_than_by_the_baseline_though_never_trained(
    run: Path, policy: str
) -> None:
    """Where they are asked for at turns 4, 6 and 10, the same dialogues each time."""
    ours, theirs = (
        [float(flag) for turn in (4, 6, 10) for flag in flags_at([run], name, turn, ("hobby",))]
        for name in (policy, BASELINE)
    )
    assert mean(ours) > mean(theirs) + 0.2


def test_without_the_zero_loss_less_is_kept_and_without_the_drop_nothing(run: Path) -> None:
    assert share(run, GATT, LAST) > share(run, "all_answers", LAST) + 0.05
    assert share(run, "every_turn", LAST) <= 0.1


def test_ordinary_skill_stays(run: Path) -> None:
    before, after = (summary(run)["evaluation"][policy]["correctness_greedy"] for policy in (BASELINE, GATT))
    assert after > before - 0.05


def test_what_is_asked_for_at_the_last_turn_is_looked_up_in_the_first(run: Path, tmp_path: Path) -> None:
    """Every turn is kept, and attention to the instruction rises most where the last question asks for it."""
    assert measure(run, tmp_path) == 0
    kept = json.loads((tmp_path / "instructions" / "evaluation.json").read_text())
    before, after = (kept["all_turns"][name] for name in kept["models"])
    assert before["high"] < 0.5 < 0.95 < after["low"]
    asked = json.loads((tmp_path / "attention_asked" / "evaluation.json").read_text())
    (difference,) = asked["difference"].values()
    assert difference[str(LAST)]["low"] > 0.1
    assert all(found["low"] > 0 for turn, found in difference.items() if int(turn) > 4)
    assert all(
        (tmp_path / name / "figures" / "attention_1.png").exists()
        for name in ("attention_asked", "attention_language")
    )


def test_the_tables_are_printed(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Five of them; a folder that is no run is told."""
    assert main([str(run)]) == 0
    assert capsys.readouterr().out.count("\n|---|") == 5
    assert main([str(tmp_path)]) == 2
    assert "no summary.json there" in capsys.readouterr().err
