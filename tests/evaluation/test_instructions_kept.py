"""Compliance at each turn, with a stand-in for the policy of which it is known how long it obeys."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from llama2_chat.cli.main import app
from llama2_chat.dialogue import Message
from llama2_chat.errors import MissingFileError, UserInputError
from llama2_chat.evaluation import instructions
from llama2_chat.evaluation.instruction_report import compliance_figures, compliance_markdown
from llama2_chat.evaluation.instructions import Obeyed, Task, obey, read_tasks
from llama2_chat.ghost_attention.instructions import Instruction
from llama2_chat.jsonl import write_rows
from llama2_chat.reward.metrics import wilson_interval
from llama2_chat.settings import SamplingConfig
from llama2_chat.testbed.dialogues import reference_answer
from llama2_chat.testbed.generators import GENERATORS
from llama2_chat.testbed.request import UnknownRequestError, read_request

BASE = Path(__file__).resolve().parents[2] / "recipes" / "tiny" / "base"
CAPITALS = {"instruction": "Answer in capitals.", "check": "upper_case"}
SHORT = {"instruction": "Be short.", "check": ["max_words:3", "ends_with:over"], "group": "length"}


def row(*questions: str, **fields: Any) -> dict[str, Any]:
    """A dialogue that asks these questions."""
    messages = []
    for question in questions:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": "Yes."}]
    return {"messages": messages[:-1], **fields}


def tasks_of(folder: Path, dialogues: list, rules: list, **options: Any) -> list[Task]:
    write_rows(folder / "dialogues.jsonl", dialogues)
    write_rows(folder / "instructions.jsonl", rules)
    return read_tasks(
        folder / "dialogues.jsonl", folder / "instructions.jsonl", **{"checker": "programs", **options}
    )


class Obedient:
    """A policy that obeys "Answer in capitals." for `span` turns, and answers the testbed from so many turns alone."""

    def __init__(self, span: int, too_long: int | None = None) -> None:
        self.span, self.too_long = span, too_long

    def __call__(self, engine: Any, chat_format: Any, conversations: Any, **options: Any) -> list[Any]:
        assert options["sampling"].temperature == 0.0
        return [self.sampled(conversation) for conversation in conversations]

    def sampled(self, talk: Any) -> Any:
        messages, answers, asides = list(talk.history), [], {}
        for place, question in enumerate((*talk.questions, None)):
            if place in talk.asides:
                asides[place] = self.answer(
                    [*messages, Message("user", talk.asides[place])], talk.instruction
                )
            if question is not None:
                messages.append(Message("user", question))
                answers.append(self.answer(messages, talk.instruction))
                messages.append(Message("assistant", answers[-1].text))
        return SimpleNamespace(answers=tuple(answers), asides=asides, shortened_at=(3,))

    def answer(self, messages: list[Message], instruction: str | None) -> Any:
        turn = sum(message.role == "user" for message in messages)
        first = next(place for place, message in enumerate(messages) if message.role == "user")
        if instruction is not None:
            head = Message("user", f"{instruction} {messages[first].content}")
            messages = [*messages[:first], head, *messages[first + 1 :]]
        if turn == self.too_long:
            return SimpleNamespace(text="", status="too_long")
        said = " ".join(message.content for message in messages)
        if "capitals" in said:
            return SimpleNamespace(text="WELL DONE" if turn <= self.span else "Well done", status="complete")
        try:
            request = read_request(messages if turn <= self.span else messages[-1:])
            return SimpleNamespace(text=reference_answer(request, Random(0)), status="complete")
        except UnknownRequestError:
            return SimpleNamespace(text="I do not know.", status="cut_off")


def obeyed(
    memory: Obedient, tasks: list[Task], monkeypatch: pytest.MonkeyPatch, **options: Any
) -> list[Obeyed]:
    monkeypatch.setattr(instructions, "sample_conversations", memory)
    arguments = {"checker": "programs", "place": "first_user", "sampling": SamplingConfig(), **options}
    return obey(None, None, tasks, **arguments)  # type: ignore[arg-type]


def test_each_instruction_is_tried_equally_often_and_by_its_group(tmp_path: Path) -> None:
    plain = [row(f"Question {number}?") for number in range(6)]
    grouped = [row("Long?", group="length")] * 3
    tasks = tasks_of(
        tmp_path, [*plain, *grouped], [CAPITALS, SHORT, {"instruction": "Be nice."}], per_dialogue=2
    )
    assert len(tasks) == 18
    counts = Counter((task.questions[0] == "Long?", task.instruction.text) for task in tasks)
    assert counts == {(False, "Answer in capitals."): 6, (False, "Be short."): 6, (True, "Be short."): 6}


def test_conversations_are_sampled_in_batches_with_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Five conversations, two at a time: the same in the same order as at once, and how far it is is told."""
    tasks = tasks_of(tmp_path, [row(f"Question {number}?") for number in range(5)], [CAPITALS])
    at_once = obeyed(Obedient(span=1), tasks, monkeypatch)
    capsys.readouterr()
    monkeypatch.setattr(instructions, "_AT_ONCE", 2)
    assert obeyed(Obedient(span=1), tasks, monkeypatch) == at_once
    assert [one.task.questions[0] for one in at_once] == [f"Question {number}?" for number in range(5)]
    assert "conversations: 5 of 5 conversations (100%)" in capsys.readouterr().err


def test_dialogues_are_cut_or_go_on_with_the_next_ones(tmp_path: Path) -> None:
    dialogues = [row("a", "b", "c", "d"), row("e"), row("x", group="length"), row("f", "g")]
    tasks = tasks_of(tmp_path, dialogues, [CAPITALS, SHORT], turns=3)
    assert ["".join(task.questions) for task in tasks] == ["abc", "efg", "xxx", "fga"]


def test_an_instruction_without_a_check_cannot_be_measured(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match=r"instructions.jsonl: no instruction has a check.*add `check`"):
        tasks_of(tmp_path, [row("a")], [{"instruction": "Be nice."}])


@pytest.mark.parametrize("place", ["first_user", "system"])
def test_compliance_by_turn_is_how_long_the_policy_obeys(place, tmp_path, monkeypatch) -> None:
    dialogues = [row("a", "b", "c", "d"), row("e", "f")]
    dialogues[1]["messages"].insert(0, {"role": "system", "content": "Be kind."})
    tasks = tasks_of(tmp_path, dialogues, [CAPITALS])
    found = obeyed(Obedient(2), tasks, monkeypatch, place=place)
    assert [one.kept for one in found] == [
        {turn: {"upper_case": turn <= 2} for turn in (1, 2, 3, 4)},
        {turn: {"upper_case": True} for turn in (1, 2)},
    ]
    first, second = ([message.content for message in one.messages[:2]] for one in found)
    if place == "system":
        assert (first[:2], second[0]) == (["Answer in capitals.", "a"], "Be kind.\nAnswer in capitals.")
    else:
        assert (first[0], second) == ("Answer in capitals. a", ["Be kind.", "Answer in capitals. e"])
    said = [message.content for one in found for message in one.messages]
    assert sum("capitals" in text for text in said) == 2  # in the first turn alone


def test_a_question_too_long_for_the_context_is_counted_not_judged(tmp_path, monkeypatch) -> None:
    tasks = tasks_of(tmp_path, [row("a", "b", "c")], [CAPITALS])
    (one,) = obeyed(Obedient(9, too_long=2), tasks, monkeypatch)
    assert one.too_long == (2,)
    assert list(one.kept) == [1, 3]
    figures = compliance_figures({"only": [one]})
    assert figures["counts"]["only"] == {
        "shortened_turns": 1, "shortened_at": {"3": 1}, "too_long_turns": 1, "incomplete_answers": 1,
    }  # fmt: skip


@pytest.mark.parametrize("span", [1, 3, 9])
def test_the_oracle_says_at_which_turn_an_attribute_is_lost(span, tmp_path, monkeypatch) -> None:
    """The language in every answer; what must be asked for is asked for at every turn, the last one included."""
    dialogues = GENERATORS["instruction_dialogues"](rows=40, seed=1, min_turns=5, max_turns=5, recalls=1.0)
    tasks = tasks_of(
        tmp_path, list(dialogues), list(GENERATORS["instructions"](60, seed=0)), checker="testbed"
    )
    found = obeyed(Obedient(span), tasks, monkeypatch, checker="testbed")
    assert {task.instruction.group for task in tasks} == {"name", "persona", "hobby", "language"}
    for one in found:
        assert one.kept == {turn: {one.task.instruction.group: turn <= span} for turn in range(1, 6)}
        asks = one.task.instruction.group != "language"
        assert len(one.task.questions) == 5 - asks
        said = [message.content for message in one.messages if message.role == "user"]
        assert said[1:] == [*one.task.questions[1:], *([one.task.asked] if asks else [])]
        assert said[0] == f"{one.task.instruction.text} {one.task.questions[0]}"


def test_what_the_instruction_does_not_ask_for_is_not_due(tmp_path, monkeypatch) -> None:
    """The dialogue's own words ask for French; the instruction, for a figure that nobody asks for."""
    rules = [{"instruction": "Act as Captain Rex.", "group": "persona"}]
    dialogues = [row("Speak in French. What is 3 plus 4?", "What is 5 plus 6?")]
    (one,) = obeyed(
        Obedient(9), tasks_of(tmp_path, dialogues, rules, checker="testbed"), monkeypatch, checker="testbed"
    )
    assert one.kept == {1: {}, 2: {}}


def known(*kept: dict[int, dict[str, bool]]) -> list[Obeyed]:
    task = Task(Instruction("Be short."), ("a", "b"), None)
    return [Obeyed(task, (Message("user", "a"),), one, 0, (), ()) for one in kept]


def test_figures_by_hand() -> None:
    """Overall all that is due must be kept; turn 2 is not due in the last conversation."""
    yes, no = {"x": True, "y": True}, {"x": True, "y": False}
    before = known({1: yes, 2: no}, {1: no, 2: no}, {1: {"x": True}})
    after = known({1: yes, 2: yes}, {1: yes, 2: no}, {1: {"x": False}})
    figures = compliance_figures({"before": before, "after": after})
    assert figures["constraints"] == {"x": 3, "y": 2}
    overall = figures["compliance"]["before"]["overall"]
    assert {turn: (found["mean"], found["count"]) for turn, found in overall.items()} == {
        "1": (pytest.approx(2 / 3), 3),
        "2": (0.0, 2),
    }
    assert (overall["1"]["low"], overall["1"]["high"]) == wilson_interval(2, 3)
    by_name = figures["compliance"]["before"]
    assert [by_name[name]["1"]["mean"] for name in "xy"] == [1.0, 0.5]
    # Conversations by the share of their turns that were kept: 1/2, 0/2, 1/1 and 2/2, 1/2, 0/1.
    assert [figures["all_turns"][name]["mean"] for name in ("before", "after")] == pytest.approx([0.5, 0.5])
    differences = figures["difference"]["after"]
    assert [differences[turn]["difference"] for turn in ("1", "2")] == pytest.approx([0.0, 0.5])
    markdown = compliance_markdown(figures)
    assert "| 1 | 3 | 67 (21–94) | 67 (21–94) | +0 (" in markdown
    assert "| 2 | 2 | 0 (0–66) | 50 (9–91) | +50 (" in markdown
    assert "## `y`, 2 conversations" in markdown


def test_the_command_writes_tables_figure_and_conversations(tmp_path: Path) -> None:
    tasks_of(tmp_path, [row("What is 3 plus 4?", "Who are you?")] * 2, [CAPITALS, SHORT])
    output = tmp_path / "measured"
    arguments = [
        "evaluate",
        "instructions",
        str(BASE),
        *(str(tmp_path / f"{n}.jsonl") for n in ("dialogues", "instructions")),
    ]
    options = ["--output-dir", str(output), "--max-new-tokens", "8", "--device", "cpu", "--turns", "3"]
    result = CliRunner().invoke(app, [*arguments, *options])
    assert result.exit_code == 0, result.output
    written = sorted(str(file.relative_to(output)) for file in output.rglob("*") if file.is_file())
    assert written == ["conversations-1.jsonl", "evaluation.json", "evaluation.md", "figures/compliance.png"]
    found = json.loads((output / "evaluation.json").read_text())
    assert set(found["constraints"]) == {"upper_case", "max_words:3", "ends_with:over"}
    rows = [json.loads(line) for line in (output / "conversations-1.jsonl").read_text().splitlines()]
    assert [len(one["messages"]) for one in rows] == [6, 6]
    assert rows[0]["messages"][0]["content"] == f"{rows[0]['instruction']} What is 3 plus 4?"
    missing = CliRunner().invoke(app, [*arguments[:4], str(tmp_path / "no.jsonl"), *options])
    assert isinstance(missing.exception, MissingFileError)
