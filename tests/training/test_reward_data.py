"""Preference rows to token ids: what is dropped, and that both sides of a pair keep the same turns."""

from __future__ import annotations

import json
from collections import Counter

from llama2_chat.chat_format import Segment
from llama2_chat.dialogue import Message, Preference
from llama2_chat.jsonl import write_rows
from llama2_chat.reward.data import PairReport, collate_pairs, encode_pairs, read_pairs, training_columns
from llama2_chat.stage import EventLog, StageDirectory


class WordFormat:
    """Every word is a token, numbered by its length; two more for each turn."""

    stop_id = 2

    def segments(self, messages):
        return [
            Segment([*(10 + len(w) for w in m.content.split()), 2], m.role == "assistant") for m in messages
        ]


LONG_PROMPT = (Message("user", "a b c d"), Message("assistant", "e f"), Message("user", "gg hh"))


def test_pairs_that_prefer_the_unsafe_side_are_dropped_and_counted() -> None:
    prompt = (Message("user", "q"),)
    rows = [
        Preference(prompt, "x", "y", "better", True, False),
        Preference(prompt, "x", "y", "better", False, True),
        Preference(prompt, "x", "y", None, False, False),
    ]
    kept, _, report = encode_pairs(rows, WordFormat(), 100)
    assert kept == [rows[0], rows[2]]
    assert report.to_row() == {
        "kept": 2,
        "unrated": 1,
        "shortened": 0,
        "dropped": {"preferred response is the unsafe one": 1},
    }


def test_both_sides_lose_the_same_turns() -> None:
    # prompt 5 + 3 + 3 tokens; chosen 2, rejected 5: 13 and 16. Only the rejected side exceeds 14.
    pair = Preference(LONG_PROMPT, "x", "v w x y")
    _, ((chosen, rejected),), report = encode_pairs([pair], WordFormat(), 14)
    assert (report.kept, report.shortened) == (1, 1)
    assert chosen == [12, 12, 2, 11, 2]
    assert rejected == [12, 12, 2, 11, 11, 11, 11, 2]
    _, ((chosen, rejected),), report = encode_pairs([pair], WordFormat(), 16)
    assert (report.kept, report.shortened) == (1, 0)
    assert (len(chosen), len(rejected)) == (13, 16)


def test_what_cannot_fit_is_counted() -> None:
    _, tokens, report = encode_pairs([Preference(LONG_PROMPT, "x", "v w x y")], WordFormat(), 7)
    assert tokens == []
    assert report.dropped == {"longer than 7 tokens": 1}


def test_a_batch_whose_first_row_has_neither_rating_nor_label_keeps_the_others() -> None:
    prompt = (Message("user", "q"),)
    pairs = [
        Preference(prompt, "x", "y y"),
        Preference(prompt, "x", "y", "significantly_better", True, False),
    ]
    kept, tokens, _ = encode_pairs(pairs, WordFormat(), 100)
    columns = training_columns(kept, tokens, margin_table="large")
    rows = [{name: values[i] for name, values in columns.items()} for i in range(2)]
    batch = collate_pairs(rows, 0)
    assert batch["margin"].tolist() == [0.0, 3.0]
    assert batch["safe"].tolist() == [-1, 1, -1, 0]


def test_what_happened_to_each_files_pairs_is_said_and_logged(tmp_path, capsys) -> None:
    """Two files at 14 tokens: one pair fits, one loses turns, one is dropped; the sum adds up."""
    short = Preference((Message("user", "q"),), "x", "y", "better")
    cut = Preference(LONG_PROMPT, "x", "v w x y")
    long = Preference(LONG_PROMPT, "x", " ".join("vwxyabcdefghijk"))
    write_rows(tmp_path / "a.jsonl", [short.to_row(), cut.to_row()])
    write_rows(tmp_path / "b.jsonl", [long.to_row(), short.to_row()])
    files = read_pairs([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], WordFormat(), 14)
    assert [file.to_row() for file in files] == [
        {"file": "a.jsonl", "kept": 2, "unrated": 1, "shortened": 1, "dropped": {}},
        {"file": "b.jsonl", "kept": 1, "unrated": 0, "shortened": 0, "dropped": {"longer than 14 tokens": 1}},
    ]
    total = sum((file.report for file in files), PairReport())
    assert total == PairReport(3, 1, 1, Counter({"longer than 14 tokens": 1}))

    directory = StageDirectory(tmp_path / "rm", EventLog(tmp_path / "events.jsonl"))
    for file in files:
        file.announce(directory)
    assert capsys.readouterr().err.splitlines() == [
        "rm: a.jsonl: of 2 pairs 1 shortened: oldest turns left out to fit into 14 tokens",
        "rm: b.jsonl: of 2 pairs 1 dropped: longer than 14 tokens",
    ]
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(event["file"], event["rows"], event["what"]) for event in events] == [
        ("a.jsonl", 2, "pairs"),
        ("b.jsonl", 2, "pairs"),
    ]
