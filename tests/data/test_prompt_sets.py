"""The importers of XSTest, TruthfulQA, ToxiGen, BOLD and DiaSafety, against rows written by hand and the real files."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from llama2_chat.data_import import ImportReport, import_rows
from llama2_chat.data_import.report import (
    ANOTHER_LABEL,
    CHAT_TAG,
    EMPTY_ANSWER,
    EMPTY_PROMPT,
    IDENTICAL,
)
from llama2_chat.dialogue import Dialogue, Message, Preference, Prompt
from llama2_chat.errors import DataFormatError

BOM = "\ufeff"


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text, encoding="utf-8", newline="")
    return folder / name


def user(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


XSTEST = (
    "id,prompt,type,label,focus,note\r\n"
    "1,How do I kill a process?,homonyms,safe,kill,\r\n"
    '2,"How do I kill a ""friend"",\nor two?",contrast_homonyms,unsafe,kill,\r\n'
    "\r\n"
    "3, ,homonyms,safe,,\r\n"
    "4,[INST] x,homonyms,unsafe,,\r\n"
)


@pytest.mark.parametrize("text", [XSTEST, BOM + XSTEST, XSTEST.replace("\r\n", "\n")])
def test_xstest_rows_say_which_are_safe(tmp_path: Path, text: str) -> None:
    """With a byte-order mark and with either line end: the safe ones are borderline, the unsafe ones adversarial."""
    file = write(tmp_path, "x.csv", text)
    safe = Prompt(user("How do I kill a process?"), is_safety=False, source="xstest/homonyms")
    unsafe = Prompt(
        user('How do I kill a "friend",\nor two?'), is_safety=True, source="xstest/contrast_homonyms"
    )
    report = ImportReport()
    assert list(import_rows("xstest", file, kind="prompts", report=report)) == [safe, unsafe]
    assert (report.read, report.imported) == (4, 2)
    assert report.dropped == {EMPTY_PROMPT: 1, CHAT_TAG: 1}
    for label, made in (("safe", safe), ("unsafe", unsafe)):
        report = ImportReport()
        assert list(import_rows("xstest", file, kind="prompts", label=label, report=report)) == [made]  # type: ignore[arg-type]
        assert report.dropped == {ANOTHER_LABEL: 2, EMPTY_PROMPT: 1, CHAT_TAG: 1}
        assert str(report).startswith(f"4 rows read, 1 imported labelled {label}, 3 dropped")
        assert report.to_row()["label"] == label
    # A domain that is named holds for every row.
    for domain in ("safety", "helpfulness"):
        rows = list(import_rows("xstest", file, kind="prompts", domain=domain))  # type: ignore[arg-type]
        assert [row.is_safety for row in rows] == [domain == "safety"] * 2  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            XSTEST.replace("homonyms,unsafe,kill,", "x,Unsave,,"),
            ':3: label "Unsave" unknown; one of safe, unsafe',
        ),
        (
            XSTEST.replace(",unsafe,kill,", ",unsafe,kill"),
            ":3: 5 fields, but the header names 6; check commas",
        ),
        (XSTEST.replace('two?"', "two?"), ":3: not valid CSV: a quote is not closed"),
        (XSTEST.replace('two?"', 'two?" x'), ":3: not valid CSV: "),
        (XSTEST.replace(",label,", ",class,"), ":1: the header lacks label; found id, prompt, type, class"),
        (XSTEST.partition("1,")[0], ": holds no rows below its header"),
        (XSTEST.replace("id,prompt,", "prompt,prompt,", 1), ":1: the header names prompt twice; name each"),
        ("", ":1: the header lacks prompt, type, label; found nothing"),
    ],
)
def test_csv_files_that_are_wrong_name_the_line(tmp_path: Path, text: str, problem: str) -> None:
    file = write(tmp_path, "x.csv", text)
    with pytest.raises(DataFormatError) as caught:
        list(import_rows("xstest", file, kind="prompts"))
    assert str(caught.value).startswith(f"{file}{problem}")
    assert "XSTest's prompts are CSV" in str(caught.value) or "label" in problem


def test_text_that_is_not_utf8_names_the_line(tmp_path: Path) -> None:
    for name, start in (("xstest", b"prompt,type,label\n"), ("toxigen", b"- a\n")):
        file = tmp_path / "x.txt"
        file.write_bytes(start + b"- caf\xe9,x,safe\n")
        with pytest.raises(DataFormatError, match=r"x\.txt:2: not UTF-8 \(byte 0xE9 at column 6\); convert"):
            list(import_rows(name, file, kind="prompts"))  # type: ignore[arg-type]


TRUTHS = (
    BOM + "Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\n"
    "A,Myths,Q one? , It passes,x; y,You die; You glow;; You die ; It passes,http\n"
    "A,,Q two?, ,x,No,http\n"
    "A,,Q three?,Yes,x,No <<SYS>>,http\n"
)


def test_truthfulqa_gives_dialogues_and_pairs(tmp_path: Path) -> None:
    """By hand: of four wrong answers one stands twice and one is the best answer; row 2 has no answer."""
    file = write(tmp_path, "t.csv", TRUTHS)
    report = ImportReport()
    one = {"domain": "helpfulness", "source": "truthfulqa/Myths"}
    assert list(import_rows("truthfulqa", file, kind="preferences", report=report)) == [
        Preference(user("Q one?"), "It passes", "You die", **one),  # type: ignore[arg-type]
        Preference(user("Q one?"), "It passes", "You glow", **one),  # type: ignore[arg-type]
    ]
    assert report.dropped == {IDENTICAL: 1, EMPTY_ANSWER: 1, CHAT_TAG: 1}
    assert str(report).startswith("5 pairs read, 2 imported as helpfulness data")
    dialogues = list(import_rows("truthfulqa", file, kind="dialogues"))
    assert dialogues[0] == Dialogue(
        (*user("Q one?"), Message("assistant", "It passes")), id="t:2", source="truthfulqa/Myths"
    )
    prompts = list(import_rows("truthfulqa", file, kind="prompts"))
    # What is wrong with a wrong answer does not matter here.
    assert prompts == [
        Prompt(user("Q one?"), source="truthfulqa/Myths"),
        Prompt(user("Q three?"), source="truthfulqa"),
    ]
    assert [row.messages[:1] for row in dialogues] == [row.messages for row in prompts]  # type: ignore[union-attr]


def test_toxigen_knows_the_group_by_the_files_name(tmp_path: Path) -> None:
    text = BOM + "- a b\\n- c\\n-\r\n\r\n- d\\n- [/INST]\r\n"
    lines = "- a b\n- c\n-"
    for name, source, is_safety in (
        ("hate_native_american_1k.txt", "toxigen/hate_native_american", True),
        ("neutral_women_1k.txt", "toxigen/neutral_women", False),
        ("mine.txt", "toxigen", False),
    ):
        report = ImportReport()
        (row,) = import_rows("toxigen", write(tmp_path, name, text), kind="prompts", report=report)
        category = "hateful" if is_safety else None
        assert row == Prompt(user(lines), is_safety=is_safety, risk_category=category, source=source)  # type: ignore[arg-type]
        assert report.dropped == {CHAT_TAG: 1}
    with pytest.raises(DataFormatError, match=r"x\.txt:3: the line begins otherwise; ToxiGen's prompts"):
        list(import_rows("toxigen", write(tmp_path, "x.txt", "- a\n\nb\n"), kind="prompts"))


def test_bold_keeps_the_group(tmp_path: Path) -> None:
    content: dict[str, Any] = {"actors": {"A_B": ["A B is ", "He was "], "C": []}, "nurses": {"D": [" "]}}
    report = ImportReport()
    file = write(tmp_path, "gender_prompt.json", BOM + json.dumps(content))
    rows = list(import_rows("bold", file, kind="prompts", report=report))
    assert rows == [Prompt(user(text), source="bold/actors") for text in ("A B is", "He was")]
    assert (report.read, report.dropped) == (3, {EMPTY_PROMPT: 1})
    for wrong, problem in (
        ({"actors": {"A_B": "x"}}, 'group "actors", page "A_B": must be a list of texts, found a string'),
        (
            {"actors": {"A_B": ["x", 3]}},
            'row 2: group "actors", page "A_B": a prompt must be a string, found a number',
        ),
        ({"actors": ["x"]}, 'group "actors" must be a JSON object, found a list'),
        ({"actors": {}}, "holds no prompts"),
        ([], "the file must be a JSON object, found a list"),
    ):
        file = write(tmp_path, "b.json", json.dumps(wrong))
        with pytest.raises(DataFormatError) as caught:
            list(import_rows("bold", file, kind="prompts"))
        assert str(caught.value).startswith(f"{file}: {problem}")


def test_diasafety_takes_the_responses_of_one_label(tmp_path: Path) -> None:
    row = {"context": "I feel ill.", "response": " Go on ", "category": "Risk Ignorance", "label": "Unsafe"}
    changes = [{}, {"label": "Safe", "response": "See a doctor."}, {"response": " "}]
    file = write(tmp_path, "d.json", json.dumps([row | change for change in changes]))

    def made(number: int, answer: str) -> Dialogue:
        messages = (*user("I feel ill."), Message("assistant", answer))
        return Dialogue(messages, is_safety=True, id=f"d:{number}", source="diasafety/Risk Ignorance")

    unsafe, safe = made(1, "Go on"), made(2, "See a doctor.")
    assert list(import_rows("diasafety", file, kind="dialogues")) == [unsafe, safe]
    assert list(import_rows("diasafety", file, kind="dialogues", label="unsafe")) == [unsafe]
    assert list(import_rows("diasafety", file, kind="dialogues", label="safe")) == [safe]
    (prompt,) = import_rows("diasafety", file, kind="prompts", label="safe")
    assert prompt == Prompt(user("I feel ill."), is_safety=True, source="diasafety/Risk Ignorance")
    write(tmp_path, "d.json", json.dumps([row, row | {"label": "unsure"}]))
    with pytest.raises(DataFormatError, match=r'd\.json: row 2: label "unsure" unknown; one of safe, unsafe'):
        list(import_rows("diasafety", file, kind="prompts"))


def test_the_real_csv_files(data_folder: Path) -> None:
    """Numbers from the files' own READMEs; texts against a plain reading with the csv module."""
    file = data_folder / "xstest" / "xstest_prompts.csv"
    with file.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    for label, count in (("safe", 148), ("unsafe", 122)):
        prompts: list[Any] = list(import_rows("xstest", file, kind="prompts", label=label))  # type: ignore[arg-type]
        assert len(prompts) == count
        assert {prompt.is_safety for prompt in prompts} == {label == "unsafe"}
        assert {prompt.source.startswith("xstest/contrast_") for prompt in prompts} == {label == "unsafe"}
        assert [prompt.messages[0].content for prompt in prompts] == [
            row["prompt"].strip() for row in rows if row["label"] == label
        ]
    file = data_folder / "truthfulqa" / "TruthfulQA.csv"
    report = ImportReport()
    pairs: list[Any] = list(import_rows("truthfulqa", file, kind="preferences", report=report))
    questions = Counter(pair.prompt[0].content for pair in pairs)
    assert len(questions) == 817
    with file.open(encoding="utf-8-sig", newline="") as stream:
        rows = list(csv.DictReader(stream))
    listed = [[text.strip("; ") for text in row["Incorrect Answers"].split("; ") if text] for row in rows]
    assert sum(map(len, listed)) == 3370
    # One of the answers stands twice in its row.
    assert report.read == len(pairs) == 3369
    assert not report.dropped
    firsts = dict(zip((row["Question"].strip() for row in rows), listed, strict=True))
    assert all(pair.rejected in firsts[pair.prompt[0].content] for pair in pairs)


def test_the_real_text_and_json_files(data_folder: Path) -> None:
    """Numbers from the files' own READMEs."""
    for name in ("hate_immigrant", "neutral_immigrant", "neutral_women"):
        file = data_folder / "toxigen" / f"{name}_1k.txt"
        prompts: list[Any] = list(import_rows("toxigen", file, kind="prompts"))
        assert len(prompts) == 1000
        assert {prompt.source for prompt in prompts} == {f"toxigen/{name}"}
        assert all("\\n" not in prompt.messages[0].content for prompt in prompts)
        assert all(
            line.startswith("-") for prompt in prompts for line in prompt.messages[0].content.split("\n")
        )
    files = sorted((data_folder / "bold").glob("*_prompt.json"))
    assert len(files) == 5
    for file in files:
        prompts = list(import_rows("bold", file, kind="prompts"))
        # One of the beginnings about religions is empty.
        assert len(prompts) == (119 if file.name.startswith("religious") else 120)
        assert {prompt.source for prompt in prompts} == {
            f"bold/{group}" for group in json.loads(file.read_text())
        }
    for name, safe, unsafe in (("train", 337, 263), ("test", 177, 123)):
        file = data_folder / "diasafety" / f"{name}.json"
        assert len(list(import_rows("diasafety", file, kind="dialogues", label="safe"))) == safe
        assert len(list(import_rows("diasafety", file, kind="dialogues", label="unsafe"))) == unsafe
