"""Mixing files: how often each dialogue occurs, and that the metrics say what was used."""

from __future__ import annotations

import json
from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama2_chat.chat_format import Segment
from llama2_chat.dialogue import Dialogue, Message
from llama2_chat.errors import UserInputError
from llama2_chat.jsonl import write_rows
from llama2_chat.sft.config import SftConfig
from llama2_chat.sft.data import encode_file, lengths_of, sequences_of
from llama2_chat.sft.made_data import draw_demonstrations
from llama2_chat.sft.mixing import MixedFile, drawn, mix
from llama2_chat.stage import EventLog, StageDirectory


@pytest.fixture
def files(tmp_path) -> list[str]:
    made = []
    for name, count in (("help", 10), ("safety", 4)):
        rows = [
            {"messages": [{"role": "user", "content": f"{name} {n}"}, {"role": "assistant", "content": "A."}]}
            for n in range(count)
        ]
        write_rows(tmp_path / f"{name}.jsonl", rows)
        made.append(str(tmp_path / f"{name}.jsonl"))
    return made


def mixed(files: list[str], *, weights=None, counts=None, seed: int = 0) -> list[MixedFile]:
    return mix(files, weights=weights, counts=counts, seed=seed)


def questions(parts: list[MixedFile]) -> list[str]:
    return [dialogue.messages[0].content for part in parts for dialogue in part.used]


def test_without_weights_every_dialogue_occurs_once_in_order(files) -> None:
    parts = mixed(files)
    assert questions(parts) == [f"help {n}" for n in range(10)] + [f"safety {n}" for n in range(4)]
    assert questions(mixed(files, weights=[1, 1], seed=5)) == questions(parts)
    assert [part.to_row(14) for part in parts] == [
        {"file": "help.jsonl", "dialogues": 10, "weight": 1.0, "count": None, "used": 10, "share": 10 / 14},
        {"file": "safety.jsonl", "dialogues": 4, "weight": 1.0, "count": None, "used": 4, "share": 4 / 14},
    ]


def test_a_half_and_two_and_a_half_times(files) -> None:
    parts = mixed(files, weights=[0.5, 2.5], seed=1)
    counted = Counter(questions(parts))
    assert sorted(counted[f"help {n}"] for n in range(10)) == [0] * 5 + [1] * 5
    assert sorted(counted[f"safety {n}"] for n in range(4)) == [2, 2, 3, 3]
    assert [len(part.used) for part in parts] == [5, 10]


def test_a_number_of_dialogues_from_each_file(files) -> None:
    parts = mixed(files, counts=[3, None])
    assert [len(part.used) for part in parts] == [3, 4]
    assert len(set(questions(parts))) == 7  # without replacement
    assert questions(parts) == sorted(questions(parts))
    rows = [part.to_row(7) for part in parts]
    assert [(row["weight"], row["count"], row["used"]) for row in rows] == [(None, 3, 3), (1.0, None, 4)]


def test_a_number_above_what_the_file_holds_repeats_whole_passes(files) -> None:
    counted = Counter(questions(mixed(files, counts=[0, 11])))
    assert sorted(counted.values()) == [2, 3, 3, 3]  # 11 = 2 passes over 4, and 3 more
    assert set(counted) == {f"safety {n}" for n in range(4)}


@pytest.mark.parametrize("asked", [{"weights": [0.5, 0.5]}, {"counts": [5, 2]}])
def test_the_draw_depends_on_the_seed_alone(files, asked) -> None:
    once, again, other = (questions(mixed(files, **asked, seed=seed)) for seed in (1, 1, 2))
    assert once == again
    assert once != other


def test_what_leaves_nothing_is_the_users_mistake(files) -> None:
    with pytest.raises(UserInputError, match=r"weights: \[0.0, 0.0\] leave none of the 14 dialogues"):
        mixed(files, weights=[0.0, 0.0])
    with pytest.raises(UserInputError, match=r"weights: 0.1 of the 4 dialogues in .*safety\.jsonl is none"):
        mixed(files, weights=[1.0, 0.1])


def test_a_number_of_too_many_passes_is_a_slip(files) -> None:
    assert len(mixed(files, counts=[0, 400])[1].used) == 400
    with pytest.raises(
        UserInputError, match=r"counts: 401 of the 4 dialogues in .*safety\.jsonl; at most 100"
    ):
        mixed(files, counts=[0, 401])


@given(st.integers(1, 50), st.integers(0, 260), st.integers())
def test_each_index_is_drawn_as_often_as_any_other_or_once_more(found: int, wanted: int, seed: int) -> None:
    places = drawn(found, wanted, Random(seed))
    assert places == sorted(places)
    assert len(places) == wanted
    assert set(places) <= set(range(found))
    assert {Counter(places)[index] for index in range(found)} <= {wanted // found, wanted // found + 1}


@pytest.mark.parametrize("weights", [[1.0], [0.0, 0.0], [1.0, -0.1], [1.0, 101.0], [float("nan"), 1.0]])
def test_wrong_weights_are_refused(weights) -> None:
    with pytest.raises(ValueError, match="weights"):
        SftConfig(dialogues=["a", "b"], weights=weights)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"counts": [1]}, "1 counts for 2 files of dialogues; give one for each"),
        ({"counts": [0, 0]}, "every count is 0"),
        ({"counts": [-1, 2]}, "greater than or equal to 0"),
        ({"counts": [1.5, 2]}, "valid integer"),
        ({"counts": [1, 2], "weights": [1.0, 1.0]}, "weights are given too; give one of the two"),
    ],
)
def test_wrong_counts_are_refused(fields, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        SftConfig(dialogues=["a", "b"], **fields)
    assert SftConfig(dialogues=["a", "b"], counts=[None, 0]).counts == [None, 0]


class LetterFormat:
    """Every letter is a token; one more ends each message."""

    stop_id = 2

    def segments(self, messages):
        return [Segment([ord(c) for c in m.content] + [2], m.role == "assistant") for m in messages]


def dialogue(*contents: str, safety: bool = False) -> Dialogue:
    roles = ("user", "assistant") * len(contents)
    return Dialogue(tuple(map(Message, roles, contents)), is_safety=safety)


def test_what_happened_to_a_files_dialogues_is_counted_said_and_logged(tmp_path, capsys) -> None:
    """Six dialogues at 8 tokens: of each fate one or more, counted by hand."""
    dialogues = [
        dialogue("abc", "de"),  # 4 + 3 tokens: fits, 3 of them trained
        dialogue("abc", "", safety=True),  # an empty answer trains its end
        dialogue("abc", "de", "f", "gh"),  # 12: loses its first turn, 2 + 3 stay
        dialogue("abc", "defgh", safety=True),  # 4 + 6: too long even alone
        dialogue("abc", "d", "e"),  # 4 + 2 + 2: ends with the user
        dialogue("abcdefgh"),  # 9: too long, and nothing to leave out
    ]
    file = encode_file(
        "/data/mine.jsonl", dialogues, chat_format=LetterFormat(), loss_policy="all_answers", max_tokens=8
    )
    assert [len(sequence.input_ids) for sequence in file.sequences] == [7, 5, 5, 8]
    row = {
        "file": "mine.jsonl",
        "safety": 2,
        "empty_contents": 1,
        "lengths": {"kept": 3, "shortened": 1, "dropped": 2},
        "untrained": 1,
        "trained_tokens": 3 + 1 + 3,
    }
    assert file.to_row() == row
    assert lengths_of([file, file]) == {"kept": 6, "shortened": 2, "dropped": 4}
    assert len(sequences_of([file, file])) == 8

    directory = StageDirectory(tmp_path / "sft", EventLog(tmp_path / "events.jsonl"))
    file.announce(directory)
    assert capsys.readouterr().err == (
        "sft: mine.jsonl: of 6 dialogues 1 shortened: oldest turns left out to fit into 8 tokens "
        "(training.sequence_length); 2 dropped: the last turn alone is longer than 8 tokens "
        "(training.sequence_length); 1 train nothing: no answer that the loss policy selects\n"
    )
    (event,) = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    assert (event["event"], event["file"], event["rows"], event["what"]) == (
        "data_reduced",
        "mine.jsonl",
        6,
        "dialogues",
    )
    assert sorted(event["reasons"].values()) == [1, 1, 2]


def test_nothing_is_said_of_a_file_that_fits(tmp_path, capsys) -> None:
    file = encode_file(
        "mine.jsonl",
        [dialogue("a", "b")],
        chat_format=LetterFormat(),
        loss_policy="last_answer",
        max_tokens=4,
    )
    file.announce(StageDirectory(tmp_path / "sft", EventLog(tmp_path / "events.jsonl")))
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "events.jsonl").exists()


def test_demonstrations_are_drawn_from_all_files_and_stay_with_theirs(files) -> None:
    """Half of the mix with 7 made dialogues: 7 of the 14, each under the file that holds it."""
    help_, safety = draw_demonstrations(files, 0.5, 7, seed=0)
    assert len(help_) + len(safety) == 7
    assert {one.messages[0].content.split()[0] for one in help_} == {"help"}
    assert {one.messages[0].content.split()[0] for one in safety} == {"safety"}
    assert [len(part) for part in draw_demonstrations(files, 0.5, 100, seed=3)] == [10, 4]
    assert draw_demonstrations(files, 0.0, 7, seed=3) == [[], []]
