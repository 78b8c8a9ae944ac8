"""A stage run alone: the plan and the configurations it writes, and the command that takes them."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from llama2_chat.cli import main, stages

FOLDERS = ("01-first", "02-judge", "03-second")
KIND_OF = {"01-first": "fake-policy", "02-judge": "fake-reward", "03-second": "fake-policy"}


@pytest.fixture(scope="module", autouse=True)
def _stage_commands() -> Any:
    """Mount the fake kinds as the real ones are, and take them away again."""
    before = list(main.app.registered_commands)
    for kind in ("fake_policy", "fake_reward"):
        main.app.command(kind.replace("_", "-"))(stages._command(kind, "A fake stage."))
    yield
    main.app.registered_commands[:] = before


def test_dry_run_prints_the_plan_and_writes_nothing(workspace: Path, cli: Any) -> None:
    before = sorted(workspace.rglob("*"))
    ended = cli("run", "recipe.yaml", "--dry-run", "--output-dir", "out[INST]")
    assert ended.code == 0
    assert "small into out[INST]" in ended.out
    lines = ended.out.splitlines()
    for stage, inputs in [
        ("first", "base, talks"),
        ("judge", "first, pairs"),
        ("second", "first, talks, judge"),
    ]:
        (line,) = [line for line in lines if line.lstrip("│ ").startswith(f"{stage} ")]
        assert inputs in line
        assert f"-{stage}/model" in line
        assert "to run" in line
    assert sorted(workspace.rglob("*")) == before


def test_dry_run_tells_what_is_done(workspace: Path, cli: Any, change: Callable[[str, object], Path]) -> None:
    def states() -> list[str]:
        lines = cli("run", "recipe.yaml", "--dry-run").out.splitlines()
        return [line.split("│")[5].strip() for line in lines if "/model" in line]

    assert cli("run", "recipe.yaml", "--until", "judge").code == 0
    assert states() == ["done in 0:00:00", "done in 0:00:00", "to run"]
    change("stages.judge.training", {"steps": 2})
    assert states() == ["done in 0:00:00", "to run again (changed)", "to run"]


def test_dry_run_says_what_estimates_rest_on(workspace: Path, cli: Any) -> None:
    assert "GFLOP/s" not in cli("run", "recipe.yaml", "--dry-run").out  # no weights, no estimate
    header = json.dumps({"w": {"dtype": "F32", "shape": [1000, 1000], "data_offsets": [0, 0]}}).encode()
    file = workspace / "base_model" / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    out = cli("run", "recipe.yaml", "--dry-run").out
    assert re.search(r"lower bounds, at the [0-9,]+ GFLOP/s that a matrix product reaches here", out)
    assert out.count("≥ 15.3 MiB") == 3  # 16 bytes for each of a million parameters


def test_dry_run_takes_earlier_stages_as_they_are(workspace: Path, cli: Any, change: Any) -> None:
    """As the run does with --from: what is done before counts, though the recipe has changed."""
    assert cli("run", "recipe.yaml").code == 0
    change("stages.first.training", {"steps": 2})
    plan = cli("run", "recipe.yaml", "--from", "second", "--dry-run").out
    assert "not selected; done, since changed" in plan
    assert "│ to run" not in plan
    assert cli("run", "recipe.yaml", "--from", "second").code == 0
    events = [json.loads(line) for line in (workspace / "runs/small/events.jsonl").read_text().splitlines()]
    assert events[-2]["event"] == "run_started"


def test_dry_run_of_a_sweep_counts_the_runs(workspace: Path, cli: Any) -> None:
    ended = cli("run", "recipe.yaml", "sweep={seed: [1, 2, 3]}", "--dry-run")
    assert "sweep: 3 runs" in ended.out


def test_each_written_configuration_runs_alone(workspace: Path, cli: Any) -> None:
    """The stages run one by one give the run's own results, and the run then finds nothing to do."""
    assert cli("run", "recipe.yaml", "--output-dir", "whole").code == 0
    ended = cli("run", "recipe.yaml", "--output-dir", "out", "--dry-run", "--write-configs", "configs")
    assert ended.code == 0, ended.err
    assert [str(workspace / "configs" / f"{name}.yaml") in ended.out for name in FOLDERS] == [True] * 3
    for name in FOLDERS:
        ended = cli(KIND_OF[name], f"configs/{name}.yaml", "--output-dir", f"out/stages/{name}")
        assert ended.code == 0, ended.err
        for file in ("metrics.jsonl", "model/weights.txt"):
            made, wanted = (workspace / root / "stages" / name / file for root in ("out", "whole"))
            assert made.read_bytes() == wanted.read_bytes()
    assert cli("run", "recipe.yaml", "--output-dir", "out").code == 0
    events = [json.loads(line) for line in (workspace / "out/events.jsonl").read_text().splitlines()]
    assert "stage_started" not in {event["event"] for event in events}


def test_written_configurations_hold_generated_data(workspace: Path, cli: Any) -> None:
    arguments = ["data.talks={testbed: demonstrations, rows: 20}", "--output-dir", "out"]
    ended = cli("run", "recipe.yaml", *arguments, "--dry-run", "--write-configs", "configs")
    assert ended.code == 0, ended.err
    assert not (workspace / "out").exists()
    assert cli("fake-policy", "configs/01-first.yaml", "--output-dir", "alone").code == 0
    assert cli("run", "recipe.yaml", *arguments).code == 0
    alone, whole = (workspace / folder / "model/weights.txt" for folder in ("alone", "out/stages/01-first"))
    assert alone.read_bytes() == whole.read_bytes()


@pytest.fixture
def config(workspace: Path, cli: Any) -> Path:
    """The first stage's own configuration."""
    assert cli("run", "recipe.yaml", "--dry-run", "--write-configs", "configs").code == 0
    return workspace / "configs" / "01-first.yaml"


def test_unchanged_stage_is_not_run_again(workspace: Path, cli: Any, config: Path) -> None:
    def run(*overrides: str) -> tuple[bool, str]:
        ended = cli("fake-policy", config, *overrides, "--output-dir", "alone")
        assert ended.code == 0, ended.err
        return "done already" in ended.out, (workspace / "alone/model/weights.txt").read_text()

    again, first = run()
    assert not again
    assert run() == (True, first)
    assert run("seed=4")[0] is False
    assert run("seed=4", "device=cpu")[0] is True
    assert run() == (False, first)
    (workspace / "talks.jsonl").write_text("other\n")
    again, changed = run()
    assert not again
    assert changed != first


def test_configuration_is_kept_beside_the_result(workspace: Path, cli: Any, config: Path) -> None:
    """What ran, overrides included, with paths that lead to the inputs from there; it runs the same."""
    arguments = ["fake-policy", config, "training.steps=3", "--output-dir", "alone"]
    assert cli(*arguments).code == 0
    kept = yaml.safe_load((workspace / "alone" / "config.yaml").read_text())
    assert kept["training"]["steps"] == 3
    assert (kept["model"], kept["dialogues"]) == ("../base_model", ["../talks.jsonl"])
    again = cli("fake-policy", workspace / "alone" / "config.yaml", "--output-dir", "again")
    assert again.code == 0, again.err
    for file in ("metrics.jsonl", "model/weights.txt", "config.yaml"):
        assert (workspace / "alone" / file).read_bytes() == (workspace / "again" / file).read_bytes()
    in_place = cli("fake-policy", workspace / "alone" / "config.yaml", "--output-dir", "alone")
    assert "done already" in in_place.out


def test_interrupted_stage_continues(workspace: Path, cli: Any, other_process: Any, config: Path) -> None:
    arguments = ("fake-policy", config, "--output-dir")
    assert cli(*arguments, "whole").code == 0
    assert other_process(*arguments, "alone", action="alone:3:kill").code == -9
    assert other_process(*arguments, "alone", action="alone:5:SIGTERM").code == 143
    assert cli(*arguments, "alone").code == 0
    for file in ("metrics.jsonl", "model/weights.txt"):
        assert (workspace / "alone" / file).read_bytes() == (workspace / "whole" / file).read_bytes()


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["sed=1"], ["sed: unknown key", "seed"]),
        (["training.step=1"], ["training.step: unknown key", '"steps"']),
        (["training.steps=0", "precision=x"], ["training.steps: ", "precision: ", "2 problems"]),
        (["kind=fake_reward"], ['this command runs "fake_policy"', "fake_reward"]),
        (["model=gone"], ["model: no such model folder", "gone"]),
        (["dialogues=[gone.jsonl]"], ["dialogues: no such file", "gone.jsonl"]),
        (["base_model.path=./gone"], ["base_model.path: no such folder", "gone"]),
        (["name=x"], ["name: unknown key"]),
        (["seed"], ["KEY=VALUE"]),
    ],
)
def test_wrong_configuration(
    workspace: Path, cli: Any, config: Path, overrides: list[str], parts: list[str]
) -> None:
    ended = cli("fake-policy", config, *overrides, "--output-dir", "alone")
    assert ended.code == 2
    for part in parts:
        assert part in ended.err
    assert "Traceback" not in ended.both
    assert not (workspace / "alone").exists()


def test_wrong_files(workspace: Path, cli: Any, config: Path) -> None:
    (workspace / "list.yaml").write_text("- 1\n")
    (workspace / "file").write_text("")
    for arguments, part in [
        (["gone.yaml", "--output-dir", "alone"], "gone.yaml: no such file"),
        (["list.yaml", "--output-dir", "alone"], "list.yaml: a mapping"),
        ([config, "--output-dir", "file/alone"], "file/alone: cannot write here"),
        ([config], "--output-dir"),
    ]:
        ended = cli("fake-policy", *arguments)
        assert ended.code == 2
        assert part in ended.err
        assert "Traceback" not in ended.both


def test_folder_with_something_else_in_it(workspace: Path, cli: Any, config: Path) -> None:
    (workspace / "mine" / "model").mkdir(parents=True)
    (workspace / "mine" / "model" / "precious").write_text("x")
    ended = cli("fake-policy", config, "--output-dir", "mine")
    assert ended.code == 2
    assert "mine: holds model, which no stage made" in ended.err
    assert (workspace / "mine" / "model" / "precious").read_text() == "x"


@pytest.mark.parametrize(
    ("field", "given", "kept"),
    [("dialogues", "[alone/dataset.jsonl]", "dataset.jsonl"), ("model", "alone/model", "model")],
)
def test_inputs_in_the_folder_are_not_removed(
    workspace: Path, cli: Any, config: Path, field: str, given: str, kept: str
) -> None:
    """As when a stage is to go on from what it made, in the same folder."""
    assert cli("fake-policy", config, "--output-dir", "alone").code == 0
    (workspace / "alone" / "dataset.jsonl").write_text("row\n")
    overrides = f"{field}={given.replace('alone', str(workspace / 'alone'))}"
    ended = cli("fake-policy", config, overrides, "--output-dir", "alone")
    assert ended.code == 2
    assert f"alone: {field} names {kept} in it" in ended.err
    assert "choose another --output-dir" in ended.err
    assert (workspace / "alone" / kept).exists()
    assert (workspace / "alone" / "done.json").exists()
    assert cli("fake-policy", config, overrides, "--output-dir", "other").code == 0


@pytest.mark.parametrize("name", ["asked.jsonl", "instructions.jsonl"])
def test_what_another_configuration_asked_for_is_removed(
    workspace: Path, cli: Any, config: Path, name: str
) -> None:
    """A stage that found its predecessor's lists would train on those."""
    assert cli("fake-policy", config, "--output-dir", "alone").code == 0
    (workspace / "alone" / name).write_text("row\n")
    assert cli("fake-policy", config, "--output-dir", "alone").code == 0
    assert (workspace / "alone" / name).exists()
    assert cli("fake-policy", config, "seed=4", "--output-dir", "alone").code == 0
    assert not (workspace / "alone" / name).exists()


def test_relative_paths_start_from_the_file(
    workspace: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (workspace / "here").mkdir()
    mapping = {"base_model": "../base_model", "model": "base", "dialogues": ["../talks.jsonl"]}
    (workspace / "here" / "stage.yaml").write_text(yaml.safe_dump(mapping))
    (workspace / "elsewhere").mkdir()
    monkeypatch.chdir(workspace / "elsewhere")
    ended = cli("fake-policy", "../here/stage.yaml", "--output-dir", "alone")
    assert ended.code == 0, ended.err
    assert (workspace / "elsewhere/alone/model/weights.txt").exists()


@pytest.fixture
def with_data(workspace: Path) -> Path:
    """A stage's configuration that names its data as a recipe does: a file, generated rows, one entry not used."""
    mapping = {
        "base_model": "base_model",
        "model": "base",
        "dialogues": ["mine", "made", "talks.jsonl"],
        "data": {
            "mine": {"path": "talks.jsonl"},
            "made": {"testbed": "demonstrations", "rows": 20},
            "unused": {"testbed": "prompts", "rows": 5},
        },
    }
    (workspace / "stage.yaml").write_text(yaml.safe_dump(mapping))
    return workspace / "stage.yaml"


def test_a_stage_alone_prepares_the_data_that_it_names(workspace: Path, cli: Any, with_data: Path) -> None:
    """Into its own folder, where its resolved configuration finds it; a second call finds nothing to do."""
    ended = cli("fake-policy", with_data, "--output-dir", "alone")
    assert ended.code == 0, ended.err
    assert sorted(file.name for file in (workspace / "alone/data").iterdir()) == ["made.json", "made.jsonl"]
    assert len((workspace / "alone/data/made.jsonl").read_text().splitlines()) == 20
    kept = yaml.safe_load((workspace / "alone/config.yaml").read_text())
    assert kept["dialogues"] == ["../talks.jsonl", "data/made.jsonl", "../talks.jsonl"]
    assert "data" not in kept
    assert "done already" in cli("fake-policy", with_data, "--output-dir", "alone").out
    again = cli("fake-policy", with_data, "data.made.rows=21", "--output-dir", "alone")
    assert again.code == 0
    assert "done already" not in again.out
    assert len((workspace / "alone/data/made.jsonl").read_text().splitlines()) == 21


def test_a_configuration_with_data_runs_in_its_own_folder(workspace: Path, cli: Any, with_data: Path) -> None:
    """The same file as DIR/config.yaml gives the same weights as from elsewhere."""
    assert cli("fake-policy", with_data, "--output-dir", "alone").code == 0
    mapping = yaml.safe_load(with_data.read_text())
    mapping["base_model"] = str(workspace / "base_model")
    mapping["data"]["mine"]["path"] = mapping["dialogues"][2] = str(workspace / "talks.jsonl")
    (workspace / "here").mkdir()
    (workspace / "here/config.yaml").write_text(yaml.safe_dump(mapping))
    ended = cli("fake-policy", "here/config.yaml", "--output-dir", "here")
    assert ended.code == 0, ended.err
    here, alone = (workspace / folder / "model/weights.txt" for folder in ("here", "alone"))
    assert here.read_bytes() == alone.read_bytes()


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("dialogues=[mad]", 'mad (did you mean "made"?)'),
        ("data.made.rows=0", "data.made.rows: "),
        ("data.mine.path=gone.jsonl", "data.mine.path: no such file: "),
        ("data.made=3", "data.made: a path or a mapping is wanted"),
        ("data=3", "data: a mapping of names to entries is wanted"),
        ("dat={}", 'dat: unknown key (did you mean "data"?)'),
    ],
)
def test_mistakes_in_a_stages_data(
    workspace: Path, cli: Any, with_data: Path, override: str, part: str
) -> None:
    ended = cli("fake-policy", with_data, override, "--output-dir", "alone")
    assert ended.code == 2
    assert part in ended.err
    assert not (workspace / "alone").exists()
