"""The OpenAssistant importer, against trees written by hand and the counts published with the real file."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from llama2_chat.data_import import ImportReport, import_rows
from llama2_chat.data_import import report as reasons
from llama2_chat.dialogue import Dialogue, Preference, Prompt
from llama2_chat.errors import DataFormatError
from llama2_chat.jsonl import write_rows


def message(text: str, /, *replies: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """A message whose id is its text; capitals are questions."""
    role = "prompter" if text[:1].isupper() else "assistant"
    basic = {"message_id": text, "role": role, "text": text, "review_result": True, "deleted": False}
    return {**basic, "synthetic": False, "replies": list(replies), **fields}


def write(folder: Path, *roots: dict[str, Any], **fields: Any) -> Path:
    rows = [
        {
            "message_tree_id": root.get("message_id"),
            "tree_state": "ready_for_export",
            "prompt": root,
            **fields,
        }
        for root in roots
    ]
    write_rows(folder / "trees.jsonl", rows)
    return folder / "trees.jsonl"


def read(file: Path, kind: Any) -> tuple[list[Any], ImportReport]:
    report = ImportReport()
    return list(import_rows("oasst", file, kind=kind, report=report)), report


def words(row: Dialogue | Prompt) -> str:
    return " ".join(message.content for message in row.messages)


def pairs(rows: list[Preference]) -> list[tuple[str, str, str, str | None]]:
    return [(" ".join(m.content for m in p.prompt), p.chosen, p.rejected, p.rating) for p in rows]


TALK = message(
    "Q",
    message("worst", rank=3),
    message("good", message("R", message("fine")), rank=1),
    message("best", message("S", message("two", rank=1), message("one", rank=0)), message("T"), rank=0),
    message("bad", rank=2),
)


def test_what_a_tree_becomes(tmp_path: Path) -> None:
    file = write(tmp_path, TALK)
    found, report = read(file, "preferences")
    assert pairs(found) == [
        ("Q", "good", "worst", "better"),
        ("Q", "best", "worst", "significantly_better"),
        ("Q", "bad", "worst", "slightly_better"),
        ("Q", "best", "good", "slightly_better"),
        ("Q", "good", "bad", "slightly_better"),
        ("Q", "best", "bad", "better"),
        ("Q best S", "one", "two", "slightly_better"),
    ]
    assert {(pair.domain, pair.source) for pair in found} == {("helpfulness", "oasst")}
    assert str(report) == "7 pairs read, 7 imported as helpfulness data, 0 dropped"
    found, report = read(file, "dialogues")
    assert [(words(row), row.id) for row in found] == [("Q best S one", "trees:one")]
    assert str(report) == "1 dialogues read, 1 imported as helpfulness data, 0 dropped"
    found, report = read(file, "prompts")
    assert [words(row) for row in found] == ["Q", "Q good R", "Q best S", "Q best T"]
    assert str(report) == "4 prompts read, 4 imported as helpfulness data, 0 dropped"


def test_four_places_apart_are_no_more_than_three(tmp_path: Path) -> None:
    found, _ = read(write(tmp_path, message("Q", message("a", rank=0), message("b", rank=4))), "preferences")
    assert pairs(found) == [("Q", "a", "b", "significantly_better")]


def test_dialogues_part_at_an_answer_and_end_where_nothing_usable_follows(tmp_path: Path) -> None:
    tree = message(
        "Q",
        message(
            "a",
            message("R", message("b", message("U", message("c", deleted=True)))),
            message("S", message("[INST]")),
            message("T", message("d", synthetic=True, rank=0), message("e", rank=1)),
        ),
    )
    found, report = read(write(tmp_path, tree), "dialogues")
    assert [words(row) for row in found] == ["Q a R b", "Q a T e"]
    assert report.dropped == {reasons.DELETED: 1, reasons.CHAT_TAG: 1}
    assert report.read == 4


ANSWERS = (message("x", rank=0), message("y", rank=1))
ODD: dict[str, tuple[dict[str, Any], dict[str, dict[str, int]]]] = {
    "a deleted question": (
        message("Q", *ANSWERS, deleted=True),
        {kind: {reasons.DELETED: 1} for kind in ("preferences", "dialogues", "prompts")},
    ),
    "a question that was not accepted": (
        message("Q", *ANSWERS, review_result=None),
        {kind: {reasons.NOT_ACCEPTED: 1} for kind in ("preferences", "dialogues", "prompts")},
    ),
    "a tag in the question": (
        message("Q <</SYS>>", *ANSWERS),
        {kind: {reasons.CHAT_TAG: 1} for kind in ("preferences", "dialogues", "prompts")},
    ),
    "an empty question": (
        message(" ", *ANSWERS, role="prompter"),
        {kind: {reasons.EMPTY_PROMPT: 1} for kind in ("preferences", "dialogues", "prompts")},
    ),
    "an answer at the root": (
        message("a", message("x", rank=0), message("y", rank=1)),
        {"preferences": {}, "dialogues": {reasons.ROLES_DO_NOT_ALTERNATE: 1}, "prompts": {}},
    ),
    "a question below a question": (
        message("Q", message("R", rank=0), message("x", rank=1)),
        {
            "preferences": {reasons.ROLES_DO_NOT_ALTERNATE: 1},
            "dialogues": {},
            "prompts": {reasons.ROLES_DO_NOT_ALTERNATE: 1},
        },
    ),
    "a deleted answer": (
        message("Q", message("x", rank=0, deleted=True), message("y", rank=1)),
        {"preferences": {reasons.DELETED: 1}, "dialogues": {}, "prompts": {}},
    ),
    "an empty answer": (
        message("Q", message(" \n", rank=0), message("y", rank=1)),
        {"preferences": {reasons.EMPTY_ANSWER: 1}, "dialogues": {}, "prompts": {}},
    ),
    "identical answers": (
        message("Q", message("x", rank=0), message("x \n", rank=1)),
        {"preferences": {reasons.IDENTICAL: 1}, "dialogues": {}, "prompts": {}},
    ),
    "a reply to another message": (
        message("Q", message("x", rank=0, parent_id="P"), message("y", rank=1, parent_id="Q")),
        {"preferences": {reasons.ANOTHER_PARENT: 1}, "dialogues": {}, "prompts": {}},
    ),
    "an answer by a model": (
        message("Q", message("x", rank=0, synthetic=True)),
        {"preferences": {}, "dialogues": {reasons.WRITTEN_BY_A_MODEL: 1}, "prompts": {}},
    ),
    "no ranks": (
        message("Q", message("x"), message("y", rank=None)),
        {"preferences": {reasons.NO_RANK: 1}, "dialogues": {reasons.NO_BEST_REPLY: 1}, "prompts": {}},
    ),
    "equal ranks": (
        message("Q", message("x", rank=2), message("y", rank=2)),
        {"preferences": {reasons.EQUAL_RANKS: 1}, "dialogues": {}, "prompts": {}},
    ),
    "no answer": (message("Q"), {"preferences": {}, "dialogues": {reasons.UNANSWERED: 1}, "prompts": {}}),
}


@pytest.mark.parametrize("kind", ["dialogues", "preferences", "prompts"])
@pytest.mark.parametrize("name", ODD)
def test_odd_trees_are_dropped_and_counted(tmp_path: Path, name: str, kind: str) -> None:
    tree, dropped = ODD[name]
    found, report = read(write(tmp_path, TALK, tree, TALK), kind)
    assert report.dropped == dropped[kind]
    assert report.imported == len(found)
    assert report.read == report.imported + sum(dropped[kind].values())
    around = {"dialogues": 1, "preferences": 7, "prompts": 4}[kind]
    assert len(found) >= 2 * around


def test_what_is_below_a_bad_message_is_dropped_with_it(tmp_path: Path) -> None:
    below = message("R", message("b", rank=0), message("c", rank=1))
    tree = message("Q", message("a", below, review_result=False))
    _, report = read(write(tmp_path, tree), "preferences")
    assert (report.read, report.imported, report.dropped) == (1, 0, {reasons.NOT_ACCEPTED: 1})
    found, report = read(write(tmp_path, tree), "prompts")
    assert [words(row) for row in found] == ["Q"]


def test_trees_that_are_not_finished_are_dropped(tmp_path: Path) -> None:
    for kind in ("dialogues", "preferences", "prompts"):
        found, report = read(write(tmp_path, TALK, tree_state="aborted_low_grade"), kind)
        assert not found
        assert report.dropped == {reasons.UNFINISHED_TREE: report.read}


def test_a_deep_tree(tmp_path: Path) -> None:
    tree = message("z", rank=0)
    for number in range(150):
        tree = message(f"Q{number}", tree, message("w", rank=1))
        tree = message(f"a{number}", tree, rank=0) if number < 149 else tree
    found, _ = read(write(tmp_path, tree), "dialogues")
    assert len(found[0].messages) == 300
    assert read(write(tmp_path, tree), "preferences")[1].imported == 150


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"role": "user"}, 'message x: role "user" unknown; one of prompter, assistant'),
        ({"text": 5}, "message x: text must be a string"),
        ({"rank": -1}, "message x: rank must be a whole number from 0, found -1"),
        ({"rank": True}, "message x: rank must be a whole number from 0, found true or false"),
        ({"deleted": "no"}, "message x: deleted must be true or false, found a string"),
        ({"replies": {}}, "^"),
        ({"replies": {"a": 1}}, "message x: replies must be a list, found an object"),
        ({"replies": ["y"]}, "a message must be a JSON object, found a string"),
        ({"text": "\ud800"}, "message x: text holds half of a surrogate pair"),
    ],
)
def test_rows_of_another_format(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    rows = [
        {"message_tree_id": "t", "tree_state": "ready_for_export", "prompt": root}
        for root in (TALK, message("Q", message("x", **changes)))
    ]
    file = tmp_path / "trees.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if problem == "^":  # an empty object holds no reply
        assert len(list(import_rows("oasst", file, kind="dialogues"))) == 2
        return
    with pytest.raises(DataFormatError, match=rf"trees\.jsonl:2: {problem}.*OpenAssistant's trees are JSONL"):
        list(import_rows("oasst", file, kind="dialogues"))


def test_the_real_file(data_folder: Path) -> None:
    file = data_folder / "oasst" / "en_100_tree.jsonl.gz"
    trees = [json.loads(line)["prompt"] for line in gzip.decompress(file.read_bytes()).splitlines()]
    questions = [found for tree in trees for found in walk(tree) if found["role"] == "prompter"]

    preferences, report = read(file, "preferences")
    # From the file's own README: 754 ranked pairs below 212 prompts. Without ranks are all of two and of three
    # replies, 1 + 3 pairs, and one of four, 3 pairs.
    assert (report.imported, report.dropped) == (754, {reasons.NO_RANK: 7})
    assert len({pair.prompt for pair in preferences}) == 212
    differences: Counter[int] = Counter()
    for question in questions:
        ranks = [reply["rank"] for reply in question["replies"] if "rank" in reply]
        differences.update(high - low for low in ranks for high in ranks if low < high)
    ratings = Counter(pair.rating for pair in preferences)
    assert ratings == {
        "slightly_better": differences[1],
        "better": differences[2],
        "significantly_better": sum(differences.values()) - differences[1] - differences[2],
    }
    ranks_by_text = {
        (question["text"].strip(), reply["text"].strip()): reply.get("rank")
        for question in questions
        for reply in question["replies"]
    }
    for pair in preferences:
        asked = pair.prompt[-1].content
        assert ranks_by_text[asked, pair.chosen] < ranks_by_text[asked, pair.rejected]
        assert type(pair).from_row(pair.to_row()) == pair

    prompts, report = read(file, "prompts")
    assert (len(prompts), report.dropped) == (480, {})
    dialogues, report = read(file, "dialogues")
    assert report.dropped == {reasons.WRITTEN_BY_A_MODEL: 5, reasons.NO_BEST_REPLY: 1}
    expected = [list(path) for tree in trees for path in best_paths(tree)]
    assert [[m.content for m in row.messages] for row in dialogues] == expected
    assert len({row.id for row in dialogues}) == len(dialogues) == 96


def walk(tree: dict[str, Any]) -> list[dict[str, Any]]:
    return [tree, *(found for reply in tree["replies"] for found in walk(reply))]


def best_paths(question: dict[str, Any]) -> list[list[str]]:
    """The rule once more, by recursion and without its handling of bad messages, which the file does not hold."""
    human = [reply for reply in question["replies"] if not reply["synthetic"]]
    if not human or (len(human) > 1 and all("rank" not in reply for reply in human)):
        return []
    best = min(human, key=lambda reply: reply.get("rank", 99))
    here = [question["text"].strip(), best["text"].strip()]
    following = [path for reply in best["replies"] for path in best_paths(reply)]
    return [here + path for path in following] or [here]
