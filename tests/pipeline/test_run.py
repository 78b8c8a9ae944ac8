"""What a run does again, what it leaves alone, and which folders it refuses."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Change = Callable[[str, object], Path]


def started(run: Path) -> list[str]:
    """Stages started in a run's last call, from events.jsonl."""
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    last = max(number for number, event in enumerate(events) if event["event"] == "run_started")
    return [event["stage"] for event in events[last:] if event["event"] == "stage_started"]


def final(run: Path, stage: str) -> int:
    """The fake stage's only metric."""
    value: int = json.loads((run / "summary.json").read_text())["stages"][stage]["final"]
    return value


@pytest.fixture
def run_folder(workspace: Path, cli: Any) -> Path:
    """A finished run."""
    ended = cli("run", "recipe.yaml")
    assert ended.code == 0, ended.err
    return workspace / "runs" / "small"


def test_finished_run(run_folder: Path) -> None:
    summary = json.loads((run_folder / "summary.json").read_text())
    assert (summary["recipe"], summary["seed"], list(summary["stages"])) == (
        "small",
        3,
        ["first", "judge", "second"],
    )
    assert summary["stages"]["judge"]["kind"] == "fake_reward"
    assert summary["wall_seconds"] == pytest.approx(
        sum(stage["wall_seconds"] for stage in summary["stages"].values()), abs=1e-3
    )
    for folder in ("01-first", "02-judge", "03-second"):
        names = {file.name for file in (run_folder / "stages" / folder).iterdir()}
        assert names == {"config.yaml", "done.json", "metrics.jsonl", "model", "started.json"}
    assert json.loads((run_folder / "environment.json").read_text())["format_version"] == 1
    assert started(run_folder) == ["first", "judge", "second"]


def test_metrics_hold_no_times(run_folder: Path) -> None:
    for line in (run_folder / "stages" / "01-first" / "metrics.jsonl").read_text().splitlines():
        assert set(json.loads(line)) == {"step", "value"}


def test_nothing_changed_nothing_runs(run_folder: Path, cli: Any) -> None:
    before = {f: f.read_bytes() for f in run_folder.rglob("*") if f.is_file() and f.name != "events.jsonl"}
    assert cli("run", "recipe.yaml").code == 0
    assert started(run_folder) == []
    assert {f: f.read_bytes() for f in before} == before


@pytest.mark.parametrize(
    ("key", "value", "again"),
    [
        ("seed", 4, ["first", "judge", "second"]),
        ("stages.second.training", {"steps": 6}, ["second"]),
        ("stages.judge.training", {"steps": 2}, ["judge", "second"]),
        ("stages.first.dialogues", ["talks", "pairs"], ["first", "judge", "second"]),
        ("data.talks", {"path": "talks.jsonl"}, []),
        ("stages.first.training", {"steps": 7}, []),  # the default, written out
    ],
)
def test_changed_configuration(
    run_folder: Path, cli: Any, change: Change, key: str, value: object, again: list[str]
) -> None:
    before = {stage: final(run_folder, stage) for stage in ("first", "judge", "second")}
    change(key, value)
    assert cli("run", "recipe.yaml").code == 0
    assert started(run_folder) == again
    assert [stage for stage in before if final(run_folder, stage) != before[stage]] == again


@pytest.mark.parametrize(
    ("file", "again"),
    [
        ("talks.jsonl", ["first", "judge", "second"]),
        ("pairs.jsonl", ["judge", "second"]),
        ("base_model/weights.txt", ["first", "judge", "second"]),
    ],
)
def test_changed_input(run_folder: Path, workspace: Path, cli: Any, file: str, again: list[str]) -> None:
    (workspace / file).write_text("other\n")
    assert cli("run", "recipe.yaml").code == 0
    assert started(run_folder) == again


def test_where_inputs_lie_does_not_matter(run_folder: Path, workspace: Path, cli: Any) -> None:
    (workspace / "moved").mkdir()
    for name in ("base_model", "talks.jsonl", "pairs.jsonl", "recipe.yaml"):
        shutil.move(workspace / name, workspace / "moved" / name)
    assert cli("run", "moved/recipe.yaml").code == 0
    assert started(run_folder) == []


def test_damaged_stage_is_made_again(run_folder: Path, cli: Any) -> None:
    shutil.rmtree(run_folder / "stages" / "02-judge")
    assert cli("run", "recipe.yaml").code == 0
    assert started(run_folder) == ["judge"]


def test_force(run_folder: Path, cli: Any) -> None:
    before = final(run_folder, "judge")
    assert cli("run", "recipe.yaml", "--force", "judge").code == 0
    assert started(run_folder) == ["judge"]
    assert final(run_folder, "judge") == before


def test_until_and_from(workspace: Path, cli: Any) -> None:
    run = workspace / "runs" / "small"
    assert cli("run", "recipe.yaml", "--until", "judge").code == 0
    assert started(run) == ["first", "judge"]
    assert not (run / "stages" / "03-second").exists()
    assert cli("run", "recipe.yaml", "--from", "second").code == 0
    assert started(run) == ["second"]
    assert cli("run", "recipe.yaml", "--from", "judge", "--until", "judge", "--force", "judge").code == 0
    assert started(run) == ["judge"]
    assert list(json.loads((run / "summary.json").read_text())["stages"]) == ["first", "judge", "second"]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--from", "fist"], ["--from fist: no such stage", 'did you mean "first"', "first, judge, second"]),
        (["--until", "x"], ["--until x: no such stage"]),
        (["--force", "jugde"], ["--force jugde: no such stage", 'did you mean "judge"']),
        (["--from", "second", "--until", "first"], ["--from second comes after --until first"]),
        (["--until", "first", "--force", "judge"], ["--force judge", "--until first"]),
        (["--from", "second"], ["stage first", "not done", "run it first"]),
        (["--write-configs", "x"], ["--write-configs goes with --dry-run"]),
    ],
)
def test_wrong_selection(workspace: Path, cli: Any, options: list[str], parts: list[str]) -> None:
    ended = cli("run", "recipe.yaml", *options)
    assert ended.code == 2
    for part in parts:
        assert part in ended.err
    assert "Traceback" not in ended.err
    assert not (workspace / "runs" / "small" / "stages").exists()


def test_folder_of_another_recipe(run_folder: Path, cli: Any, change: Change) -> None:
    before = (run_folder / "summary.json").read_bytes(), (run_folder / "recipe.yaml").read_bytes()
    change("name", "other")
    ended = cli("run", "recipe.yaml", "--output-dir", run_folder)
    assert ended.code == 2
    assert 'holds a run of recipe "small", not of "other"' in ended.err
    assert ((run_folder / "summary.json").read_bytes(), (run_folder / "recipe.yaml").read_bytes()) == before


def test_folder_of_another_format(run_folder: Path, cli: Any) -> None:
    file = run_folder / "environment.json"
    file.write_text(file.read_text().replace('"format_version": 1', '"format_version": 99'))
    ended = cli("run", "recipe.yaml")
    assert ended.code == 2
    assert "format 99" in ended.err
    assert "this version writes 1" in ended.err


def test_folder_of_a_sweep_is_not_that_of_a_plain_run(workspace: Path, cli: Any) -> None:
    assert cli("run", "recipe.yaml", "sweep={seed: [1, 2]}").code == 0
    assert cli("run", "recipe.yaml").code == 0  # beside it: runs/small/sweep and runs/small/stages
    assert (workspace / "runs" / "small" / "stages" / "03-second" / "done.json").exists()


@pytest.mark.parametrize("inside", ["file/out", "file"])
def test_unwritable_output_folder(workspace: Path, cli: Any, inside: str) -> None:
    (workspace / "file").write_text("")
    ended = cli("run", "recipe.yaml", "--output-dir", inside)
    assert ended.code == 2
    assert f"{workspace / inside}: cannot write here" in ended.err
    assert "choose another --output-dir" in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_permission(workspace: Path, cli: Any) -> None:
    (workspace / "closed").mkdir(mode=0o500)
    ended = cli("run", "recipe.yaml", "--output-dir", "closed/out")
    assert ended.code == 2
    assert "cannot write here" in ended.err


def test_moved_run_directory(run_folder: Path, workspace: Path, cli: Any, change: Change) -> None:
    (workspace / "elsewhere").mkdir()
    moved = workspace / "elsewhere" / "renamed"
    shutil.move(run_folder, moved)
    assert cli("run", "recipe.yaml", "--output-dir", moved).code == 0
    assert started(moved) == []
    change("stages.second.training", {"steps": 9})
    assert cli("run", "recipe.yaml", "--output-dir", moved).code == 0
    assert started(moved) == ["second"]
    assert not run_folder.exists()


def test_files_of_a_run_name_no_absolute_path_inside_it(run_folder: Path) -> None:
    for file in run_folder.rglob("*"):
        if file.is_file() and file.name != "events.jsonl":
            assert str(run_folder) not in file.read_text(), file


def test_relative_output_folder(workspace: Path, cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (workspace / "below").mkdir()
    monkeypatch.chdir(workspace / "below")
    assert cli("run", "../recipe.yaml", "--output-dir", "../out").code == 0
    assert (workspace / "out" / "summary.json").exists()
