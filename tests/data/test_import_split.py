"""The held-out part of an import: a function of the first user message alone, on the real files of every format."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import pytest

from llama2_chat.data_import import DEFAULT_HELD_OUT_SHARE, FORMATS, KINDS, ImportReport, import_rows
from llama2_chat.data_import.split import is_held_out
from llama2_chat.dialogue import Message, Preference
from llama2_chat.errors import UserInputError

FILES = {
    "helpful": ("hh-rlhf", "hh-rlhf/helpful-base.jsonl.gz"),
    "harmless": ("hh-rlhf", "hh-rlhf/harmless-base.jsonl.gz"),
    "pandalm": ("pandalm", "pandalm/testset-v1.json"),
    "oasst": ("oasst", "oasst/en_100_tree.jsonl.gz"),
    "xstest": ("xstest", "xstest/xstest_prompts.csv"),
    "truthfulqa": ("truthfulqa", "truthfulqa/TruthfulQA.csv"),
    "toxigen": ("toxigen", "toxigen/hate_immigrant_1k.txt"),
    "bold": ("bold", "bold/race_prompt.json"),
    "diasafety": ("diasafety", "diasafety/train.json"),
}

SAMPLED_BY_THE_SAME_HASH = {"xstest": 0.6}
"""Files that hold only the prompts with the smallest SHA-256, so that more of them than the share are held out."""


def messages_of(row: Any) -> tuple[Message, ...]:
    return row.prompt if isinstance(row, Preference) else row.messages


def first_of(row: Any) -> str:
    return next(message.content for message in messages_of(row) if message.role == "user").strip()


def parts(file: Path, format_: Any, kind: Any, share: float | None) -> tuple[list[Any], list[Any], list[Any]]:
    """All rows, those to train on and those held out."""
    rows = [list(import_rows(format_, file, kind=kind))]
    for split in ("train", "held_out"):
        report = ImportReport()
        rows.append(
            list(
                import_rows(format_, file, kind=kind, split=split, held_out_share=share, report=report)  # type: ignore[arg-type]
            )
        )
        assert report.in_split == len(rows[-1])
        assert report.imported == len(rows[0])
    return rows[0], rows[1], rows[2]


@pytest.mark.parametrize(
    ("text", "fraction"),
    [
        ("abc", 0xBA7816BF / 2**32),
        ("a", 0xCA978112 / 2**32),
        ("", 0xE3B0C442 / 2**32),
        # Two bytes of UTF-8, c3 a9: echo -n é | sha256sum
        ("é", 0x4A99557E / 2**32),
    ],
)
def test_the_fraction_is_that_of_sha256(text: str, fraction: float) -> None:
    """SHA-256 of "abc", "a" and "" as published; a process or machine of its own cannot change it."""
    for content in (text, f" \n{text}\t"):
        messages = (Message("system", "abc"), Message("user", content), Message("assistant", "a"))
        assert is_held_out(messages, fraction + 1e-9)
        assert not is_held_out(messages, fraction - 1e-9)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("name", FILES)
def test_no_first_message_is_in_both_parts(data_folder: Path, name: str, share: float) -> None:
    format_, path = FILES[name]
    for kind in FORMATS[format_].kinds:
        whole, train, held_out = parts(data_folder / path, format_, kind, share)
        assert train
        assert held_out
        firsts = [{first_of(row) for row in rows} for rows in (train, held_out)]
        assert not firsts[0] & firsts[1]
        # Both parts together are everything, each in the file's order.
        sides = iter(train), iter(held_out)
        for row in whole:
            assert next(sides[first_of(row) in firsts[1]]) == row
        assert [next(side, None) for side in sides] == [None, None]
        # Independent draws of the messages: four standard deviations of a binomial.
        count = len(firsts[0]) + len(firsts[1])
        expected = share / SAMPLED_BY_THE_SAME_HASH.get(name, 1.0)
        assert abs(len(firsts[1]) / count - expected) < 4 * math.sqrt(expected * (1 - expected) / count)


@pytest.mark.parametrize("name", FILES)
def test_every_kind_is_split_alike(data_folder: Path, name: str) -> None:
    format_, path = FILES[name]
    kinds = FORMATS[format_].kinds
    by_kind = {kind: parts(data_folder / path, format_, kind, None) for kind in kinds}
    for part in (1, 2):
        dialogues, preferences, prompts = (by_kind[kind][part] if kind in kinds else [] for kind in KINDS)
        if "dialogues" in kinds and format_ != "oasst":  # row n comes from one row
            assert [row.messages[:-1] for row in dialogues] == [row.messages for row in prompts]
        if format_ in ("hh-rlhf", "pandalm"):
            assert [row.messages for row in prompts] == [row.prompt for row in preferences]
        asked = {first_of(row) for row in prompts}
        assert {first_of(row) for row in (*dialogues, *preferences)} <= asked
    trained = {first_of(row) for kind in kinds for row in by_kind[kind][1]}
    held_out = {first_of(row) for kind in kinds for row in by_kind[kind][2]}
    assert not trained & held_out


def test_what_a_smaller_share_holds_out_a_larger_one_does_too(data_folder: Path) -> None:
    format_, path = FILES["helpful"]
    file = data_folder / path
    held_out = [parts(file, format_, "prompts", share)[2] for share in (0.1, DEFAULT_HELD_OUT_SHARE, 0.5)]
    sets = [{first_of(row) for row in rows} for rows in held_out]
    assert sets[0] < sets[1] < sets[2]
    assert held_out[1] == parts(file, format_, "prompts", None)[2]
    texts = {first_of(row) for row in import_rows("hh-rlhf", file, kind="prompts")}
    assert sets[1] == {
        text for text in texts if int(hashlib.sha256(text.encode()).hexdigest(), 16) / 16**64 < 0.25
    }


def test_the_formats_of_the_real_files_are_all_there_are() -> None:
    assert {format_ for format_, _ in FILES.values()} == set(FORMATS)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"format_": "alpaca"}, 'format "alpaca" unknown; one of hh-rlhf, pandalm, oasst'),
        ({"format_": "panda-lm"}, 'did you mean "pandalm"'),
        ({"label": "borderline"}, 'label "borderline" unknown; one of safe, unsafe'),
        ({"label": "safe"}, "the rows of oasst are not labelled safe or unsafe; leave label out"),
        ({"format_": "toxigen", "kind": "dialogues"}, "toxigen holds no dialogues; kind is one of prompts"),
        ({"split": "test"}, 'split "test" unknown; one of train, held_out'),
        ({"split": None}, "a held-out share without a split has no effect"),
        ({"held_out_share": 1.0}, "the held-out share is 1.0; it lies between 0 and 1, both excluded"),
    ],
)
def test_wrong_arguments_are_refused_before_reading(changes: dict[str, Any], problem: str) -> None:
    arguments = {"format_": "oasst", "file": "none", "kind": "prompts"}
    with pytest.raises(UserInputError, match=problem):
        import_rows(**(arguments | {"split": "train", "held_out_share": 0.5} | changes))
