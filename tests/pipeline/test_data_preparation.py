"""Data entries: generated and imported rows, their records, and mistakes in them."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from llama2_chat.data_import import FORMATS, KINDS, SPLITS, import_rows
from llama2_chat.errors import RecipeError
from llama2_chat.pipeline.data_entries import ImportedData, options_class
from llama2_chat.pipeline.plan import SIZE_OF_IMPORT
from llama2_chat.pipeline.recipe import load_recipe
from llama2_chat.pipeline.schema import recipe_schema
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


def test_an_import_is_split_before_rows_are_skipped(workspace: Path, cli: Any, hh_rlhf: Path) -> None:
    """Question 0 to 11 without 2; which are held out is worked out here from SHA-256 again."""
    usable = [f"Question {number}?" for number in range(12) if number != 2]
    digests = {text: hashlib.sha256(text.encode()).hexdigest() for text in usable}
    for kind, messages in (("dialogues", "messages"), ("prompts", "prompt")):
        entry = {"import": "hh-rlhf", "path": hh_rlhf.name, "kind": kind, "held_out_share": 0.5}
        for split, inside in (("held_out", True), ("train", False)):
            expected = [text for text in usable if (int(digests[text][:2], 16) < 128) == inside]
            assert 3 <= len(expected) <= 8
            with_talks(workspace, entry | {"split": split, "offset": 1, "limit": 2})
            assert cli("run", "recipe.yaml", "--until", "first").code == 0
            rows, record = made(workspace)
            assert [row[messages][0]["content"] for row in rows] == expected[1:3]
            assert (record["report"]["split"], record["report"]["held_out_share"]) == (split, 0.5)
            assert record["report"]["in_split"] == 3  # no more is read than is taken
            with_talks(workspace, entry | {"split": split, "offset": len(expected)})
            ended = cli("run", "recipe.yaml", "--until", "first")
            assert ended.code == 2
            left = f"11 of 12 rows read are usable, {len(expected)} of them in the part {split}"
            assert f"data.talks: no row is left of {hh_rlhf}; {left}" in ended.err


def test_a_split_changes_what_is_prepared(workspace: Path, cli: Any, hh_rlhf: Path) -> None:
    entry = {"import": "hh-rlhf", "path": hh_rlhf.name, "kind": "dialogues"}
    found = []
    for options in (
        {},
        {"split": "train"},
        {"split": "held_out"},
        {"split": "held_out", "held_out_share": 0.7},
    ):
        with_talks(workspace, entry | options)
        assert cli("run", "recipe.yaml", "--until", "first").code == 0
        found.append(made(workspace)[1]["rows"])
    assert found[0] == 11 == found[1] + found[2]
    assert found[2] < found[3]


def test_a_dry_run_writes_the_part_for_a_stage_of_its_own(workspace: Path, cli: Any, hh_rlhf: Path) -> None:
    entry = {"import": "hh-rlhf", "path": hh_rlhf.name, "kind": "dialogues", "split": "train"}
    with_talks(workspace, entry)
    assert cli("run", "recipe.yaml", "--dry-run", "--write-configs", "configs").code == 0
    assert not (workspace / "runs").exists()
    (file,) = (workspace / "configs").rglob("talks.jsonl")
    assert cli("run", "recipe.yaml", "--until", "first").code == 0
    assert [json.loads(line) for line in file.read_text().splitlines()] == made(workspace)[0]


def test_two_entries_of_one_file_are_split_at_one_share(workspace: Path, hh_rlhf: Path) -> None:
    mapping = yaml.safe_load((workspace / "recipe.yaml").read_text())
    entry = {"import": "hh-rlhf", "path": hh_rlhf.name, "kind": "dialogues", "split": "held_out"}
    for share, problem in (
        (0.25, None),  # what is not given is 0.25
        (
            0.3,
            "data.b.held_out_share: 0.3, but data.a splits the same file at 0.25, so one row could be in both",
        ),
    ):
        mapping["data"] |= {
            "a": entry | {"split": "train"},
            "b": entry | {"path": str(hh_rlhf), "held_out_share": share},
        }
        (workspace / "recipe.yaml").write_text(yaml.safe_dump(mapping, sort_keys=False))
        if problem is None:
            load_recipe("recipe.yaml")
            continue
        with pytest.raises(RecipeError, match=problem):
            load_recipe("recipe.yaml")


def test_the_schema_knows_every_format_and_split() -> None:
    fields = recipe_schema()["$defs"]["ImportedData"]["properties"]
    assert fields["import"]["enum"] == list(FORMATS)
    assert fields["kind"]["enum"] == list(KINDS)
    assert {"enum": list(SPLITS), "type": "string"} in fields["split"]["anyOf"]
    assert fields["held_out_share"]["anyOf"][0] == {
        **{"exclusiveMinimum": 0, "exclusiveMaximum": 1, "type": "number"}
    }


def test_estimates_know_how_many_rows_an_import_gives(data_folder: Path) -> None:
    """Against the public files, to a tenth; the parts add up."""
    files = {
        "hh-rlhf": "hh-rlhf/helpful-base.jsonl.gz",
        "pandalm": "pandalm/testset-v1.json",
        "oasst": "oasst/en_100_tree.jsonl.gz",
        "xstest": "xstest/xstest_prompts.csv",
        "truthfulqa": "truthfulqa/TruthfulQA.csv",
        "toxigen": "toxigen/neutral_women_1k.txt",
        "bold": "bold/race_prompt.json",
        "diasafety": "diasafety/train.json",
    }
    assert list(files) == list(FORMATS)
    for name, path in files.items():
        file = data_folder / path
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        assert set(SIZE_OF_IMPORT[name]) == set(FORMATS[name].kinds)
        for kind in FORMATS[name].kinds:
            made = list(import_rows(name, file, kind=kind))
            a_line, share = SIZE_OF_IMPORT[name][kind]
            assert a_line * len(content.splitlines()) == pytest.approx(len(made), rel=0.1)
            assert 0.0 < share <= 2.1
    entry = {"import": "oasst", "path": "x", "kind": "prompts", "held_out_share": 0.2}
    shares = [ImportedData.model_validate(entry | {"split": split}).part for split in SPLITS]
    assert shares == pytest.approx([0.8, 0.2], rel=1e-12)


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
        (
            {"import": "xstest", "path": "talks.jsonl", "kind": "dialogues"},
            ["data.talks: xstest holds no dialogues; kind is one of prompts"],
        ),
        (
            {"import": "oasst", "path": "talks.jsonl", "kind": "prompts", "label": "safe"},
            [
                "data.talks: the rows of oasst are not labelled safe or unsafe",
                "(it is for xstest, diasafety)",
            ],
        ),
        (
            {"import": "xstest", "path": "talks.jsonl", "kind": "prompts", "label": "borderline"},
            ["data.talks.label: ", "'safe' or 'unsafe'"],
        ),
        ({"import": "hh", "path": "talks.jsonl", "kind": "dialogues"}, ["data.talks.import: ", "hh-rlhf"]),
        (
            {
                "import": "oasst",
                "path": "talks.jsonl",
                "kind": "prompts",
                "split": "test",
                "held_out_shar": 1,
            },
            ["data.talks.split: ", "'train' or 'held_out'", "held_out_shar: unknown key", '"held_out_share"'],
        ),
        (
            {"import": "oasst", "path": "talks.jsonl", "kind": "prompts", "held_out_share": 0.5},
            ["data.talks: held_out_share has no effect without split; add split: train or split: held_out"],
        ),
        (
            {
                "import": "oasst",
                "path": "talks.jsonl",
                "kind": "prompts",
                "split": "train",
                "held_out_share": 1,
            },
            ["data.talks.held_out_share: Input should be less than 1 (found 1)"],
        ),
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
