"""How long policies keep an instruction that only the first turn gives: every answer of a conversation is checked.

The user's side of each dialogue is put to the policy turn by turn, with the instruction before the first question (or
as system message) alone; all answers are greedy. Each is checked by the instruction's programs, or on the testbed
graded by the oracle. Of the testbed's attributes only the language shows in every answer: the others are asked for,
by the dialogue's last question, at every turn in place of that turn's, and the conversation goes on as if it had not
been (as in `recall.py`). Where a conversation no longer fits into the context its oldest turns go, never the
instruction.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

from llama2_chat.chat_format import ChatFormat
from llama2_chat.dialogue import Message, Row
from llama2_chat.errors import UserInputError
from llama2_chat.generation.conversation import Conversation, SampledConversation, sample_conversations
from llama2_chat.generation.transformers_engine import TransformersEngine
from llama2_chat.ghost_attention.instructions import (
    GroupedDialogue,
    Instruction,
    read_grouped_dialogues,
    read_instructions,
)
from llama2_chat.progress import track
from llama2_chat.settings import SamplingConfig
from llama2_chat.testbed.oracle import grade

Checker = Literal["programs", "testbed"]
Place = Literal["first_user", "system"]
_TESTBED_ASKED = ("name", "persona", "hobby")
"""Attributes that no answer shows unless it is asked for them."""
_AT_ONCE = 64
"""Conversations sampled together; progress is told after each such batch, and no answer depends on it."""


@dataclass(frozen=True, slots=True)
class Task:
    """One dialogue's questions under one instruction.

    `asked` is put at every turn in place of that turn's question, and once more after the last.
    """

    instruction: Instruction
    questions: tuple[str, ...]
    system: str | None
    asked: str | None = None

    @property
    def turns(self) -> int:
        """How many turns are checked."""
        return len(self.questions) + (self.asked is not None)

    def conversation(self, place: Place) -> Conversation:
        """What is sampled."""
        asides = {} if self.asked is None else dict.fromkeys(range(self.turns), self.asked)
        text = self.instruction.text
        if place == "first_user":
            system = () if self.system is None else (Message("system", self.system),)
            return Conversation(self.questions, system, asides, text)
        whole = text if self.system is None else f"{self.system}\n{text}"
        return Conversation(self.questions, (Message("system", whole),), asides)


@dataclass(frozen=True, slots=True)
class Obeyed:
    """One conversation of a policy: at which turn (from 1) which constraint was kept.

    `kept[turn]` is empty where nothing was due. `too_long` are turns whose question alone left no room in the context.
    """

    task: Task
    messages: tuple[Message, ...]
    kept: Mapping[int, Mapping[str, bool]]
    incomplete: int
    shortened_at: tuple[int, ...]
    too_long: tuple[int, ...]

    def to_row(self) -> Row:
        """As a dialogue of a JSONL file, with its instruction and what was kept."""
        return {
            "messages": [message.to_row() for message in self.messages],
            "instruction": self.task.instruction.text,
            "group": self.task.instruction.group,
            "kept": {str(turn): dict(found) for turn, found in self.kept.items()},
            "shortened_at": list(self.shortened_at),
            "too_long": list(self.too_long),
        }


def read_tasks(
    dialogues: Path,
    instructions: Path,
    *,
    checker: Checker,
    per_dialogue: int = 1,
    turns: int | None = None,
) -> list[Task]:
    """Every dialogue with `per_dialogue` instructions, each of which is taken equally often.

    A dialogue with a `group` gets instructions of that group.

    Args:
        turns: Longer dialogues end after so many questions; shorter ones go on with those of the dialogues that
            follow them (of the same group, from the start again after the last).

    Raises:
        UserInputError: no instruction can be checked, or a file is malformed.
    """
    by_group = read_instructions([str(instructions)])
    if checker == "programs":
        by_group = {group: [one for one in found if one.checks] for group, found in by_group.items()}
    by_group = {group: found for group, found in by_group.items() if found}
    if not by_group:
        raise UserInputError(
            f"{instructions}: no instruction has a check, so nobody can say whether it is kept; add `check` to a row, "
            'as in {"instruction": "Answer in capitals.", "check": "upper_case"}'
        )
    grouped = read_grouped_dialogues([str(dialogues)], list(by_group))
    everything = [one for found in by_group.values() for one in found]
    pools: dict[str | None, Iterator[Instruction]] = {
        group: cycle(found) for group, found in by_group.items()
    }
    pools[None] = cycle(everything)
    tasks = []
    for number, dialogue in enumerate(grouped):
        questions, asked = _questions(dialogue, checker)
        if turns is not None:
            questions = _exactly(turns - (asked is not None), questions, grouped, number, checker)
        first = dialogue.dialogue.messages[0]
        system = first.content if first.role == "system" else None
        if questions:
            for _ in range(per_dialogue):
                tasks.append(Task(next(pools[dialogue.group]), tuple(questions), system, asked))
    if not tasks:
        raise UserInputError(f"{dialogues}: no dialogue with a question before the one that asks")
    return tasks


def _questions(dialogue: GroupedDialogue, checker: Checker) -> tuple[list[str], str | None]:
    """The user's messages, and of the testbed's that asks for an attribute its last one apart."""
    texts = [message.content for message in dialogue.dialogue.messages if message.role == "user"]
    if checker == "testbed" and dialogue.group in _TESTBED_ASKED:
        return texts[:-1], texts[-1]
    return texts, None


def _exactly(
    turns: int, questions: list[str], grouped: Sequence[GroupedDialogue], number: int, checker: Checker
) -> list[str]:
    found, group = list(questions), grouped[number].group
    for other in (*grouped[number + 1 :], *grouped[: number + 1]):
        if len(found) >= turns:
            break
        if other.group == group:
            found += _questions(other, checker)[0]
    while found and len(found) < turns:  # a file with too few questions begins again
        found += found
    return found[:turns]


def obey(
    engine: TransformersEngine,
    chat_format: ChatFormat,
    tasks: Sequence[Task],
    *,
    checker: Checker,
    place: Place,
    sampling: SamplingConfig,
) -> list[Obeyed]:
    """Sample every task's conversation greedily and check its answers."""
    sampling = sampling.model_copy(update={"temperature": 0.0})
    conversations = [task.conversation(place) for task in tasks]
    sampled: list[SampledConversation] = []
    with track("conversations", total=len(tasks), unit="conversations") as progress:
        for start in range(0, len(tasks), _AT_ONCE):
            batch = conversations[start : start + _AT_ONCE]
            sampled += sample_conversations(engine, chat_format, batch, sampling=sampling, seed=0)
            progress.advance(len(batch))
    return [
        _checked(task, conversation, result, checker)
        for task, conversation, result in zip(tasks, conversations, sampled, strict=True)
    ]


def _checked(
    task: Task, conversation: Conversation, sampled: SampledConversation, checker: Checker
) -> Obeyed:
    head = "" if conversation.instruction is None else f"{conversation.instruction} "
    messages = list(conversation.history)
    kept: dict[int, Mapping[str, bool]] = {}
    too_long = []
    for number in range(task.turns):
        question, answer = task.asked, sampled.asides.get(number)
        if question is None or answer is None:
            question, answer = task.questions[number], sampled.answers[number]
        if answer.status == "too_long":
            too_long.append(number + 1)
        else:
            asked = [*messages, Message("user", head + question)]
            kept[number + 1] = _verdict(task.instruction, asked, answer.text, checker)
        if number < len(task.questions):  # else what is asked for ends the conversation
            question, answer = task.questions[number], sampled.answers[number]
        messages += [Message("user", head + question), Message("assistant", answer.text)]
        head = ""
    replies = [*sampled.answers, *sampled.asides.values()]
    incomplete = sum(reply.status != "complete" for reply in replies)
    return Obeyed(task, tuple(messages), kept, incomplete, sampled.shortened_at, tuple(too_long))


def _verdict(
    instruction: Instruction, messages: Sequence[Message], answer: str, checker: Checker
) -> dict[str, bool]:
    """Whether each constraint that is due was kept."""
    if checker == "programs":
        return {check.spec: check.kept(answer) for check in instruction.checks}
    graded = grade(messages, answer)
    due = graded.attribute is not None and graded.attribute == instruction.group
    return {str(graded.attribute): bool(graded.attribute_kept)} if due else {}


def all_kept(found: Mapping[str, bool]) -> bool | None:
    """Whether everything that was due was kept; None if nothing was."""
    return all(found.values()) if found else None


def flags_by_turn(obeyed: Sequence[Obeyed], constraint: str | None = None) -> dict[int, dict[int, bool]]:
    """For each turn, whether conversation number n kept the constraint (None: all that was due)."""
    by_turn: dict[int, dict[int, bool]] = {}
    for number, one in enumerate(obeyed):
        for turn, found in one.kept.items():
            flag = all_kept(found) if constraint is None else found.get(constraint)
            if flag is not None:
                by_turn.setdefault(turn, {})[number] = flag
    return dict(sorted(by_turn.items()))


def constraints_of(obeyed: Sequence[Obeyed]) -> list[str]:
    """Names of all constraints that were due anywhere, in order."""
    found: dict[str, Any] = {}
    for one in obeyed:
        for verdicts in one.kept.values():
            found |= dict.fromkeys(verdicts)
    return sorted(found)
