"""Runs of RLHF versions: stopped anywhere the same command goes on; `--from`, `--until` and `--force` see stages."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import fake_versions
import pytest
from test_interrupted_runs import content

from llama2_chat.pipeline.run_directory import RunDirectory
from llama2_chat.pipeline.yaml_files import read_mapping
from llama2_chat.stage import STAGE_KINDS

STAGES = [
    *("helpfulness_rm", "safety_rm"),
    *(
        "v1_helpfulness_pairs",
        "v1_safety_pairs",
        "v1_helpfulness_rm",
        "v1_safety_rm",
        "v1_rejection_sampling",
    ),
    *(
        "v2_helpfulness_pairs",
        "v2_safety_pairs",
        "v2_helpfulness_rm",
        "v2_safety_rm",
        "v2_rejection_sampling",
    ),
    "v2_ppo",
]


@pytest.fixture(autouse=True)
def versions(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe of two versions, and their kinds in this process."""
    for name, kind in fake_versions.KINDS.items():
        monkeypatch.setitem(STAGE_KINDS, name, kind)
    (workspace / "recipe.yaml").write_text(fake_versions.RECIPE)


def run(cli: Any, *options: str, out: str = "out") -> list[str]:
    """Run the recipe; the stages that were not done already."""
    ended = cli("run", "recipe.yaml", "--output-dir", out, *options)
    assert ended.code == 0, ended.err
    return [line.split()[1] for line in ended.err.splitlines() if line.endswith((": starts", ": continues"))]


def killed(workspace: Path, moment: str) -> int:
    """The exit code of a run in another process that dies there."""
    driver = Path(fake_versions.__file__)
    done = subprocess.run(
        [sys.executable, str(driver), "run", "recipe.yaml", "--output-dir", "out"],
        cwd=workspace,
        env=os.environ | {"FAKE_ACTION": f"{moment}:kill"},
        capture_output=True,
        timeout=60,
        check=False,
    )
    return done.returncode


def test_every_stage_runs_once_in_the_schedules_order(workspace: Path, cli: Any) -> None:
    assert run(cli) == STAGES
    assert run(cli) == []
    folders = sorted(path.name for path in Path("out/stages").iterdir())
    assert folders == [f"{number:02d}-{name}" for number, name in enumerate(STAGES, start=1)]
    pairs = Path("out/stages/03-v1_helpfulness_pairs")
    assert not (pairs / "model").exists()
    assert {path.name for path in pairs.glob("*.jsonl")} == {
        *("dataset.jsonl", "held_out.jsonl", "samples.jsonl", "metrics.jsonl"),
    }


def test_a_run_killed_once_in_every_stage_ends_with_the_same_bytes(workspace: Path, cli: Any) -> None:
    for number, name in enumerate(STAGES, start=1):
        assert killed(workspace, f"{number:02d}-{name}:{number % 3}") == -signal.SIGKILL
    assert run(cli) == STAGES[-1:]
    run(cli, out="whole")
    assert content(workspace / "out") == content(workspace / "whole")


def test_the_resolved_recipe_holds_the_stages_and_gives_the_same_run(workspace: Path, cli: Any) -> None:
    run(cli)
    resolved = read_mapping(workspace / "out" / "recipe.yaml")
    assert "iterations" not in resolved
    assert list(resolved["stages"]) == STAGES
    ended = cli("run", "out/recipe.yaml", "--output-dir", "again")
    assert ended.code == 0, ended.err
    again, out = (content(workspace / name) for name in ("again", "out"))
    assert len(again) > 60
    # What a data entry was made from is told as it was written.
    assert [name for name in again if again[name] != out[name]] == ["data/pairs.json", "data/talks.json"]


def test_another_version_leaves_those_before_it_done(workspace: Path, cli: Any) -> None:
    run(cli)
    more = run(cli, "iterations.count=3", "iterations.ppo.from=3")
    # V2 had PPO, on which V3 would have been built.
    assert more == [
        *("v3_helpfulness_pairs", "v3_safety_pairs", "v3_helpfulness_rm", "v3_safety_rm"),
        *("v3_rejection_sampling", "v3_ppo"),
    ]


def test_pairs_that_change_are_followed_by_what_is_made_of_them(workspace: Path, cli: Any) -> None:
    run(cli)
    again = run(cli, "iterations.overrides={v2: {preferences: {safety: {training: {steps: 4}}}}}")
    # The other domain's batch stays as it is; so does V1.
    assert again == ["v2_safety_pairs", "v2_safety_rm", "v2_rejection_sampling", "v2_ppo"]


def test_stages_of_versions_can_be_selected_and_forced(workspace: Path, cli: Any) -> None:
    assert run(cli, "--until", "v1_safety_pairs") == STAGES[:4]
    assert run(cli, "--from", "v1_helpfulness_rm", "--until", "v2_safety_pairs") == STAGES[4:9]
    assert run(cli, "--force", "v1_safety_pairs", "--until", "v1_safety_pairs") == ["v1_safety_pairs"]
    assert run(cli) == STAGES[9:]
    ended = cli("run", "recipe.yaml", "--output-dir", "out", "--from", "v3_ppo")
    assert ended.code == 2
    assert 'no such stage (did you mean "v2_ppo"?)' in ended.err


def test_a_run_made_by_hand_written_stages_is_taken_over(workspace: Path, cli: Any) -> None:
    """What counts is a stage's content, not whether it was written out by hand."""
    run(cli)
    fingerprints = {
        name: json.loads((RunDirectory(workspace / "out", STAGES).stage(name).done_file).read_text())[
            "fingerprint"
        ]
        for name in STAGES
    }
    ended = cli("recipes", "show", "recipe.yaml", "--expanded")
    (workspace / "recipe.yaml").write_text(ended.out)
    assert run(cli) == []
    assert len(set(fingerprints.values())) == len(STAGES)
