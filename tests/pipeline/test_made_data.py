"""Data that an earlier stage has made, mixed into the training of a later one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from llama2_chat.errors import RecipeError
from llama2_chat.pipeline.recipe import load_recipe

Change = Callable[[str, object], Path]
MAKER = {"kind": "fake_maker", "model": "first", "dialogues": ["talks"]}


@pytest.fixture
def makers(change: Change) -> None:
    change("stages.maker", MAKER)
    change("stages.later", {**MAKER, "model": "maker", "sft_dialogues": ["maker", "talks"]})


def run(cli: Any) -> list[str]:
    """Run the recipe; the stages that were not done already."""
    ended = cli("run", "recipe.yaml", "--output-dir", "out")
    assert ended.code == 0, ended.err
    return [line.split()[1] for line in ended.err.splitlines() if line.endswith(": starts")]


def test_a_stage_gets_what_an_earlier_one_made(makers: None, workspace: Path, cli: Any) -> None:
    assert run(cli) == ["first", "judge", "second", "maker", "later"]
    config = yaml.safe_load(Path("out/stages/05-later/config.yaml").read_text())
    maker, talks = ((Path("out/stages/05-later") / name).resolve() for name in config["sft_dialogues"])
    assert maker == (workspace / "out/stages/04-maker/dataset.jsonl").resolve()
    assert talks.name == "talks.jsonl"
    assert run(cli) == []


def test_what_was_made_counts_as_an_input(makers: None, workspace: Path, cli: Any, change: Change) -> None:
    run(cli)
    first = json.loads(Path("out/stages/05-later/done.json").read_text())
    change("stages.maker.training", {"steps": 3})
    assert run(cli) == ["maker", "later"]
    assert json.loads(Path("out/stages/05-later/done.json").read_text())["metrics"] != first["metrics"]


def test_a_part_of_what_was_made_is_named_after_a_dot(
    makers: None, workspace: Path, cli: Any, change: Change
) -> None:
    change("stages.later.sft_dialogues", ["maker.others"])
    run(cli)
    later = Path("out/stages/05-later")
    (file,) = yaml.safe_load((later / "config.yaml").read_text())["sft_dialogues"]
    assert (later / file).resolve() == Path("out/stages/04-maker/others.jsonl").resolve()


def test_an_entry_of_that_name_comes_first(makers: None, workspace: Path, cli: Any, change: Change) -> None:
    change("data.maker", "talks.jsonl")
    run(cli)
    config = yaml.safe_load(Path("out/stages/05-later/config.yaml").read_text())
    assert {Path(name).name for name in config["sft_dialogues"]} == {"talks.jsonl"}


def test_the_plan_and_its_configurations_know_it(makers: None, workspace: Path, cli: Any) -> None:
    planned = cli("run", "recipe.yaml", "--output-dir", "out", "--dry-run", "--write-configs", "configs")
    assert planned.code == 0, planned.err
    (file,) = Path("configs").glob("*later.yaml")
    assert "04-maker/dataset.jsonl" in yaml.safe_load(file.read_text())["sft_dialogues"][0]


@pytest.mark.parametrize(
    ("key", "value", "parts"),
    [
        ("stages.maker.sft_dialogues", ["later"], ['no data entry "later"', "talks, pairs"]),
        (
            "stages.later.sft_dialogues",
            ["first"],
            ['no data entry "first"', "talks, pairs, maker, maker.others"],
        ),
        ("stages.later.sft_dialogues", ["maker.samples"], ['no data entry "maker.samples"']),
        ("stages.later.dialogues", ["maker"], ['no data entry "maker"', "talks, pairs"]),
    ],
)
def test_only_what_is_made_before_can_be_mixed_in(
    makers: None, change: Change, key: str, value: object, parts: list[str]
) -> None:
    change(key, value)
    with pytest.raises(RecipeError) as caught:
        load_recipe("recipe.yaml")
    for part in [key, *parts]:
        assert part in str(caught.value)
