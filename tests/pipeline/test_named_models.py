"""A recipe with a second base model by name: what it may stand for, and that its contents count."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from llama2_chat.errors import RecipeError
from llama2_chat.pipeline.recipe import load_recipe
from llama2_chat.pipeline.schema import recipe_schema
from llama2_chat.settings import BaseModelSource, RunSettings

Change = Callable[[str, object], Path]


@pytest.fixture
def small(workspace: Path, change: Change) -> Path:
    """The folder of a model `small`, from which the stage `second` starts."""
    folder = workspace / "small_model"
    folder.mkdir()
    (folder / "weights.txt").write_text("small\n")
    change("models", {"small": "small_model"})
    change("stages.second.model", "small")
    return folder


def run(cli: Any) -> list[str]:
    """Run the recipe; the stages that were not done already."""
    ended = cli("run", "recipe.yaml", "--output-dir", "out")
    assert ended.code == 0, ended.err
    return [line.split()[1] for line in ended.err.splitlines() if line.endswith(": starts")]


def final() -> int:
    number: int = json.loads(Path("out/stages/03-second/done.json").read_text())["metrics"]["final"]
    return number


def test_a_stage_starts_from_it_and_its_contents_count(small: Path, cli: Any) -> None:
    assert run(cli) == ["first", "judge", "second"]
    config = yaml.safe_load(Path("out/stages/03-second/config.yaml").read_text())
    assert Path(config["model"]) == small
    assert config["models"] == {"small": {"path": str(small), "gguf_file": None}}
    before = final()
    assert run(cli) == []
    (small / "weights.txt").write_text("other\n")
    assert run(cli) == ["second"]
    assert final() != before


def test_where_it_lies_and_what_it_is_called_do_not_count(small: Path, cli: Any, change: Change) -> None:
    run(cli)
    small.rename(small.with_name("moved"))
    change("models", {"tiny": {"path": "moved"}})
    change("stages.second.model", "tiny")
    assert run(cli) == []


def test_a_model_that_nobody_uses_changes_no_stage(workspace: Path, cli: Any, change: Change) -> None:
    assert run(cli) == ["first", "judge", "second"]
    change("models", {"again": "base_model"})
    assert run(cli) == []
    change("stages.second.model", "again")
    assert run(cli) == ["second"]  # `first` made it before
    change("stages.second.model", "base")
    assert run(cli) == []  # one folder under two names is one model


def test_which_gguf_file_is_meant_counts(small: Path, cli: Any, change: Change) -> None:
    for name in ("a.gguf", "b.gguf"):
        (small / name).write_text(name)
    change("models", {"small": {"path": "small_model", "gguf_file": "a.gguf"}})
    assert run(cli) == ["first", "judge", "second"]
    change("models", {"small": {"path": "small_model", "gguf_file": "b.gguf"}})
    assert run(cli) == ["second"]


def test_the_resolved_recipe_gives_the_same_run_anywhere(small: Path, cli: Any, tmp_path: Path) -> None:
    run(cli)
    again = load_recipe(str(Path("out/recipe.yaml")))
    assert again.to_mapping() == load_recipe("recipe.yaml").to_mapping()
    assert again.head.models["small"].path == str(small)


def test_the_stage_alone_counts_as_done_in_the_run(small: Path, cli: Any, other_process: Any) -> None:
    run(cli)
    before = final()
    planned = cli("run", "recipe.yaml", "--output-dir", "out", "--dry-run", "--write-configs", "configs")
    assert planned.code == 0, planned.err
    target = Path("out/stages/03-second")
    (target / "done.json").unlink()
    alone = other_process("fake-policy", "configs/03-second.yaml", "--output-dir", str(target))
    assert alone.code == 0, alone.err
    assert run(cli) == []
    assert final() == before


def test_a_configuration_alone_may_use_the_name(small: Path, other_process: Any) -> None:
    head = {"base_model": "base_model", "models": {"small": "small_model"}}
    mapping = {**head, "model": "small", "dialogues": ["talks.jsonl"]}
    Path("one.yaml").write_text(yaml.safe_dump(mapping))
    assert other_process("fake-policy", "one.yaml", "--output-dir", "named").code == 0
    Path("one.yaml").write_text(yaml.safe_dump({**mapping, "model": "small_model"}))
    assert other_process("fake-policy", "one.yaml", "--output-dir", "path").code == 0
    found = [json.loads(Path(f"{name}/done.json").read_text())["fingerprint"] for name in ("named", "path")]
    assert found[0] == found[1]
    Path("one.yaml").write_text(yaml.safe_dump({**mapping, "model": "smal"}))
    ended = other_process("fake-policy", "one.yaml", "--output-dir", "wrong")
    assert ended.code == 2
    assert 'smal (did you mean "small"?)' in ended.err


def write_config(folder: Path, **config: object) -> None:
    (folder / "config.json").write_text(json.dumps(config))


REWARD_MODEL = {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}


def test_a_reward_model_may_stand_where_one_may(small: Path, cli: Any, change: Change) -> None:
    judge = small.with_name("judge_model")
    judge.mkdir()
    write_config(judge, **REWARD_MODEL)
    change("models", {"small": "small_model", "own_judge": "judge_model"})
    change("stages.second.helpfulness", "own_judge")
    assert run(cli) == ["first", "judge", "second"]
    config = yaml.safe_load(Path("out/stages/03-second/config.yaml").read_text())
    assert Path(config["helpfulness"]) == judge
    before = final()
    (judge / "weights.txt").write_text("other\n")
    assert run(cli) == ["second"]
    assert final() != before
    change("stages.second.model", "own_judge")
    with pytest.raises(
        RecipeError, match=r'stages.second.model: "own_judge" is not a policy.*allowed here: base, small'
    ):
        load_recipe("recipe.yaml")


def test_a_configuration_alone_may_name_a_reward_model(small: Path, other_process: Any) -> None:
    head = {"base_model": "base_model", "models": {"own": "small_model"}}
    mapping = {**head, "model": "base", "dialogues": ["talks.jsonl"], "helpfulness": "own"}
    Path("one.yaml").write_text(yaml.safe_dump(mapping))
    assert other_process("fake-policy", "one.yaml", "--output-dir", "named").code == 0
    judge = yaml.safe_load(Path("named/config.yaml").read_text())["helpfulness"]
    assert (Path("named") / judge).resolve() == small
    Path("one.yaml").write_text(yaml.safe_dump({**mapping, "helpfulness": "base"}))
    ended = other_process("fake-policy", "one.yaml", "--output-dir", "wrong")
    assert (ended.code, "helpfulness: no such model folder" in ended.err) == (2, True)


@pytest.mark.parametrize(
    ("key", "value", "parts"),
    [
        (
            "stages.second.model",
            "smal",
            ["stages.second.model", '(did you mean "small"?)', "base, small, first"],
        ),
        ("stages.second.helpfulness", "nothing", ["stages.second.helpfulness", "is no stage"]),
        ("stages.second.helpfulness", "small", ["stages.second.helpfulness", "is not a reward model"]),
        ("models", {"small": "gone"}, ["models.small.path: no such folder", "gone"]),
        (
            "models",
            {"small": {"path": "small_model", "gguf_file": "x"}},
            ["models.small.gguf_file: no such file"],
        ),
        (
            "models",
            {"small": "small_model", "first": "small_model"},
            ["models.first", "another model already"],
        ),
        ("models", {"small": "small_model", "base": "small_model"}, ["models.base", "another model already"]),
        ("models", {"small": "small_model", "a b": "small_model"}, ["models.a b", "letters, digits"]),
        ("models", {"small": {"folder": "small_model"}}, ["models.small.folder: unknown key", "path"]),
        ("models", {"small": 3}, ["models.small"]),
        ("models", ["small_model"], ["models: "]),
        (
            "models",
            {"small": "small_model", "quant": {"path": "small_model", "gguf_file": "weights.txt"}},
            ["models.quant: the folder of models.small with another gguf_file"],
        ),
    ],
)
def test_what_is_wrong_is_told_with_its_key(
    small: Path, change: Change, key: str, value: object, parts: list[str]
) -> None:
    write_config(small, architectures=["LlamaForCausalLM"])
    change(key, value)
    with pytest.raises(RecipeError) as caught:
        load_recipe("recipe.yaml")
    for part in parts:
        assert part in str(caught.value)


def test_gguf_files_are_found_by_folder() -> None:
    settings = RunSettings(
        base_model=BaseModelSource(path="/base", gguf_file="base.gguf"),
        models={
            "small": BaseModelSource(path="/small", gguf_file="small.gguf"),
            "plain": BaseModelSource(path="/p"),
        },
    )
    found = [settings.gguf_file_of(path) for path in ("/base", "/small", "/p", "/stage/model")]
    assert found == ["base.gguf", "small.gguf", None, None]
    moved = settings.with_paths("b", {"small": "s", "plain": "p"})
    assert (moved.gguf_file_of("s"), moved.gguf_file_of("/small")) == ("small.gguf", None)


def test_the_schema_takes_a_path_or_a_mapping() -> None:
    either = recipe_schema()["properties"]["models"]["additionalProperties"]["anyOf"]
    assert {"type": "string"} in either
    assert len(either) == 2
