"""recipes/tiny/run_tables.py on summaries made by hand: cells, columns for the runs, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llama2_chat.recipes.tiny import run_tables


def evaluated(helpfulness: float, recall: float, **more: float) -> dict[str, Any]:
    interval = {"low": helpfulness - 0.1, "high": helpfulness + 0.1}
    return {
        "oracle_helpfulness": helpfulness,
        "intervals": {"oracle_helpfulness": interval},
        "false_refusal_rate": {"helpful": 0.01, "borderline": 0.25},
        "attribute_recall": {"2": 1.0, "6": 0.5, "20": recall},
        **more,
    }


def make_run(folder: Path, seed: int, *, stages: dict[str, Any] | None = None) -> Path:
    reward_model = {
        "kind": "reward",
        "wall_seconds": 12.4,
        "accuracy": {"overall": {"accuracy": 0.8 + seed / 100}, "by_rating": {"better": {"accuracy": 0.9}}},
        "attainable_accuracy": None,
        "controls": {"length_scorer": {"accuracy": 0.6}},
        "unsafe_recall": None,
        "calibration_error": 0.04,
    }
    summary = {
        "recipe": "iterations",
        "seed": seed,
        "wall_seconds": 100.0 + seed,
        "stages": stages or {"helpfulness_rm": reward_model, "quick": {"kind": "sft", "wall_seconds": 0.2}},
        "evaluation": {
            "base": evaluated(0.0, 0.0),
            "sft": evaluated(0.5, 0.0),
            "v1_ppo": evaluated(0.625 + seed / 8, 0.9, kl_to_sft_nats=1.5),
        },
    }
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_a_column_for_each_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make_run(tmp_path / "a", 0), make_run(tmp_path / "b", 1)]
    assert run_tables.main([str(run) for run in runs]) == 0
    reward, metrics, recall, times = capsys.readouterr().out.strip().split("\n\n")
    assert reward.splitlines() == [
        "|  | seed 0 | seed 1 |",
        "|---|---|---|",
        "| helpfulness RM, overall | 0.800 | 0.810 |",
        "| helpfulness RM, better | 0.900 | 0.900 |",
        "| helpfulness RM, control: length scorer | 0.600 | 0.600 |",
        "| helpfulness RM, calibration error | 0.040 | 0.040 |",
    ]
    assert metrics.splitlines()[2:] == [
        "| sft: helpfulness at T = 1 | 0.500 (0.400 to 0.600) | 0.500 (0.400 to 0.600) |",
        "| v1 ppo: helpfulness at T = 1 | 0.625 (0.525 to 0.725) | 0.750 (0.650 to 0.850) |",
        "| v1 ppo: KL to SFT, nats | 1.500 | 1.500 |",
        "| sft: false refusals, helpful / borderline | 0.010 / 0.250 | 0.010 / 0.250 |",
        "| v1 ppo: false refusals, helpful / borderline | 0.010 / 0.250 | 0.010 / 0.250 |",
    ]
    assert recall.splitlines()[0] == "| turn 2 / 6 / 20 | seed 0 | seed 1 |"
    assert recall.splitlines()[-1] == "| v1 ppo | 1.00 / 0.50 / 0.90 | 1.00 / 0.50 / 0.90 |"
    assert times.splitlines()[2:] == ["| helpfulness_rm | 12 | 12 |", "| the whole run | 100 | 101 |"]


def test_a_row_for_each_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sweep's runs are taken one by one; what a policy has no figure of is a dash."""
    make_run(tmp_path / "run" / "sweep" / "seed=0", 0)
    make_run(tmp_path / "run" / "sweep" / "seed=1", 1)
    assert run_tables.main([str(tmp_path / "run"), "--by-policy"]) == 0
    head, _, sft, ppo = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert head.startswith("| policy | true helpfulness at T = 1 | violations |")
    assert sft.endswith("| - / - | - / - | 0.50, 0.00 / 0.50, 0.00 |")
    assert ppo.startswith("| v1 ppo | 0.625 (0.525 to 0.725) / 0.750 (0.650 to 0.850) |")
    assert "| 1.50 / 1.50 | 0.50, 0.90 / 0.50, 0.90 |" in ppo


def test_runs_of_two_recipes_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = make_run(tmp_path / "b", 1, stages={"sft": {"kind": "sft", "wall_seconds": 3.0}})
    assert run_tables.main([str(make_run(tmp_path / "a", 0)), str(other)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "name runs of one recipe" in error


def test_runs_that_cannot_be_shown_are_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, again, folder = make_run(tmp_path / "a", 0), make_run(tmp_path / "b", 0), tmp_path / "broken"
    folder.mkdir()
    cases = {
        (tmp_path / "none",): "no summary.json",
        (run, again): "a seed stands there twice",
    }
    for runs, message in cases.items():
        assert run_tables.main([str(one) for one in runs]) == 2
        assert message in capsys.readouterr().err
    other = json.dumps({"recipe": "sampling"})
    for text, message in (
        ("{", "not as a run"),
        ("[]", "not as a run"),
        (other, 'not "tiny" or "iterations"'),
    ):
        (folder / "summary.json").write_text(text)
        assert run_tables.main([str(folder)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
