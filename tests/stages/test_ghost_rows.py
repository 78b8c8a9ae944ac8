"""Golden training rows of a dialogue of three turns: text, token ids and mask, token by token.

The ids are those of the tokenizer that the project ships (`recipes/tiny/base`), written out by hand from its pieces.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llama2_chat.chat_format import build_chat_format
from llama2_chat.dialogue import Message
from llama2_chat.ghost_attention.config import GhostAttentionConfig
from llama2_chat.ghost_attention.training_rows import TrainingRow, training_rows
from llama2_chat.tokenization import tokenize_dialogue
from llama2_chat.tokenizers import load_tokenizer

BASE = Path(__file__).resolve().parents[2] / "recipes/tiny/base"
BOS, EOS, SPACE = 1, 2, 331
OPEN, CLOSE = 471, 472  # [INST] [/INST]
BE_BRIEF = [308, 333, 321, 762, 309, 262]  # e b r ie f .
HI, YOU, BYE = [424, 312, 277], [621, 277], [449, 328, 308, 277]  # H i ?   You ?   B y e ?
A, B, C = [391, 262, SPACE, EOS], [449, 262, SPACE, EOS], [421, 262, SPACE, EOS]

FIRST = [BOS, OPEN, 449, *BE_BRIEF, *HI, CLOSE]  # 449 is " B", 279 below is "B"
SECOND = [BOS, OPEN, *YOU, CLOSE]
THIRD = [BOS, OPEN, *BYE, CLOSE]
# <<SYS>> \n B e… \n <</SYS>> \n \n H i ?
FIRST_SYSTEM = [BOS, OPEN, 473, 259, 279, *BE_BRIEF, 259, 470, 259, 259, 285, 312, 277, CLOSE]
# [INST] You ? with the instruction before it: " B" again, as in the first turn
SECOND_INSTRUCTED = [BOS, OPEN, 449, *BE_BRIEF, *YOU, CLOSE]
THIRD_INSTRUCTED = [BOS, OPEN, 449, *BE_BRIEF, *BYE, CLOSE]

QUESTIONS, ANSWERS = ("Hi?", "You?", "Bye?"), ("A.", "B.", "C.")


@pytest.fixture(scope="module")
def chat_format():
    return build_chat_format("llama2", load_tokenizer(str(BASE)))


def config_of(**changes: Any) -> GhostAttentionConfig:
    values = {"policy": "p", "dialogues": ["d"], "instructions": ["i"], **changes}
    return GhostAttentionConfig(**values)


def sampled(*, system: str | None = None, statuses: str = "ccc", followed: str = "???") -> dict[str, Any]:
    """A row of samples.jsonl; a letter an answer: complete, too long or empty; yes, no or not judged."""
    prompt = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in zip(QUESTIONS, ANSWERS, strict=True):
        prompt.append({"role": "user", "content": f"Be brief. {question}"})
        prompt.append({"role": "assistant", "content": answer})
    names = {"c": "complete", "t": "too_long", "e": "empty"}
    verdicts: dict[str, dict[str, bool] | None] = {"y": {"x": True}, "n": {"x": False, "z": True}, "?": None}
    answers = [
        {"status": names[status], "followed": verdicts[follows]}
        for status, follows in zip(statuses, followed, strict=True)
    ]
    return {"prompt": prompt[:-1], "response": "C.", "instruction": "Be brief.", "answers": answers}


def texts(row: TrainingRow) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in row.messages]


def encoded(row: TrainingRow, chat_format, loss_policy: str) -> tuple[list[int], list[int]]:
    """Ids, and those of them that are trained by their places."""
    tokens = tokenize_dialogue(row.messages, chat_format, loss_policy)
    return tokens.input_ids, [place for place, trained in enumerate(tokens.loss_mask) if trained]


def masked(*segments: tuple[list[int], bool]) -> tuple[list[int], list[int]]:
    """What `encoded` should give: ids and the places of those that are trained."""
    marked = [(token, trained) for ids, trained in segments for token in ids]
    return [token for token, _ in marked], [place for place, (_, trained) in enumerate(marked) if trained]


def test_in_the_first_user_message(chat_format) -> None:
    config = config_of()
    (row,) = training_rows(sampled(), config, chat_format)
    assert texts(row) == [
        ("user", "Be brief. Hi?"), ("assistant", "A."), ("user", "You?"), ("assistant", "B."),
        ("user", "Bye?"), ("assistant", "C."),
    ]  # fmt: skip
    assert encoded(row, chat_format, config.loss_policy) == (
        [1, 471, 449, 308, 333, 321, 762, 309, 262, 424, 312, 277, 472, 391, 262, 331, 2,
         1, 471, 621, 277, 472, 449, 262, 331, 2,
         1, 471, 449, 328, 308, 277, 472, 421, 262, 331, 2],
        [33, 34, 35, 36],  # C . space EOS, and nothing before
    )  # fmt: skip


def test_in_the_system_message(chat_format) -> None:
    config = config_of(place="system")
    (row,) = training_rows(sampled(), config, chat_format)
    assert texts(row) == [
        ("system", "Be brief."), ("user", "Hi?"), ("assistant", "A."), ("user", "You?"), ("assistant", "B."),
        ("user", "Bye?"), ("assistant", "C."),
    ]  # fmt: skip
    assert encoded(row, chat_format, config.loss_policy) == masked(
        (FIRST_SYSTEM, False), (A, False), (SECOND, False), (B, False), (THIRD, False), (C, True)
    )


def test_after_the_dialogues_own_system_message(chat_format) -> None:
    (row,) = training_rows(sampled(system="Be kind."), config_of(place="system"), chat_format)
    assert texts(row)[:2] == [("system", "Be kind.\nBe brief."), ("user", "Hi?")]
    (row,) = training_rows(sampled(system="Be kind."), config_of(), chat_format)
    assert texts(row)[:2] == [("system", "Be kind."), ("user", "Be brief. Hi?")]
    for place in ("system", "first_user"):
        (row,) = training_rows(sampled(system="Be kind."), config_of(place=place), chat_format)
        assert "brief" not in "".join(text for _, text in texts(row)[2:])


def test_control_without_the_mask(chat_format) -> None:
    config = config_of(loss_policy="all_answers")
    (row,) = training_rows(sampled(), config, chat_format)
    assert row == training_rows(sampled(), config_of(), chat_format)[0]
    assert encoded(row, chat_format, config.loss_policy) == masked(
        (FIRST, False), (A, True), (SECOND, False), (B, True), (THIRD, False), (C, True)
    )


def test_control_without_the_drop(chat_format) -> None:
    config = config_of(keep_instruction="every_turn")
    (row,) = training_rows(sampled(), config, chat_format)
    assert [text for role, text in texts(row) if role == "user"] == [
        f"Be brief. {text}" for text in QUESTIONS
    ]
    assert encoded(row, chat_format, config.loss_policy) == masked(
        (FIRST, False),
        (A, False),
        (SECOND_INSTRUCTED, False),
        (B, False),
        (THIRD_INSTRUCTED, False),
        (C, True),
    )


@pytest.mark.parametrize(("place", "first"), [("first_user", FIRST), ("system", FIRST_SYSTEM)])
def test_a_row_for_every_answer(chat_format, place: str, first: list[int]) -> None:
    config = config_of(place=place, rows_per_dialogue="every_answer")
    rows = training_rows(sampled(), config, chat_format)
    assert [encoded(row, chat_format, config.loss_policy) for row in rows] == [
        masked((first, False), (A, True)),
        masked((first, False), (A, False), (SECOND, False), (B, True)),
        masked((first, False), (A, False), (SECOND, False), (B, False), (THIRD, False), (C, True)),
    ]


@pytest.mark.parametrize(
    ("statuses", "followed", "last", "every"),
    [
        ("ccc", "???", "complete", ["complete"] * 3),
        ("ccc", "yyy", "complete", ["complete"] * 3),
        ("cec", "???", "empty", ["complete", "empty", "empty"]),
        ("cet", "yyy", "empty", ["complete", "empty", "empty"]),
        ("ccn".replace("n", "t"), "nyy", "too_long", ["not_followed", "complete", "too_long"]),
        # What does not follow is history that may stand; it is not trained itself.
        ("ccc", "yny", "complete", ["complete", "not_followed", "complete"]),
        ("ccc", "yyn", "not_followed", ["complete", "complete", "not_followed"]),
        ("cce", "yyn", "empty", ["complete", "complete", "empty"]),
    ],
)
def test_what_an_unfit_answer_costs(
    chat_format, statuses: str, followed: str, last: str, every: list[str]
) -> None:
    row = sampled(statuses=statuses, followed=followed)
    for mode, expected in (("last", [last]), ("every_answer", every)):
        made = training_rows(row, config_of(rows_per_dialogue=mode), chat_format)
        assert [one.status for one in made] == expected
        assert all(bool(one.messages) == (one.status == "complete") for one in made)


def test_where_all_answers_are_trained_all_must_follow(chat_format) -> None:
    config = config_of(loss_policy="all_answers", rows_per_dialogue="every_answer")
    made = training_rows(sampled(followed="yny"), config, chat_format)
    assert [one.status for one in made] == ["complete", "not_followed", "not_followed"]


@pytest.mark.parametrize("place", ["first_user", "system"])
@pytest.mark.parametrize("system", [None, "Be kind."])
def test_too_long_a_row_loses_its_oldest_turns_and_never_the_instruction(
    chat_format, place: str, system: str | None
) -> None:
    def made(length: int) -> TrainingRow:
        config = config_of(place=place, training={"sequence_length": length})
        return training_rows(sampled(system=system), config, chat_format)[0]

    whole = made(4096)
    lengths = {}
    for length in range(8, len(tokens_of(whole, chat_format)) + 1):
        row = made(length)
        if row.status != "complete":
            assert (row.status, row.messages) == ("over_sequence_length", ())
            assert not lengths
            continue
        turns = sum(role == "user" for role, _ in texts(row))
        lengths.setdefault(turns, length)
        kept = list(whole.messages[-2 * turns :])
        if place == "first_user" and turns < 3:
            kept[0] = Message("user", f"Be brief. {kept[0].content}")
        head = whole.messages[:1] if whole.messages[0].role == "system" else ()
        assert row.messages == (*head, *kept)
        assert row.is_shortened == (turns < 3)
        assert len(tokens_of(row, chat_format)) <= length
    # Each number of turns stays from the first length on in which it fits.
    assert lengths == {turns: len(tokens_of(made(length), chat_format)) for turns, length in lengths.items()}
    assert sorted(lengths) == [1, 2, 3]


def tokens_of(row: TrainingRow, chat_format) -> list[int]:
    return tokenize_dialogue(row.messages, chat_format, "last_answer").input_ids


def test_the_original_history_has_one_sampled_answer(chat_format) -> None:
    """Only the last answer was sampled, so only it can be unfit."""
    row = sampled() | {"answers": [{"status": "complete", "followed": {"x": True}}]}
    for mode in ("last", "every_answer"):
        (made,) = training_rows(row, config_of(history="original", rows_per_dialogue=mode), chat_format)
        assert len(made.messages) == 6
