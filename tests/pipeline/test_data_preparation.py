"""Data entries: generated and imported rows, their records, and mistakes in them."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from llama2_chat.errors import RecipeError
from llama2_chat.pipeline.data_entries import options_class
from llama2_chat.pipeline.recipe import load_recipe
from llama2_chat.testbed.generators import GENERATORS


def pair(number: int) -> dict[str, str]:
    question = f"\n\nHuman: Question {number}?\n\nAssistant:"
    return {"chosen": f"{question} Good {number}.", "rejected": f"{question} Bad {number}."}


@pytest.fixture
def hh_rlhf(workspace: Path) -> Path:
    """Twelve pairs in the format of HH-RLHF; the third cannot be used."""
    file = workspace / "helpful-base.jsonl.gz"
    rows = [pair(number) for number in range(12)]
    rows[2]["chosen"] = "no turns at all"
    file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return file


def with_talks(workspace: Path, entry: Any) -> None:
    """The workspace's recipe with another entry `talks`."""
    mapping = yaml.safe_load((workspace / "recipe.yaml").read_text())
    mapping["data"]["talks"] = entry
    (workspace / "recipe.yaml").write_text(yaml.safe_dump(mapping, sort_keys=False))


def made(workspace: Path, name: str = "talks") -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows and record of a data entry in the run."""
    folder = workspace / "runs" / "small" / "data"
    rows = (folder / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(row) for row in rows], json.loads((folder / f"{name}.json").read_text())


def test_generated_rows(workspace: Path, cli: Any) -> None:
    with_talks(workspace, {"testbed": "preferences", "rows": 30, "options": {"domain": "safety"}})
    assert cli("run", "recipe.yaml", "--until", "first").code == 0
    rows, record = made(workspace)
    seed = record["made_from"]["seed"]
    assert rows == list(GENERATORS["preferences"](rows=30, seed=seed, domain="safety"))
    assert record["rows"] == record["report"]["kept"] == 30
    file = workspace / "runs" / "small" / "data" / "talks.jsonl"
    assert record["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()


def test_seeds_differ_by_name_and_by_the_recipes_seed(workspace: Path, cli: Any) -> None:
    entry = {"testbed": "demonstrations", "rows": 20}
    with_talks(workspace, entry)
    found = set()
    for overrides in ([], ["seed=4"], [f"data.pairs={json.dumps(entry)}"]):
        assert cli("run", "recipe.yaml", *overrides).code == 0
        found.add(json.dumps(made(workspace)[0]))
    found.add(json.dumps(made(workspace, "pairs")[0]))
    assert len(found) == 3  # the third run has the first one's talks


def test_files_are_recorded_too(workspace: Path, cli: Any) -> None:
    assert cli("run", "recipe.yaml", "--until", "first").code == 0
    record = json.loads((workspace / "runs/small/data/talks.json").read_text())
    assert record["rows"] == 1
    assert record["sha256"] == hashlib.sha256((workspace / "talks.jsonl").read_bytes()).hexdigest()
    (workspace / "talks.jsonl").write_text('{"messages": []}\n\n{"messages": []}\n')
    assert cli("run", "recipe.yaml", "--until", "first").code == 0
    assert json.loads((workspace / "runs/small/data/talks.json").read_text())["rows"] == 2


def test_imported_rows(workspace: Path, cli: Any, hh_rlhf: Path) -> None:
    entry = {"import": "hh-rlhf", "path": hh_rlhf.name, "kind": "dialogues", "offset": 1, "limit": 3}
    with_talks(workspace, entry)
    assert cli("run", "recipe.yaml", "--until", "first").code == 0
    rows, record = made(workspace)
    assert [row["messages"][0]["content"] for row in rows] == [f"Question {n}?" for n in (1, 3, 4)]
    assert record["rows"] == 3
    assert record["report"]["read"] == 5
    assert record["report"]["imported"] == 4
    with_talks(workspace, entry | {"offset": 9})
    assert cli("run", "recipe.yaml", "--until", "first").code == 0
    assert [row["messages"][0]["content"] for row in made(workspace)[0]] == ["Question 10?", "Question 11?"]


def test_import_that_leaves_nothing(workspace: Path, cli: Any, hh_rlhf: Path) -> None:
    with_talks(workspace, {"import": "hh-rlhf", "path": hh_rlhf.name, "kind": "dialogues", "offset": 11})
    ended = cli("run", "recipe.yaml")
    assert ended.code == 2
    assert f"data.talks: no row is left of {hh_rlhf}; 11 of 12 rows read are usable" in ended.err


@pytest.mark.parametrize(
    ("entry", "parts"),
    [
        ({"testbed": "prompts", "rows": 0}, ["data.talks.rows: ", "greater than or equal to 1", "found 0"]),
        ({"testbed": "prompts"}, ["data.talks.rows: required, but missing"]),
        ({"testbed": "prompts", "rows": 5, "split": "test"}, ["data.talks.split: ", "train", "held_out"]),
        (
            {"testbed": "prompts", "rows": 5, "options": {"unsave": 0.1}},
            ["data.talks.options.unsave: unknown key", 'did you mean "unsafe"', "borderline, multi_turn"],
        ),
        (
            {"testbed": "preferences", "rows": 5, "options": {"domain": "harm", "noise": "much"}},
            ["data.talks.options.domain: ", "helpfulness", "data.talks.options.noise: ", "number", "'much'"],
        ),
        ({"testbed": "preferences", "rows": 5, "options": {"counts": {}}}, ["options.counts: unknown key"]),
        ({"testbed": "prompts", "rows": 5, "options": {"seed": 1}}, ["options.seed: unknown key"]),
        ({"testbed": "prompts", "rows": "5"}, ["data.talks.rows: ", "integer", "'5'"]),
        ({"import": "hh", "path": "talks.jsonl", "kind": "dialogues"}, ["data.talks.import: ", "hh-rlhf"]),
        ({"import": "hh-rlhf", "path": "gone.gz", "kind": "talks"}, ["data.talks.kind: ", "dialogues"]),
        ({"import": "hh-rlhf", "path": "gone.gz", "kind": "dialogues"}, ["data.talks.path: no such file"]),
        ({"path": "talks.jsonl", "row": 5}, ["data.talks.row: unknown key", "allowed: path"]),
        ({}, ["data.talks.path: required, but missing"]),
    ],
)
def test_mistakes_in_entries(workspace: Path, entry: dict[str, Any], parts: list[str]) -> None:
    with_talks(workspace, entry)
    with pytest.raises(RecipeError) as caught:
        load_recipe("recipe.yaml")
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("name", GENERATORS)
def test_every_generator_has_options_that_can_be_checked(name: str) -> None:
    options = options_class(name)()
    assert list(GENERATORS[name](rows=2, seed=0, **options.model_dump()))


def test_an_import_says_what_it_dropped(workspace: Path, cli: Any, hh_rlhf: Path) -> None:
    """A recipe's `import:` entry drops rows with empty answers, counts them, and says so once, on the terminal too."""
    rows = [pair(number) for number in range(4)]
    rows[1]["chosen"] = rows[1]["chosen"].removesuffix(" Good 1.")
    hh_rlhf.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    with_talks(workspace, {"import": "hh-rlhf", "path": hh_rlhf.name, "kind": "dialogues"})
    first, again = (cli("run", "recipe.yaml", "--until", "first") for _ in range(2))
    assert (first.code, again.code) == (0, 0)
    line = f"{hh_rlhf}: 4 rows read, 3 imported as helpfulness data, 1 dropped (an empty last answer: 1)"
    assert [text for text in first.err.splitlines() if "dropped" in text] == [line]
    assert "dropped" not in again.err
    rows, record = made(workspace)
    assert [row["messages"][0]["content"] for row in rows] == ["Question 0?", "Question 2?", "Question 3?"]
    assert record["report"]["dropped"] == {"an empty last answer": 1}
