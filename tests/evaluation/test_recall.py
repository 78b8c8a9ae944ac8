"""Recall over turns, with a stand-in for the policy whose memory is known."""

from __future__ import annotations

from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from llama2_chat.dialogue import Dialogue, Message
from llama2_chat.errors import UserInputError
from llama2_chat.evaluation import recall
from llama2_chat.settings import SamplingConfig
from llama2_chat.testbed.dialogues import reference_answer
from llama2_chat.testbed.generators import GENERATORS
from llama2_chat.testbed.request import UnknownRequestError, read_request

TURNS = (2, 4, 6, 10)


def dialogues(turns: int = 10, rows: int = 40) -> list[Dialogue]:
    return [Dialogue.from_row(row) for row in GENERATORS["attribute_dialogues"](rows, seed=0, turns=turns)]


class Forgetful:
    """Answers everything well, but what was stated more than `span` turns ago it has never heard."""

    def __init__(self, span: int) -> None:
        self.span = span

    def __call__(self, engine: Any, chat_format: Any, conversations: Any, **options: Any) -> list[Any]:
        assert options["sampling"].temperature == 0.0
        sampled = []
        for conversation in conversations:
            messages, answers, asides = list(conversation.history), [], {}
            for place, question in enumerate((*conversation.questions, None)):
                if place in conversation.asides:
                    asked = [*messages, Message("user", conversation.asides[place])]
                    asides[place] = SimpleNamespace(text=self.answer(asked))
                if question is not None:
                    messages.append(Message("user", question))
                    answers.append(SimpleNamespace(text=self.answer(messages)))
                    messages.append(Message("assistant", answers[-1].text))
            sampled.append(SimpleNamespace(answers=tuple(answers), asides=asides))
        return sampled

    def answer(self, messages: list[Message]) -> str:
        turn = sum(message.role == "user" for message in messages)
        remembered = messages if turn <= self.span else messages[-1:]
        try:
            return reference_answer(read_request(remembered), Random(0))
        except UnknownRequestError:
            return "I do not know."


def measured(memory: Forgetful, monkeypatch: pytest.MonkeyPatch, **options: Any) -> recall.Recalls:
    monkeypatch.setattr(recall, "sample_conversations", memory)
    arguments = {"turns": TURNS, "sampling": SamplingConfig(), "seed": 0, **options}
    return recall.measure_recall(None, None, dialogues(), **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("span", [1, 4, 20])
def test_recall_ends_where_memory_ends(span: int, monkeypatch: pytest.MonkeyPatch) -> None:
    recalls = measured(Forgetful(span), monkeypatch)
    assert len(recalls.asked) == 40 * len(TURNS)
    metrics, intervals = recall.recall_metrics(recalls)
    assert metrics["attribute_recall"] == {str(turn): float(turn <= span) for turn in TURNS}
    assert set(metrics["attribute_recall_by_attribute"]) == {"name", "persona", "hobby", "language"}
    assert intervals["attribute_recall.4"]["count"] == 40
    languages = sum("language" in read_request(d.messages[:-1]).attributes for d in dialogues())
    assert languages > 3
    assert metrics["attribute_shown"] == {str(turn): float(turn <= span) for turn in range(1, 10)}
    assert {intervals[f"attribute_shown.{turn}"]["count"] for turn in range(1, 10)} == {languages}


def test_a_measured_turn_leaves_no_trace_in_later_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """At turn n the prompt is the dialogue's first n - 1 questions, answered, and its last one."""
    memory = Forgetful(20)
    recalls = measured(memory, monkeypatch)
    by_turn = {turn: [r for r in recalls.asked if r.turn == turn] for turn in TURNS}
    for turn, found in by_turn.items():
        for dialogue, one in zip(dialogues(), found, strict=True):
            asked = [m.content for m in dialogue.messages if m.role == "user"]
            assert [m.content for m in one.messages if m.role == "user"] == [*asked[: turn - 1], asked[-1]]
            assert len(one.messages) == 2 * turn - 1
    for earlier, later in zip(by_turn[4], by_turn[10], strict=True):
        assert later.messages[:6] == earlier.messages[:6]


def test_what_is_graded_is_what_the_policy_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every answer on the way and every aside, each after the messages that it was an answer to."""
    memory, graded = Forgetful(4), []
    asked: list[tuple[str, ...]] = []
    answer, grade = memory.answer, recall.grade

    def recording_answer(messages: list[Message]) -> str:
        asked.append(tuple(message.content for message in messages))
        return answer(messages)

    def recording_grade(messages: Any, text: str) -> Any:
        graded.append(tuple(message.content for message in messages))
        return grade(messages, text)

    monkeypatch.setattr(memory, "answer", recording_answer)
    monkeypatch.setattr(recall, "grade", recording_grade)
    measured(memory, monkeypatch)
    assert sorted(asked) == sorted(graded)
    assert len(graded) == 40 * (len(TURNS) + 9)


def test_dialogues_must_be_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserInputError, match=r"turn 20, but a dialogue has 10.*recall_turns"):
        measured(Forgetful(1), monkeypatch, turns=(2, 20))


def test_the_last_question_must_ask_for_something_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "sample_conversations", Forgetful(20))
    plain = [Dialogue.from_row(row) for row in GENERATORS["demonstrations"](40, seed=0, multi_turn=1.0)]
    plain = [d for d in plain if read_request(d.messages[:-1]).attribute is None and len(d.messages) == 6]
    with pytest.raises(UserInputError, match="asks for nothing that was stated"):
        recall.measure_recall(
            None,  # type: ignore[arg-type]
            None,  # type: ignore[arg-type]
            plain[:3],
            turns=(2,),
            sampling=SamplingConfig(),
            seed=0,
        )
