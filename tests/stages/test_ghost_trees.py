"""Conversation trees of OpenAssistant as Ghost Attention's dialogues, from the importer to the training rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llama2_chat.cli.main import run_command
from llama2_chat.jsonl import write_rows


def branch(*texts: str) -> dict[str, Any]:
    """A tree without forks: question, answer, question, …"""
    text, *below = texts
    role = "assistant" if text.startswith("a ") else "prompter"
    basic = {"message_id": text, "role": role, "text": text, "review_result": True, "deleted": False}
    rank = {"rank": 0} if role == "assistant" else {}
    return {**basic, **rank, "synthetic": False, "replies": [branch(*below)] if below else []}


def tree(*texts: str) -> dict[str, Any]:
    return {"message_tree_id": texts[0], "tree_state": "ready_for_export", "prompt": branch(*texts)}


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def users(messages: list[dict[str, str]]) -> list[str]:
    return [message["content"] for message in messages if message["role"] == "user"]


@pytest.fixture
def stage(ghost_config, file_of, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A function that imports a file of trees and runs the stage on it, both as a user does."""

    def run(trees: Path, **changes: Any) -> tuple[int, list[dict[str, Any]], Path, str]:
        dialogues, out = tmp_path / "imported.jsonl", tmp_path / "out"
        importing = ["data", "import", "oasst", str(trees), str(dialogues), "--kind", "dialogues"]
        assert run_command(importing) == 0
        training = {"max_steps": 1, "batch_size": 8, "sequence_length": 128}
        config = ghost_config(dialogues=[str(dialogues)], sft_dialogues=[], training=training, **changes)
        capsys.readouterr()
        code = run_command(["ghost-attention", str(file_of(config)), "--output-dir", str(out)])
        return code, rows_of(dialogues), out, capsys.readouterr().err

    return run


def test_trees_of_several_turns_feed_the_stage(stage, tmp_path: Path) -> None:
    trees = [
        tree(f"Say {n}?", f"a {n}", f"And {n}?", f"a more {n}", f"Last {n}?", f"a last {n}")
        for n in range(30)
    ]
    file = tmp_path / "trees.jsonl"
    write_rows(file, [*trees, tree("Alone?", "a reply")])
    code, imported, out, said = stage(file)
    assert code == 0, said
    assert len(imported) == 31
    asked = {tuple(users(row["messages"])) for row in imported if len(users(row["messages"])) == 3}
    assert asked == {(f"Say {n}?", f"And {n}?", f"Last {n}?") for n in range(30)}
    selection = json.loads((out / "done.json").read_text())["metrics"]["selection"]
    assert (selection["one_turn"], selection["dialogues"]) == (1, 30)
    made = rows_of(out / "dataset.jsonl")
    assert 0 < len(made) == selection["kept"]
    for row in made:
        first, *others = users(row["messages"])
        assert (first.split(". ")[-1], *others) in asked
        assert first not in {questions[0] for questions in asked}
        assert row["source"] == "ghost_attention:oasst"


def test_the_real_trees_feed_the_stage(stage, data_folder: Path) -> None:
    """Their dialogues are longer than what the small test model can take: only the count of them is looked at."""
    code, imported, out, said = stage(data_folder / "oasst/en_100_tree.jsonl.gz", history="original")
    several = sum(len(users(row["messages"])) > 1 for row in imported)
    assert several == 46
    samples = rows_of(out / "samples.jsonl")
    assert len(samples) == several
    for row in samples:
        assert all(text.startswith(row["instruction"] + " ") for text in users(row["prompt"]))
    assert code == 0 or "none of 46 sampled dialogues can be trained on" in said
