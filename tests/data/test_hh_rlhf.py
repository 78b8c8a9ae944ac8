"""The HH-RLHF importer, against rows written by hand and the counts published with the real files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llama2_chat.data_import import ImportReport, import_hh_rlhf
from llama2_chat.data_import.hh_rlhf import split_turns
from llama2_chat.data_import.report import (
    CHAT_TAG,
    EMPTY_ANSWER,
    IDENTICAL,
    PROMPTS_DIFFER,
    ROLES_DO_NOT_ALTERNATE,
)
from llama2_chat.dialogue import Dialogue, Message, Preference, Prompt
from llama2_chat.errors import DataFormatError, UserInputError
from llama2_chat.jsonl import write_rows

USER = "\n\nHuman: "
ANSWER = "\n\nAssistant: "
TWO_TURNS = f"{USER}Hi, who\nis this? {ANSWER}A llama.{USER}Human: or not?"
PAIR = {"chosen": f"{TWO_TURNS}{ANSWER} No. \n", "rejected": f"{TWO_TURNS}{ANSWER}Yes."}
MESSAGES = (
    Message("user", "Hi, who\nis this?"),
    Message("assistant", "A llama."),
    Message("user", "Human: or not?"),
)


def write(folder: Path, *rows: dict[str, Any], name: str = "pairs.jsonl") -> Path:
    folder.mkdir(exist_ok=True)
    write_rows(folder / name, rows)
    return folder / name


def test_what_a_pair_becomes(tmp_path: Path) -> None:
    file = write(tmp_path, PAIR)
    assert list(import_hh_rlhf(file, kind="dialogues")) == [
        Dialogue((*MESSAGES, Message("assistant", "No.")), id="pairs:1", source="hh-rlhf")
    ]
    assert list(import_hh_rlhf(file, kind="preferences")) == [
        Preference(MESSAGES, "No.", "Yes.", source="hh-rlhf")
    ]
    assert list(import_hh_rlhf(file, kind="prompts")) == [Prompt(MESSAGES, source="hh-rlhf")]


def test_safety_data_is_tagged(tmp_path: Path) -> None:
    file = write(tmp_path, PAIR)
    (dialogue,) = import_hh_rlhf(file, kind="dialogues", domain="safety")
    (prompt,) = import_hh_rlhf(file, kind="prompts", domain="safety")
    (pair,) = import_hh_rlhf(file, kind="preferences", domain="safety")
    assert isinstance(dialogue, Dialogue)
    assert dialogue.is_safety
    assert isinstance(prompt, Prompt)
    assert prompt.is_safety
    assert isinstance(pair, Preference)
    assert (pair.domain, pair.rating, pair.chosen_safe, pair.rejected_safe) == ("safety", None, None, None)
    (helpful,) = import_hh_rlhf(file, kind="prompts", domain="helpfulness")
    assert isinstance(helpful, Prompt)
    assert not helpful.is_safety


@pytest.mark.parametrize(
    ("folder", "name", "domain"),
    [
        ("any", "harmless-base.jsonl", "safety"),
        ("harmless-base", "test.jsonl", "safety"),
        ("helpful-online", "train.jsonl", "helpfulness"),
        ("any", "pairs.jsonl", None),
    ],
)
def test_the_sets_own_name_gives_the_domain(
    tmp_path: Path, folder: str, name: str, domain: str | None
) -> None:
    file = write(tmp_path / folder, PAIR, name=name)
    report = ImportReport()
    (prompt,) = import_hh_rlhf(file, kind="prompts", report=report)
    assert report.domain == domain
    assert isinstance(prompt, Prompt)
    assert prompt.is_safety == (domain == "safety")
    # What is said outweighs what is guessed.
    (said,) = import_hh_rlhf(file, kind="preferences", domain="helpfulness")
    assert isinstance(said, Preference)
    assert said.domain == "helpfulness"


def pair(chosen: str, rejected: str) -> dict[str, str]:
    return {"chosen": chosen, "rejected": rejected}


ODD = {
    "the same text twice": (pair(PAIR["chosen"], PAIR["chosen"]), [IDENTICAL]),
    "the same answer but for white space": (
        pair(f"{USER}a{ANSWER}b", f"{USER}a\n\nAssistant:b\n"),
        [IDENTICAL],
    ),
    "another prompt": (pair(f"{USER}a{ANSWER}b", f"{USER}c{ANSWER}d"), [PROMPTS_DIFFER]),
    "an empty chosen answer": (pair(f"{USER}a{ANSWER} \n", f"{USER}a{ANSWER}d"), [EMPTY_ANSWER]),
    "an empty rejected answer": (pair(f"{USER}a{ANSWER}b", f"{USER}a\n\nAssistant:"), [EMPTY_ANSWER]),
    "two answers in a row": (
        pair(f"{USER}a{ANSWER}b{ANSWER}c", f"{USER}a{ANSWER}b{ANSWER}d"),
        [ROLES_DO_NOT_ALTERNATE],
    ),
    "two questions in a row": (
        pair(f"{USER}a{USER}b{ANSWER}c", f"{USER}a{USER}b{ANSWER}d"),
        [ROLES_DO_NOT_ALTERNATE],
    ),
    "an answer first": (pair(f"{ANSWER}b", f"{ANSWER}c"), [ROLES_DO_NOT_ALTERNATE]),
    "a question last": (
        pair(f"{USER}a{ANSWER}b{USER}c", f"{USER}a{ANSWER}b{USER}d"),
        [ROLES_DO_NOT_ALTERNATE],
    ),
    "no turns": (pair("a", "b"), [ROLES_DO_NOT_ALTERNATE]),
    "text before the first turn": (
        pair(f"x{USER}a{ANSWER}b", f"x{USER}a{ANSWER}c"),
        [ROLES_DO_NOT_ALTERNATE],
    ),
    "a tag in the prompt": (pair(f"{USER}[INST]{ANSWER}b", f"{USER}[INST]{ANSWER}c"), [CHAT_TAG]),
    "a tag in one answer": (pair(f"{USER}a{ANSWER}b", f"{USER}a{ANSWER}<<SYS>>"), [CHAT_TAG]),
    "odd in two ways": (
        pair(f"{USER}a{ANSWER}b", f"{USER}c{ANSWER}b{ANSWER}"),
        [PROMPTS_DIFFER, EMPTY_ANSWER, ROLES_DO_NOT_ALTERNATE],
    ),
}


@pytest.mark.parametrize("kind", ["dialogues", "preferences", "prompts"])
@pytest.mark.parametrize("name", ODD)
def test_odd_rows_are_dropped_and_counted(tmp_path: Path, name: str, kind: Any) -> None:
    row, reasons = ODD[name]
    report = ImportReport()
    assert len(list(import_hh_rlhf(write(tmp_path, PAIR, row, PAIR), kind=kind, report=report))) == 2
    assert (report.read, report.imported) == (3, 2)
    assert report.dropped == dict.fromkeys(reasons, 1)


def test_the_report_in_words_and_as_json(tmp_path: Path) -> None:
    rows = [PAIR, *(row for row, _ in (ODD["odd in two ways"], ODD["the same text twice"]))]
    report = ImportReport()
    list(import_hh_rlhf(write(tmp_path, *rows), kind="prompts", domain="safety", report=report))
    assert str(report) == (
        "3 rows read, 1 imported as safety data, 2 dropped (an empty last answer: 1; chosen and rejected are "
        "identical: 1; roles do not alternate from a user to an assistant turn: 1; the prompts of chosen and "
        "rejected differ: 1)"
    )
    assert json.loads(json.dumps(report.to_row())) == {
        "read": 3,
        "imported": 1,
        "domain": "safety",
        "dropped": {EMPTY_ANSWER: 1, IDENTICAL: 1, ROLES_DO_NOT_ALTERNATE: 1, PROMPTS_DIFFER: 1},
    }


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"chosen": PAIR["chosen"]}, "rejected is missing"),
        ({**PAIR, "chosen": [{"role": "user", "content": "Hi."}]}, "chosen is not a string"),
        (pair(f"{USER}a{ANSWER}b", f"{USER}a{ANSWER}\ud800"), "content holds half of a surrogate pair"),
    ],
)
def test_rows_of_another_format(tmp_path: Path, row: dict[str, Any], problem: str) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(PAIR) + "\n" + json.dumps(row) + "\n")
    rows = import_hh_rlhf(file, kind="preferences")
    next(rows)
    with pytest.raises(DataFormatError, match=rf"pairs\.jsonl:2: {problem}"):
        next(rows)


def test_an_unknown_kind_is_refused_before_reading(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match='kind "pairs" unknown; one of dialogues, preferences, prompts'):
        import_hh_rlhf(tmp_path / "none.jsonl", kind="pairs")  # type: ignore[arg-type]


def test_split_turns_needs_the_markers_line_breaks() -> None:
    # "Human:" inside a line is text.
    assert split_turns(f"{USER}a\nHuman: b{ANSWER}c\n\nassistant: d") == (
        ("user", "a\nHuman: b"),
        ("assistant", "c\n\nassistant: d"),
    )


# From the files' own README: helpful / harmless.
PUBLISHED = {
    "helpful-base": (
        1662,
        {IDENTICAL: 1, PROMPTS_DIFFER: 5, EMPTY_ANSWER: 2, ROLES_DO_NOT_ALTERNATE: 9},
    ),
    "harmless-base": (1621, {PROMPTS_DIFFER: 4, EMPTY_ANSWER: 2, ROLES_DO_NOT_ALTERNATE: 8}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_real_files(data_folder: Path, name: str) -> None:
    rows, odd = PUBLISHED[name]
    file = data_folder / "hh-rlhf" / f"{name}.jsonl.gz"
    made: dict[str, list[Any]] = {}
    for kind in ("dialogues", "preferences", "prompts"):
        report = ImportReport()
        made[kind] = list(import_hh_rlhf(file, kind=kind, report=report))
        assert report.read == rows
        assert report.dropped == odd
        assert report.imported == len(made[kind])
        # A row may be odd in several ways: dropped rows lie between the largest count and the sum.
        assert max(odd.values()) <= rows - report.imported <= sum(odd.values())
    for dialogue, preference, prompt in zip(*made.values(), strict=True):
        assert dialogue.messages == (*preference.prompt, Message("assistant", preference.chosen))
        assert prompt.messages == preference.prompt
        assert prompt.is_safety == dialogue.is_safety == (name == "harmless-base")
        assert type(preference).from_row(preference.to_row()) == preference
