"""Values from the command line and the environment, sweeps, and the JSON Schema."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from llama2_chat.errors import RecipeError, UserInputError
from llama2_chat.pipeline.recipe import Recipe, load_recipe, packaged_recipes
from llama2_chat.pipeline.schema import recipe_schema
from llama2_chat.pipeline.yaml_files import dump, expand, parse


def rate_of(recipe: Recipe, stage: str) -> object:
    return recipe.stages[stage].model_dump()["training"]["learning_rate"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E+3", 1000.0),
        ("-2.5e-1", -0.25),
        ("2.e3", 2000.0),
        ("'1e-5'", "1e-5"),
        ("1e-5x", "1e-5x"),
        ("0x1e5", 0x1E5),
        ("12", 12),
        ("true", True),
    ],
)
def test_numbers_in_yaml(text: str, value: object) -> None:
    assert parse(text) == value
    assert type(parse(text)) is type(value)


@pytest.mark.parametrize(
    "value", ["1e-5", "2E7", "12", "1.5", "true", "null", "a: b", "[INST]", "é\n\n x", 1e-5]
)
def test_what_is_written_is_read_back(value: object) -> None:
    assert parse(dump({"key": [value]})) == {"key": [value]}
    assert type(parse(dump(value))) is type(value)


def test_numbers_in_yaml_reach_the_recipe(workspace: Path) -> None:
    assert rate_of(load_recipe("recipe.yaml"), "second") == 1e-5


def test_overrides(workspace: Path) -> None:
    recipe = load_recipe(
        "recipe.yaml",
        [
            "seed=9",
            "stages.first.training.learning_rate=3e-4",  # makes the mapping that is not there
            "stages.second.training={steps: 2}",
            "stages.second.dialogues=[talks, pairs]",
            "data.talks=pairs.jsonl",
            "base_model.path=base_model",
            "name=other",
        ],
    )
    assert (recipe.head.seed, recipe.head.name) == (9, "other")
    assert rate_of(recipe, "first") == 3e-4
    assert rate_of(recipe, "second") == 1e-3  # the default: the whole mapping was replaced
    assert recipe.stages["second"].model_dump()["dialogues"] == ["talks", "pairs"]
    assert recipe.data["talks"].path == "pairs.jsonl"  # type: ignore[union-attr]
    assert load_recipe("recipe.yaml").head.seed == 3


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["seed"], ['"seed": an override has the form KEY=VALUE']),
        (["=1", "seed=[1"], ['"=1": an override', "seed: '[1' is not valid YAML"]),
        (["name.x=1"], ["name.x: ", "small", "not a mapping"]),
        (["sed=1"], ["sed: unknown key", 'did you mean "seed"']),
        (["stages.first.training.step=1"], ["stages.first.training.step: unknown key", '"steps"']),
        (["stages.frist.training.steps=1"], ["stages.frist", 'did you mean "first"']),
        (["seed=x"], ["seed: ", "integer"]),
    ],
)
def test_wrong_overrides(workspace: Path, overrides: list[str], parts: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("recipe.yaml", overrides)
    for part in parts:
        assert part in str(caught.value)


def test_environment_variables(
    workspace: Path, change: Callable[[str, object], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    change("data.talks", "${TEST_FOLDER:-.}/talks.jsonl")
    monkeypatch.delenv("TEST_FOLDER", raising=False)
    assert load_recipe("recipe.yaml").data["talks"].path == f"{workspace}/talks.jsonl"  # type: ignore[union-attr]
    monkeypatch.setenv("TEST_FOLDER", str(workspace))
    assert load_recipe("recipe.yaml").data["talks"].path == f"{workspace}/talks.jsonl"  # type: ignore[union-attr]
    from_command_line = load_recipe("recipe.yaml", ["data.pairs=${TEST_FOLDER}/talks.jsonl"])
    assert from_command_line.data["pairs"].path == f"{workspace}/talks.jsonl"  # type: ignore[union-attr]


def test_variables_with_relative_paths_start_from_the_current_folder(
    workspace: Path, change: Callable[[str, object], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever sets a variable sees the current folder, not the recipe's; all other paths start there."""
    change("data.talks", "${TEST_FOLDER:-..}/talks.jsonl")
    change("base_model", "${TEST_BASE:-./base_model}")
    (workspace / "below").mkdir()
    monkeypatch.chdir(workspace / "below")
    monkeypatch.delenv("TEST_FOLDER", raising=False)
    recipe = load_recipe("../recipe.yaml")
    talks = recipe.folder / recipe.data["talks"].path  # type: ignore[union-attr]
    assert talks.resolve() == workspace / "talks.jsonl"
    assert recipe.head.base_model.path == "./base_model"  # nothing of that name here: the recipe's folder
    (workspace / "below" / "base_model").mkdir()
    assert load_recipe("../recipe.yaml").head.base_model.path == f"{workspace}/below/base_model"
    monkeypatch.setenv("TEST_BASE", "owner/model")
    assert load_recipe("../recipe.yaml").head.base_model.path == "owner/model"  # a hub id stays one


def test_environment_variable_that_is_not_set(
    change: Callable[[str, object], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TEST_FOLDER", raising=False)
    file = change("data.talks", "${TEST_FOLDER}/talks.jsonl")
    with pytest.raises(UserInputError, match=rf"{file}: environment variable TEST_FOLDER is not set"):
        load_recipe(str(file))


def test_expansion_leaves_other_text_alone() -> None:
    assert expand("$HOME ${a-b} {x} [INST] $", "file") == "$HOME ${a-b} {x} [INST] $"
    assert expand({"a": ["${TEST_NOT_SET:-}", 1, None]}, "file") == {"a": ["", 1, None]}


def test_relative_paths_start_from_the_recipe(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (workspace / "elsewhere").mkdir()
    monkeypatch.chdir(workspace / "elsewhere")
    assert load_recipe("../recipe.yaml").folder == workspace
    assert load_recipe("..").folder == workspace


def test_sweep_runs_once_per_combination(workspace: Path, cli: Any, change: Any) -> None:
    (workspace / "recipe.yaml").write_text(
        (workspace / "recipe.yaml").read_text()
        + "sweep: {seed: [1, 2], stages.first.training.learning_rate: [1e-5, 0.1]}\n"
    )
    ended = cli("run", "recipe.yaml", "--output-dir", "out")
    assert ended.code == 0, ended.err
    summaries = sorted((workspace / "out").rglob("summary.json"))
    finals = set()
    for file in summaries:
        summary = json.loads(file.read_text())
        assert f"seed={summary['seed']}," in file.parent.name
        finals.add(summary["stages"]["second"]["final"])
    assert len(summaries) == len(finals) == 4
    # One of them is the same as the plain run with these values.
    plain = cli("run", "recipe.yaml", "sweep={}", "seed=2", "stages.first.training.learning_rate=0.1")
    assert plain.code == 0
    alone = json.loads((workspace / "runs" / "small" / "summary.json").read_text())
    assert alone["stages"]["second"]["final"] in finals


@pytest.mark.parametrize(
    ("sweep", "parts"),
    [
        ("{seed: [1, x]}", ["seed: ", "integer", "'x'"]),
        ("{sed: [1]}", ["sed: unknown key"]),
        ("{seed: []}", ["sweep.seed: ", "at least 1 item"]),
        ("{seed: 1}", ["sweep.seed: ", "list"]),
        ("{stages.first.training.step: [1]}", ['did you mean "steps"']),
    ],
)
def test_wrong_sweep_runs_nothing(workspace: Path, cli: Any, sweep: str, parts: list[str]) -> None:
    (workspace / "recipe.yaml").write_text((workspace / "recipe.yaml").read_text() + f"sweep: {sweep}\n")
    ended = cli("run", "recipe.yaml")
    assert ended.code == 2
    for part in parts:
        assert part in ended.err
    assert "Traceback" not in ended.err
    assert not (workspace / "runs").exists()


def test_sweep_values_of_every_type(workspace: Path, cli: Any, change: Any) -> None:
    (workspace / "recipe.yaml").write_text(
        (workspace / "recipe.yaml").read_text()
        + "sweep: {stages.second.helpfulness: [null, judge], stages.first.training: [{steps: 1}]}\n"
    )
    ended = cli("run", "recipe.yaml")
    assert ended.code == 0, ended.err
    assert len(list((workspace / "runs" / "small").rglob("summary.json"))) == 2


def fits(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    """Whether a value satisfies a JSON Schema, for the keywords that recipe schemas use."""
    if "$ref" in schema:
        return fits(value, root["$defs"][schema["$ref"].rsplit("/", 1)[-1]], root)
    if "anyOf" in schema and not any(fits(value, option, root) for option in schema["anyOf"]):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if "const" in schema and value != schema["const"]:
        return False
    types = {
        "object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool,
        "null": type(None),
    }  # fmt: skip
    if "type" in schema and not isinstance(value, types[schema["type"]]):
        return False
    if isinstance(value, dict):
        known = schema.get("properties", {})
        rest = schema.get("additionalProperties", True)
        return (
            len(value) >= schema.get("minProperties", 0)
            and all(key in value for key in schema.get("required", []))
            and all(fits(item, known[key], root) for key, item in value.items() if key in known)
            and all(
                rest if isinstance(rest, bool) else fits(item, rest, root)
                for key, item in value.items()
                if key not in known
            )
        )
    if isinstance(value, list):
        return all(fits(item, schema.get("items", {}), root) for item in value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return not (
            value < schema.get("minimum", value)
            or value > schema.get("maximum", value)
            or value <= schema.get("exclusiveMinimum", value - 1)
            or value >= schema.get("exclusiveMaximum", value + 1)
        )
    return True


@pytest.mark.parametrize("name", packaged_recipes())
def test_schema_accepts_the_packaged_recipes(name: str) -> None:
    schema = recipe_schema()
    recipe = parse(packaged_recipes()[name].read_text())
    assert fits(recipe, schema, schema)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sed", 1),
        ("seed", -1),
        ("precision", "float8"),
        ("stages", {}),
        ("stages.first.kind", "fake_polcy"),
        ("stages.first.training", {"steps": 0}),
        ("stages.first.training", {"learning_rate": 0}),
        ("stages.first.dialogues", "talks"),
        ("data.talks", {"pth": "x"}),
    ],
)
def test_schema_refuses_what_the_validator_refuses(
    workspace: Path, change: Callable[[str, object], Path], key: str, value: object
) -> None:
    schema = recipe_schema()
    before = yaml.safe_load((workspace / "recipe.yaml").read_text())
    before["stages"]["second"]["training"]["learning_rate"] = 1e-5  # safe_load reads 1e-5 as text
    assert fits(before, schema, schema)
    after = parse(change(key, value).read_text())
    assert not fits(after, schema, schema)
    with pytest.raises(RecipeError):
        load_recipe("recipe.yaml")


def test_schema_command_prints_it(cli: Any) -> None:
    ended = cli("validate", "--schema")
    assert ended.code == 0
    assert json.loads(ended.out) == recipe_schema()
