"""Everything wrong with a recipe is reported at once, each problem with its dotted key."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from llama2_chat.errors import MissingFileError, RecipeError, UserInputError
from llama2_chat.pipeline.recipe import load_recipe, packaged_recipes

BROKEN = """\
name: broken
sed: 1
base_model: no_such_folder
precision: float8
data:
  talks: talks.jsonl
  gone: gone.jsonl
  odd: 7
  made: {testbed: demonstration, rows: 10}
stages:
  first:
    kind: fake_policy
    model: base
    dialogues: [talk]
    training: {learning_rat: 0.1, steps: many}
  second:
    kind: fake_policy
    model: third
    dialogues: [talks]
    helpfulness: base
  typo:
    kind: fake_polcy
  third:
    kind: fake_policy
    model: secnd
    dialogues: talks
  fourth:
    kind: fake_policy
    model: base
    dialogues: [talk]
    helpfulness: second
    training: {learning_rate: -1}
"""


@pytest.fixture
def problems(workspace: Path) -> list[str]:
    (workspace / "recipe.yaml").write_text(BROKEN)
    with pytest.raises(RecipeError) as caught:
        load_recipe("recipe.yaml")
    return list(caught.value.problems)


@pytest.mark.parametrize(
    ("key", "parts"),
    [
        ("sed", ["unknown key", 'did you mean "seed"', "allowed:", "stages"]),
        ("precision", ["float32", "bfloat16", "float8"]),
        ("base_model.path", ["no such folder", "no_such_folder"]),
        ("data.gone.path", ["no such file", "gone.jsonl"]),
        ("data.odd", ["a path or a mapping", "7"]),
        ("data.made.testbed", ['did you mean "demonstrations"']),
        ("stages.first.training.learning_rat", ["unknown key", 'did you mean "learning_rate"', "steps"]),
        ("stages.first.training.steps", ["integer", "'many'"]),
        ("stages.first.dialogues", ['no data entry "talk"', 'did you mean "talks"']),
        ("stages.second.model", ['"third" comes later', "allowed here: base, first"]),
        ("stages.second.helpfulness", ['"base" is not a reward model']),
        ("stages.third.model", ['"secnd" is no stage', 'did you mean "second"']),
        ("stages.fourth.helpfulness", ['"second" is not a reward model']),
        ("stages.typo.kind", ['did you mean "fake_policy"', "fake_reward", "sft"]),
        ("stages.third.dialogues", ["list"]),
        ("stages.fourth.training.learning_rate", ["greater than 0", "-1"]),
    ],
)
def test_each_problem_names_key_and_remedy(problems: list[str], key: str, parts: list[str]) -> None:
    found = [problem for problem in problems if problem.startswith(f"{key}: ")]
    assert len(found) == 1, problems
    for part in parts:
        assert part in found[0]


@pytest.mark.parametrize(
    ("changed_key", "value", "parts"),
    [
        ("stages.first.dialogues", ["talk"], ["stages.first.dialogues", 'did you mean "talks"', "pairs"]),
        ("stages.judge.model", "second", ['"second" comes later', "allowed here: base, first"]),
        ("stages.judge.model", "fist", ['"fist" is no stage', 'did you mean "first"']),
        ("stages.second.model", "judge", ['stages.second.model: "judge" is not a policy']),
        ("stages.second.helpfulness", "first", ['"first" is not a reward model', "allowed here: judge"]),
        ("stages.second.helpfulness", "base", ['"base" is not a reward model']),
        ("stages.first.model", "first", ["stages.first.model", "allowed here: base"]),
        ("stages", {}, ["stages: ", "at least one"]),
        ("stages", ["first"], ["stages: a mapping"]),
        ("data", "talks.jsonl", ["data: a mapping"]),
        ("data", None, ["stages.first.dialogues", 'no data entry "talks"']),
        ("base_model", None, ["base_model: required"]),
        ("base_model", "./owner/model", ["base_model.path: no such folder"]),
        ("data", {"../talks": "talks.jsonl"}, ["data.../talks: a data entry's name is"]),
        ("name", "a/b", ["name: ", "pattern"]),
        ("name", None, ["name: required"]),
        ("seed", -1, ["seed: ", "greater than or equal to 0"]),
        ("seed", "x", ["seed: ", "integer"]),
        ("device", "gpu", ["device: "]),
        ("stages.first.training", {"learning_rate": math.inf}, ["training.learning_rate: ", "finite number"]),
        ("stages.first", ["kind"], ["stages.first"]),
        ("stages.first.kind", ["fake_policy"], ["stages.first.kind"]),
        ("stages.first.model", 5, ["stages.first.model: ", "string"]),
        ("evaluation", {"helpfulness": "judge", "promts": ["talks"]}, ["evaluation.promts", '"prompts"']),
        ("evaluation", {"helpfulness": "first", "prompts": ["x"]}, ['evaluation.helpfulness: "first"']),
    ],
)
def test_one_mistake(
    change: Callable[[str, object], Path], changed_key: str, value: object, parts: list[str]
) -> None:
    if changed_key == "evaluation":
        (file := Path("recipe.yaml")).write_text(file.read_text() + "evaluation: {}\n")
    elif changed_key == "device":
        (file := Path("recipe.yaml")).write_text(file.read_text() + "device: cpu\n")
    change(changed_key, value)
    with pytest.raises(RecipeError) as caught:
        load_recipe("recipe.yaml")
    for part in parts:
        assert part in str(caught.value)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize(
    ("changed_key", "value", "problem"),
    [
        ("seed", True, "seed: Input should be a valid integer (found True)"),
        ("seed", "1", "seed: Input should be a valid integer (found '1')"),
        ("seed", 1.0, "seed: Input should be a valid integer (found 1.0)"),
        ("stages.first.training", {"learning_rate": "1e-5"}, "stages.first.training.learning_rate: "),
        ("stages.first.training", {"learning_rate": True}, "stages.first.training.learning_rate: "),
        ("stages.first.training", 3, "stages.first.training: "),
        ("stages.first.dialogues", ["talks", 1], "stages.first.dialogues.1: "),
        ("stages.first.dialogues", [], "stages.first.dialogues: "),
        ("name", 1, "name: Input should be a valid string (found 1)"),
    ],
)
def test_types_are_strict(
    change: Callable[[str, object], Path], changed_key: str, value: object, problem: str
) -> None:
    change(changed_key, "REPLACED")
    file = Path("recipe.yaml")
    file.write_text(file.read_text().replace("REPLACED", json.dumps(value)))
    with pytest.raises(RecipeError) as caught:
        load_recipe("recipe.yaml")
    (found,) = caught.value.problems
    assert found.startswith(problem)


def test_whole_numbers_are_good_for_fractions(change: Callable[[str, object], Path]) -> None:
    change("stages.first.training", {"learning_rate": 1})
    assert load_recipe("recipe.yaml").stages["first"].model_dump()["training"]["learning_rate"] == 1.0


@pytest.mark.parametrize(
    ("margin", "key", "parts"),
    [
        ("medium", "margin", ["'none', 'small' or 'large'", ", or: ", "dictionary", "'medium'"]),
        ({"better": "x"}, "margin.better", ["number", "'x'"]),
        ({"betterr": 1.0}, "margin", ["betterr", "negligibly_better"]),
    ],
)
def test_a_field_with_two_types_gives_one_line(
    change: Callable[[str, object], Path], margin: object, key: str, parts: list[str]
) -> None:
    """Of the real reward stage: a table's name, or a margin for each rating."""
    change(
        "stages.judge",
        {"kind": "reward", "model": "base", "domain": "safety", "preferences": ["pairs"], "margin": margin},
    )
    change("stages.second.helpfulness", "judge")
    with pytest.raises(RecipeError) as caught:
        load_recipe("recipe.yaml")
    (found,) = [problem for problem in caught.value.problems if problem.startswith(f"stages.judge.{key}: ")]
    for part in parts:
        assert part in found


@pytest.mark.parametrize("name", ["base", "evaluation", "a/b", "1x"])
def test_names_that_no_stage_may_have(workspace: Path, name: str) -> None:
    text = (workspace / "recipe.yaml").read_text()
    (workspace / "recipe.yaml").write_text(text.replace("  second:", f"  {name}:"))
    with pytest.raises(RecipeError) as caught:
        load_recipe("recipe.yaml")
    assert f"stages.{name}: a stage's name is" in str(caught.value)


def test_names_that_are_no_text(workspace: Path) -> None:
    text = (workspace / "recipe.yaml").read_text()
    (workspace / "recipe.yaml").write_text(
        "1: x\n" + text.replace("  talks: talks.jsonl", "  2: talks.jsonl").replace("  first:", "  3:")
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe("recipe.yaml")
    message = str(caught.value)
    assert "stages.3: a stage's name is" in message
    assert "data.2: " in message
    assert 'stages.judge.model: "first" is no stage' in message


def test_a_broken_stage_gives_no_second_error_where_it_is_used(
    change: Callable[[str, object], Path],
) -> None:
    change("stages.first.training", {"steps": 0})
    with pytest.raises(RecipeError) as caught:
        load_recipe("recipe.yaml")
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["stages.first.training.steps"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("name: small\nstages: [\n", ["recipe.yaml:3: not valid YAML"]),
        ("name: small\n\tseed: 1\n", ["recipe.yaml:2: not valid YAML"]),
        ("name: small\nseed: 1\nseed: 2\n", ["recipe.yaml:3", '"seed" stands twice']),
        ("name: a\nstages:\n  s: {kind: x}\n  s: {kind: y}\n", ["recipe.yaml:4", '"s" stands twice']),
        ("- a\n- b\n", ["a mapping", "list"]),
        ("", ["a mapping", "NoneType"]),
        ("name: !!python/object/apply:os.system [ls]\n", ["recipe.yaml:1: not valid YAML"]),
        ("? [a, b]\n: 1\n", ["recipe.yaml:1"]),
        ("name: 'a\x07b'\n", ["recipe.yaml", "not valid YAML"]),
    ],
)
def test_malformed_yaml(workspace: Path, text: str, parts: list[str]) -> None:
    (workspace / "recipe.yaml").write_text(text)
    with pytest.raises(UserInputError) as caught:
        load_recipe("recipe.yaml")
    for part in parts:
        assert part in str(caught.value)


def test_text_that_is_not_utf_8(workspace: Path) -> None:
    (workspace / "recipe.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(UserInputError, match=r"recipe\.yaml: not UTF-8 text .* byte 9"):
        load_recipe("recipe.yaml")


def test_unknown_recipe_name() -> None:
    with pytest.raises(MissingFileError, match=r'tinny: .*did you mean "tiny".*packaged are .*tiny'):
        load_recipe("tinny")


def test_merge_keys_still_work(workspace: Path) -> None:
    text = (workspace / "recipe.yaml").read_text()
    text = text.replace("  judge:", "  again:\n    <<: *f\n    training: {steps: 2}\n  judge:")
    (workspace / "recipe.yaml").write_text(text.replace("  first:\n", "  first: &f\n"))
    again = load_recipe("recipe.yaml").stages["again"]
    assert again.model_dump()["dialogues"] == ["talks"]
    assert again.model_dump()["training"]["steps"] == 2


@pytest.mark.parametrize("name", packaged_recipes())
def test_packaged_recipes_know_their_keys(name: str) -> None:
    """Files may be missing (real data is not shipped); keys may not be wrong."""
    problems: tuple[str, ...] = ()
    try:
        load_recipe(name)
    except RecipeError as error:
        problems = error.problems
    assert [problem for problem in problems if "no such f" not in problem] == []
