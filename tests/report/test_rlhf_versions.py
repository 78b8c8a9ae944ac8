"""RLHF versions in the report: the table, the path of Fig. 11, accuracy of each reward model on each batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from page_reader import Page, check_self_contained
from small_run import MakeRun, edit_json, share

from llama2_chat.report.iterations import path_of
from llama2_chat.report.page import write_report
from llama2_chat.report.run_record import read_run

PERCENT = "\N{NO-BREAK SPACE}%"
STAGES: dict[str, dict[str, Any]] = {
    "sft": {"kind": "sft", "model": "base"},
    "helpfulness_rm": {"kind": "reward", "domain": "helpfulness"},
    "safety_rm": {"kind": "reward", "domain": "safety"},
    "independent_rm": {"kind": "reward", "domain": "helpfulness"},
    "v1_helpfulness_pairs": {
        "kind": "preferences",
        "domain": "helpfulness",
        "iteration": 1,
        "policies": ["sft"],
    },
    "v1_helpfulness_rm": {"kind": "reward", "domain": "helpfulness"},
    "v1_rejection_sampling": {"kind": "rejection_sampling", "iteration": 1, "policy": "sft"},
    "v1_ghost_attention": {"kind": "ghost_attention", "policy": "v1_rejection_sampling"},
    "v2_helpfulness_rm": {"kind": "reward", "domain": "helpfulness"},
    "v2_rejection_sampling": {"kind": "rejection_sampling", "iteration": 2, "policy": "v1_ghost_attention"},
    "v2_ppo": {"kind": "ppo", "policy": "v2_rejection_sampling"},
    "context_distillation": {"kind": "context_distillation", "policy": "v2_ppo"},
}
POLICIES = ["base", "sft", *(name for name, stage in STAGES.items() if "policy" in stage)]
BATCHES = {
    "helpfulness_rm": {"testbed": 0.71},
    "independent_rm": {},
    "v1_helpfulness_rm": {"testbed": 0.72, "preferences:1": 0.61},
    "v2_helpfulness_rm": {"testbed": 0.73, "preferences:1": 0.63, "preferences:2": 0.64},
    "safety_rm": {"testbed": 0.8},
}


def judged(place: int) -> dict[str, Any]:
    """A policy's evaluation: everything grows with its place."""
    return {
        "win_rate_vs_sft": 0.3 + 0.05 * place,
        "violation_rate": 0.4 - 0.03 * place,
        "oracle_helpfulness": 0.2 + 0.02 * place,
        "oracle_violation_rate": 0.5 - 0.04 * place,
        "kl_to_sft_nats": 1.5 * place,
        "reward_helpfulness_mean": 2.0 + place,
        "reward_safety_mean": 1.0 + place,
        "independent_reward_mean": 0.25 * place,
        "intervals": {"oracle_violation_rate": {"low": 0.1, "high": 0.3, "mean": 0, "count": 9}},
    }


@pytest.fixture
def run(make_run: MakeRun) -> Path:
    """A finished run of two versions."""
    path = make_run()
    recipe = yaml.safe_load((path / "recipe.yaml").read_text())
    (path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "stages": STAGES}, sort_keys=False))

    def change(summary: dict[str, Any]) -> None:
        summary["evaluation"] = {name: judged(place) for place, name in enumerate(POLICIES)}
        summary["stages"] = {
            name: {"kind": stage["kind"], "wall_seconds": 1.0} for name, stage in STAGES.items()
        }
        for name, sources in BATCHES.items():
            summary["stages"][name]["by_source"] = {
                source: {"overall": share(accuracy, 80)} for source, accuracy in sources.items()
            }

    edit_json(path / "summary.json", change)
    return path


def test_a_version_is_its_last_policy(run: Path) -> None:
    assert [(point.label, point.policy) for point in path_of(read_run(run))] == [
        ("SFT", "sft"),
        ("V1", "v1_ghost_attention"),
        ("V2 without PPO", "v2_rejection_sampling"),
        ("V2", "v2_ppo"),
    ]


def test_the_table_holds_every_versions_figures(run: Path) -> None:
    page = Page(write_report(run))
    check_self_contained(page)
    assert page.row("version") == [
        *("version", "policy", "helpfulness reward", "safety reward", "independent reward"),
        *("oracle helpfulness", "oracle violations", "violations", "win rate against SFT", "KL to SFT, nats"),
    ]
    # v1_ghost_attention is the fourth policy of all: place 3.
    assert page.row("V1") == [
        *("V1", "v1_ghost_attention", "5.00", "4.00", "0.750", "0.260"),
        *(f"38.0{PERCENT}10.0 to 30.0", f"31.0{PERCENT}", f"45.0{PERCENT}", "4.50"),
    ]
    assert page.row("V2")[1:3] == ["v2_ppo", "7.00"]
    assert "context_distillation" not in page.text("versions")


def test_the_figure_has_helpfulness_across_and_safety_upwards(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = drawn_points(run, monkeypatch)
    assert drawn["labels"] == ("helpfulness by the oracle", "safe answers by the oracle")
    names = [name for name, _, _ in drawn["points"]]
    assert names == ["SFT", "V1", "V2 without PPO", "V2"]
    # Places 1, 3, 4, 5; safe answers are what violations leave.
    assert [x.value for _, x, _ in drawn["points"]] == pytest.approx([0.22, 0.26, 0.28, 0.3], abs=1e-9)
    assert [y.value for _, _, y in drawn["points"]] == pytest.approx([0.54, 0.62, 0.66, 0.7], abs=1e-9)
    assert [(y.low, y.high) for _, _, y in drawn["points"]] == [(0.7, 0.9)] * 4
    page = Page(run / "report.html")
    assert "1 SFT" in page.text("versions")
    assert "4 V2" in page.text("versions")


def drawn_points(run: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    from llama2_chat.report import iterations

    draw, drawn = iterations.draw_against, {}

    def noted(title: str, points: Any, **labels: str) -> Any:
        drawn.update(points=points, labels=tuple(labels.values()))
        return draw(title, points, **labels)

    monkeypatch.setattr(iterations, "draw_against", noted)
    write_report(run)
    return drawn


def test_without_an_oracle_the_axes_are_win_rate_and_the_reward_models_violations(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(summary: dict[str, Any]) -> None:
        for metrics in summary["evaluation"].values():
            del metrics["oracle_helpfulness"], metrics["oracle_violation_rate"]

    edit_json(run / "summary.json", without)
    drawn = drawn_points(run, monkeypatch)
    assert drawn["labels"] == ("win rate against SFT", "safe answers by the safety reward model")
    assert [x.value for _, x, _ in drawn["points"]] == pytest.approx([0.35, 0.45, 0.5, 0.55], abs=1e-9)
    assert [y.value for _, _, y in drawn["points"]] == pytest.approx([0.63, 0.69, 0.72, 0.75], abs=1e-9)


def test_reward_models_stand_against_batches(run: Path) -> None:
    page = Page(write_report(run))
    assert page.row("reward model") == ["reward model", "testbed", "batch of V1", "batch of V2"]
    rows = {
        row[0]: row[1:] for row in page.rows if row and row[0].endswith("helpfulness_rm") and len(row) == 4
    }
    cell = {value: f"{100 * value:.1f}{PERCENT}{100 * value - 5:.1f} to {100 * value + 4:.1f}" for value in
            (0.71, 0.72, 0.73, 0.61, 0.63, 0.64)}  # fmt: skip
    assert rows == {
        "helpfulness_rm": [cell[0.71], "–", "–"],
        "v1_helpfulness_rm": [cell[0.72], cell[0.61], "–"],
        "v2_helpfulness_rm": [cell[0.73], cell[0.63], cell[0.64]],
    }
    # No batch of the safety domain was collected.
    assert "Helpfulness reward models on each batch" in page.text("versions")
    assert "Safety reward models on each batch" not in page.text("versions")


def test_a_batch_is_no_policy(run: Path) -> None:
    page = Page(write_report(run))
    assert "helpfulness preference pairs" in page.text("pipeline")


def test_one_version_has_no_section(make_run: MakeRun) -> None:
    assert "versions" not in Page(write_report(make_run())).sections


def test_a_run_that_is_not_finished_shows_the_versions_that_are_there(run: Path) -> None:
    def unfinished(summary: dict[str, Any]) -> None:
        for name in ("v2_ppo", "context_distillation"):
            del summary["evaluation"][name], summary["stages"][name]

    edit_json(run / "summary.json", unfinished)
    page = Page(write_report(run))
    assert page.row("V2 without PPO")[1] == "v2_rejection_sampling"
    assert not [row for row in page.rows if row and row[0] == "V2"]
