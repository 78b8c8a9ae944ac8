"""Preference rows to token ids: what is dropped, and that both sides of a pair keep the same turns."""

from __future__ import annotations

from llama2_chat.chat_format import Segment
from llama2_chat.dialogue import Message, Preference
from llama2_chat.reward.data import collate_pairs, encode_pairs, training_columns


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
        "dropped": {"preferred response is the unsafe one": 1},
    }


def test_both_sides_lose_the_same_turns() -> None:
    # prompt 5 + 3 + 3 tokens; chosen 2, rejected 5: 13 and 16. Only the rejected side exceeds 14.
    pair = Preference(LONG_PROMPT, "x", "v w x y")
    _, ((chosen, rejected),), _ = encode_pairs([pair], WordFormat(), 14)
    assert chosen == [12, 12, 2, 11, 2]
    assert rejected == [12, 12, 2, 11, 11, 11, 11, 2]
    _, ((chosen, rejected),), _ = encode_pairs([pair], WordFormat(), 16)
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
