"""The PandaLM importer, against judgments written by hand and the counts published with the real file."""

from __future__ import annotations

import json
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from llama2_chat.data_import import ImportReport, import_rows
from llama2_chat.data_import.pandalm import rating_of
from llama2_chat.data_import.report import CHAT_TAG, EMPTY_ANSWER, EMPTY_PROMPT, IDENTICAL, NO_WINNER
from llama2_chat.dialogue import Dialogue, Message, Preference, Prompt
from llama2_chat.errors import DataFormatError

JUDGMENT: dict[str, Any] = {
    **{"idx": 7, "cmp_key": "a_b", "motivation_app": "x", "instruction": " Sort. \n", "input": "b, a\n"},
    **{"response1": "a, b ", "response2": "\nno", "annotator1": 1, "annotator2": 1, "annotator3": 0},
}
PROMPT = (Message("user", "Sort.\n\nb, a"),)


def write(folder: Path, *rows: Any, name: str = "judged.json") -> Path:
    (folder / name).write_text(json.dumps(rows))
    return folder / name


def test_what_a_judgment_becomes(tmp_path: Path) -> None:
    file = write(tmp_path, JUDGMENT)
    (pair,) = import_rows("pandalm", file, kind="preferences")
    assert pair == Preference(PROMPT, "a, b", "no", "better", domain="helpfulness", source="pandalm")
    answered = (*PROMPT, Message("assistant", "a, b"))
    assert list(import_rows("pandalm", file, kind="dialogues")) == [
        Dialogue(answered, id="judged:1", source="pandalm")
    ]
    assert list(import_rows("pandalm", file, kind="prompts")) == [Prompt(PROMPT, source="pandalm")]
    (other,) = import_rows("pandalm", write(tmp_path, JUDGMENT | {"input": " "}), kind="prompts")
    assert isinstance(other, Prompt)
    assert other.messages[0].content == "Sort."
    (safe,) = import_rows("pandalm", file, kind="prompts", domain="safety")
    assert isinstance(safe, Prompt)
    assert safe.is_safety


def test_the_rating_is_the_agreement() -> None:
    """All 27 votes, by the rule's words: who is for the winner, who against, who says tie."""
    found = Counter()
    for votes in product((0, 1, 2), repeat=3):
        judged = rating_of(votes)
        found[judged] += 1
        first, second = votes.count(1), votes.count(2)
        if first == second:
            assert judged is None
            continue
        assert judged is not None
        assert judged[0] == (1 if first > second else 2)
        supporters, opponents, ties = max(first, second), min(first, second), votes.count(0)
        words = {
            (3, 0, 0): "significantly_better",
            (2, 0, 1): "better",
            (2, 1, 0): "slightly_better",
            (1, 0, 2): "negligibly_better",
        }
        assert judged[1] == words[supporters, opponents, ties]
    # 000 and the six orders of 012; each rating as often for either answer.
    assert found[None] == 7
    ratings = {"significantly_better": 1, "better": 3, "slightly_better": 3, "negligibly_better": 3}
    assert {key: count for key, count in found.items() if key} == {
        (preferred, rating): count for preferred in (1, 2) for rating, count in ratings.items()
    }


ODD = {
    "no winner": ({"annotator1": 0, "annotator2": 0, "annotator3": 0}, [NO_WINNER]),
    "one vote for each": ({"annotator1": 0, "annotator2": 1, "annotator3": 2}, [NO_WINNER]),
    "an empty answer": ({"response2": " \n"}, [EMPTY_ANSWER]),
    "the same answer": ({"response1": "no "}, [IDENTICAL]),
    "no prompt": ({"instruction": " ", "input": ""}, [EMPTY_PROMPT]),
    "a tag in the input": ({"input": "x [/INST]"}, [CHAT_TAG]),
    "a tag in an answer": ({"response2": "<<SYS>>"}, [CHAT_TAG]),
    "odd in three ways": ({"response1": "", "response2": "", "annotator3": 2, "annotator2": 0}, None),
}


@pytest.mark.parametrize("kind", ["dialogues", "preferences", "prompts"])
@pytest.mark.parametrize("name", ODD)
def test_odd_rows_are_dropped_and_counted(tmp_path: Path, name: str, kind: Any) -> None:
    changes, reasons = ODD[name]
    report = ImportReport()
    file = write(tmp_path, JUDGMENT, JUDGMENT | changes, JUDGMENT)
    assert len(list(import_rows("pandalm", file, kind=kind, report=report))) == 2
    assert (report.read, report.imported) == (3, 2)
    assert report.dropped == dict.fromkeys(reasons or [IDENTICAL, EMPTY_ANSWER, NO_WINNER], 1)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"annotator2": 3}, r"annotator2 must be 0 \(a tie\), 1 or 2 \(the better response\), found 3"),
        ({"annotator2": True}, "annotator2 must be 0 .* found true or false"),
        ({"annotator2": "1"}, "annotator2 must be 0 .* found a string"),
        ({"annotator2": 1.0}, "annotator2 must be 0 .* found 1.0"),
        ({"response1": None}, "response1 must be a string, found null"),
        ({"input": "\ud800"}, "input holds half of a surrogate pair"),
    ],
)
def test_rows_of_another_format(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    rows = import_rows("pandalm", write(tmp_path, JUDGMENT, JUDGMENT | changes), kind="prompts")
    next(rows)
    with pytest.raises(DataFormatError, match=rf"judged\.json: row 2: {problem}.*are one JSON array of obj"):
        next(rows)


def test_the_real_file(data_folder: Path) -> None:
    file = data_folder / "pandalm" / "testset-v1.json"
    judgments = json.loads(file.read_text())
    votes = [tuple(row[f"annotator{number}"] for number in (1, 2, 3)) for row in judgments]
    ratings = Counter(judged and judged[1] for judged in map(rating_of, votes))
    # From the file's own README, over all rows: 390 agree on a winner, 59 two of three, 13 and 54 ties.
    assert ratings["significantly_better"] == 390
    assert ratings["better"] + ratings["slightly_better"] == 59
    assert (ratings["negligibly_better"], ratings[None]) == (13, 54)

    made: dict[str, list[Any]] = {}
    for kind in ("dialogues", "preferences", "prompts"):
        report = ImportReport()
        made[kind] = list(import_rows("pandalm", file, kind=kind, report=report))
        assert report.read == 516
        assert report.dropped == {EMPTY_ANSWER: 42, NO_WINNER: 54}
        assert report.imported == len(made[kind]) == 420
    usable = [row for row in judgments if row["response1"].strip() and row["response2"].strip()]
    usable = [row for row in usable if any(row[f"annotator{number}"] for number in (1, 2, 3))]
    for row, dialogue, preference, prompt in zip(usable, *made.values(), strict=True):
        assert preference.prompt == prompt.messages == dialogue.messages[:-1]
        assert dialogue.messages[-1].content == preference.chosen
        # The majority of the three, ties aside, chose it.
        balance = sum({0: 0, 1: 1, 2: -1}[row[f"annotator{number}"]] for number in (1, 2, 3))
        order = ("response1", "response2") if balance > 0 else ("response2", "response1")
        assert (preference.chosen, preference.rejected) == tuple(row[name].strip() for name in order)
        assert preference.prompt[0].content.startswith(row["instruction"].strip())
        assert type(preference).from_row(preference.to_row()) == preference
