"""Which folders a run takes, what it records, and stages whose place in the recipe changes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from llama2_chat.pipeline import run_directory


def started(run: Path) -> list[str]:
    """Stages started in a run's last call, from events.jsonl."""
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    last = max(number for number, event in enumerate(events) if event["event"] == "run_started")
    return [event["stage"] for event in events[last:] if event["event"] == "stage_started"]


@pytest.fixture
def run_folder(workspace: Path, cli: Any) -> Path:
    """A finished run."""
    ended = cli("run", "recipe.yaml")
    assert ended.code == 0, ended.err
    return workspace / "runs" / "small"


def test_the_folder_of_the_recipe_is_no_run(workspace: Path, cli: Any) -> None:
    """`--output-dir .` must not replace the recipe by the resolved one."""
    before = (workspace / "recipe.yaml").read_bytes()
    for extra in ([], ["--dry-run"]):
        ended = cli("run", "recipe.yaml", "--output-dir", ".", *extra)
        assert ended.code == 2
        assert ".: holds recipe.yaml, which no run made; choose another --output-dir" in ended.err
    assert (workspace / "recipe.yaml").read_bytes() == before
    assert not (workspace / "environment.json").exists()


@pytest.mark.parametrize("name", ["summary.json", "data/talks.jsonl", "stages/mine/x", "evaluation/x"])
def test_folders_with_files_of_others_are_left_alone(workspace: Path, cli: Any, name: str) -> None:
    file = workspace / "out" / name
    file.parent.mkdir(parents=True)
    file.write_text("precious")
    ended = cli("run", "recipe.yaml", "--output-dir", "out")
    assert ended.code == 2
    assert f"out: holds {name.partition('/')[0]}, which no run made" in ended.err
    assert file.read_text() == "precious"


def test_dry_run_refuses_the_folder_of_another_recipe(run_folder: Path, cli: Any) -> None:
    ended = cli("run", "recipe.yaml", "name=other", "--output-dir", run_folder, "--dry-run")
    assert ended.code == 2
    assert 'holds a run of recipe "small", not of "other"' in ended.err


def test_full_disk_before_anything_is_written(
    workspace: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is not at fault, so this is not the user's mistake."""

    def full(self: Path, *arguments: Any, **options: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path, "touch", full)
    ended = cli("run", "recipe.yaml", "--output-dir", "out")
    assert ended.code == 1
    assert "no space left on the disk" in ended.err


def test_resolved_recipe_gives_the_same_run(run_folder: Path, workspace: Path, cli: Any) -> None:
    """From any folder, also with relative data of the original recipe."""
    (workspace / "else").mkdir()
    shutil.copy(run_folder / "recipe.yaml", workspace / "else" / "recipe.yaml")
    ended = cli("run", "else", "--output-dir", run_folder)
    assert ended.code == 0, ended.err
    assert started(run_folder) == []
    assert cli("run", run_folder, "--output-dir", run_folder).code == 0
    assert started(run_folder) == []
    assert cli("run", run_folder, "--output-dir", "out").code == 0
    for name in ("recipe.yaml", "stages/03-second/model/weights.txt"):
        assert (workspace / "out" / name).read_bytes() == (run_folder / name).read_bytes()


@pytest.mark.parametrize("first", ["again", "a-second"])  # one name ends as another one does
def test_inserted_stage_runs_alone(run_folder: Path, workspace: Path, cli: Any, first: str) -> None:
    mapping = yaml.safe_load((workspace / "recipe.yaml").read_text())
    mapping["stages"] = {first: {**mapping["stages"]["first"], "training": {"steps": 2}}, **mapping["stages"]}
    (workspace / "recipe.yaml").write_text(yaml.safe_dump(mapping, sort_keys=False))
    plan = cli("run", "recipe.yaml", "--dry-run").out
    assert plan.count("done in") == 3
    before = {
        name: (run_folder / "stages" / f"{number:02d}-{name}" / "model" / "weights.txt").read_bytes()
        for number, name in enumerate(["first", "judge", "second"], start=1)
    }
    assert cli("run", "recipe.yaml").code == 0
    assert started(run_folder) == [first]
    folders = [f"01-{first}", "02-first", "03-judge", "04-second"]
    assert sorted(folder.name for folder in (run_folder / "stages").iterdir()) == folders
    for name, content in before.items():
        (folder,) = (folder for folder in folders if folder[3:] == name)
        assert (run_folder / "stages" / folder / "model" / "weights.txt").read_bytes() == content
    # The configurations lead to where the inputs lie now.
    config = yaml.safe_load((run_folder / "stages/04-second/config.yaml").read_text())
    assert (config["model"], config["helpfulness"]) == ("../02-first/model", "../03-judge/model")
    assert cli("run", "recipe.yaml").code == 0
    assert started(run_folder) == []


def test_stages_that_change_places(run_folder: Path, workspace: Path, cli: Any) -> None:
    mapping = yaml.safe_load((workspace / "recipe.yaml").read_text())
    del mapping["stages"]["second"]["helpfulness"]
    (workspace / "recipe.yaml").write_text(yaml.safe_dump(mapping, sort_keys=False))
    assert cli("run", "recipe.yaml").code == 0
    order = ["first", "second", "judge"]
    mapping["stages"] = {name: mapping["stages"][name] for name in order}
    (workspace / "recipe.yaml").write_text(yaml.safe_dump(mapping, sort_keys=False))
    assert cli("run", "recipe.yaml").code == 0
    assert started(run_folder) == []
    assert sorted(folder.name for folder in (run_folder / "stages").iterdir()) == [
        "01-first",
        "02-second",
        "03-judge",
    ]


def test_force_that_is_killed_while_it_clears_the_stage(
    run_folder: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing half removed counts as done."""
    from llama2_chat.pipeline import run

    def dies(path: Path) -> None:
        removed.append(path.name)
        if path.name == "01-first":
            shutil.rmtree(path / "model")
            raise KeyboardInterrupt
        path.unlink(missing_ok=True)

    removed: list[str] = []
    monkeypatch.setattr(run, "remove", dies)
    assert cli("run", "recipe.yaml", "--force", "first").code == 130
    assert removed == ["done.json", "started.json", "01-first"]
    monkeypatch.undo()
    monkeypatch.chdir(run_folder.parent.parent)
    import fake_stages

    from llama2_chat.stage import STAGE_KINDS

    for name, kind in fake_stages.KINDS.items():
        monkeypatch.setitem(STAGE_KINDS, name, kind)
    assert cli("run", "recipe.yaml").code == 0
    assert started(run_folder) == ["first"]
    assert (run_folder / "stages" / "01-first" / "model" / "weights.txt").exists()


def test_environment(run_folder: Path) -> None:
    found = json.loads((run_folder / "environment.json").read_text())
    assert found["format_version"] == run_directory.FORMAT_VERSION
    assert found["cores"] == os.cpu_count()
    assert 2**28 < found["memory_bytes"] < 2**50
    assert isinstance(found["gpus"], list)
    assert found["packages"]["torch"].startswith("2.")
    assert found["processor"]


def test_git_state_is_that_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package inside somebody's own repository says nothing about that repository."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init", "-q")
    (tmp_path / "theirs.txt").write_text("x")
    (tmp_path / "module.py").write_text("x")
    identity = ("-c", "user.name=x", "-c", "user.email=x@example.org")
    git("add", "theirs.txt")
    git(*identity, "commit", "-q", "-m", "x")
    monkeypatch.setattr(run_directory, "__file__", str(tmp_path / "module.py"))
    assert run_directory._git_state() is None
    git("add", "module.py")
    git(*identity, "commit", "-q", "-m", "y")
    assert run_directory._git_state() == git("rev-parse", "--short=12", "HEAD")
    (tmp_path / "theirs.txt").write_text("changed")
    assert run_directory._git_state() == git("rev-parse", "--short=12", "HEAD") + "-dirty"


BASE_RECIPE = """\
name: from_nothing
base_model: start
data: {talks: talks.jsonl, pairs: pairs.jsonl}
stages:
  start: {kind: fake_base, text: talks}
  first: {kind: fake_policy, model: base, dialogues: [pairs]}
"""


def test_a_stage_may_make_the_base(workspace: Path, cli: Any) -> None:
    (workspace / "recipe.yaml").write_text(BASE_RECIPE)
    assert "to run" in cli("run", "recipe.yaml", "--dry-run").out
    assert cli("run", "recipe.yaml").code == 0
    run = workspace / "runs" / "from_nothing"
    assert started(run) == ["start", "first"]
    own, first = (
        yaml.safe_load((run / f"stages/{folder}/config.yaml").read_text())
        for folder in ("01-start", "02-first")
    )
    assert own["base_model"]["path"] == "model"
    assert (first["base_model"]["path"], first["model"]) == ("../01-start/model",) * 2
    assert cli("run", "recipe.yaml").code == 0
    assert started(run) == []
    assert cli("run", "recipe.yaml", "--dry-run").out.count("done in") == 2
    (workspace / "pairs.jsonl").write_text("other\n")
    assert cli("run", "recipe.yaml").code == 0
    assert started(run) == ["first"]
    (workspace / "talks.jsonl").write_text("other\n")
    assert cli("run", "recipe.yaml").code == 0
    assert started(run) == ["start", "first"]
    assert cli("run", run, "--output-dir", run).code == 0  # the resolved recipe names the stage too
    assert started(run) == []


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (("base_model: start", "base_model: first"), ["base_model.path: no such folder"]),
        (
            ("stages:\n", "stages:\n  zero: {kind: fake_policy, model: base, dialogues: [talks]}\n"),
            ['base_model: the stage "start" makes it and so must come first'],
        ),
    ],
)
def test_wrong_base_stage(workspace: Path, cli: Any, change: tuple[str, str], parts: list[str]) -> None:
    (workspace / "recipe.yaml").write_text(BASE_RECIPE.replace(*change))
    ended = cli("validate", "recipe.yaml")
    assert ended.code == 2
    for part in parts:
        assert part in ended.err
