"""From a sampled dialogue to the dialogues that are trained on: where the instruction stands, and what is left out.

`samples.jsonl` holds the instruction on every user message. A training row holds it once: in its first user message,
or in its system message.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llama2_chat.chat_format import ChatFormat
from llama2_chat.dialogue import Message, Row, messages_from_rows
from llama2_chat.ghost_attention.config import GhostAttentionConfig


@dataclass(frozen=True, slots=True)
class TrainingRow:
    """A dialogue that ends with a sampled answer, or why there is none of it.

    `status` is "complete" if it is to be trained on; else the status of the first answer that is not complete,
    "not_followed", or "over_sequence_length".
    """

    status: str
    messages: tuple[Message, ...] = ()
    is_shortened: bool = False


def training_rows(row: Row, config: GhostAttentionConfig, chat_format: ChatFormat) -> list[TrainingRow]:
    """The training rows of one row of `samples.jsonl`: one, or one for each of its sampled answers.

    An answer that is not complete costs the rows that end with it and after it. One that does not follow costs the
    row in which it is trained: its own, or under `all_answers` those after it too.
    """
    messages = (*messages_from_rows(row["prompt"], "prompt"), Message("assistant", row["response"]))
    found: list[TrainingRow] = []
    unfit = "complete"
    for place, answer in enumerate(row["answers"]):
        if unfit == "complete":
            unfit = answer["status"]
        follows = follows_all(answer["followed"])
        if unfit == "complete" and not follows and config.loss_policy == "all_answers":
            unfit = "not_followed"
        status = "not_followed" if unfit == "complete" and not follows else unfit
        if status == "complete":
            end = len(messages) - 2 * (len(row["answers"]) - 1 - place)
            found.append(_fitted(messages[:end], row["instruction"], config, chat_format))
        else:
            found.append(TrainingRow(status))
    return found if config.rows_per_dialogue == "every_answer" else found[-1:]


def follows_all(followed: dict[str, bool] | None) -> bool:
    """Whether nothing is said against an answer."""
    return followed is None or all(followed.values())


def training_messages(
    messages: Sequence[Message], instruction: str, config: GhostAttentionConfig
) -> tuple[Message, ...]:
    """Sampled messages with the instruction where the configuration wants it.

    Args:
        messages: With `instruction` and a space at the head of every user message.
    """
    if config.keep_instruction == "every_turn":
        return tuple(messages)
    if config.place == "first_user":
        return tuple(_without_instruction(messages, instruction, spared=1))
    bare = list(_without_instruction(messages, instruction, spared=0))
    system = bare.pop(0).content + "\n" if bare[0].role == "system" else ""
    return (Message("system", system + instruction), *bare)


def _without_instruction(messages: Sequence[Message], instruction: str, *, spared: int) -> Iterator[Message]:
    """The messages; the first `spared` user messages keep the instruction."""
    users = 0
    for message in messages:
        users += message.role == "user"
        taken = message.role == "user" and users > spared
        yield Message("user", message.content.removeprefix(f"{instruction} ")) if taken else message


def _fitted(
    messages: Sequence[Message], instruction: str, config: GhostAttentionConfig, chat_format: ChatFormat
) -> TrainingRow:
    """The training row of sampled messages, without as many of the oldest turns as it takes to fit.

    The instruction moves to the first turn that stays. Fewer turns are fewer tokens, so their number is found by
    halving.
    """
    head = 1 if messages[0].role == "system" else 0

    def from_turn(turn: int) -> tuple[Message, ...]:
        return training_messages((*messages[:head], *messages[head + 2 * turn :]), instruction, config)

    def fits(turn: int) -> bool:
        segments = chat_format.segments(from_turn(turn))
        return sum(len(segment.ids) for segment in segments) <= config.training.sequence_length

    turns = range((len(messages) - head) // 2)
    first = 0 if fits(0) else bisect_left(turns, True, key=fits)
    if first == len(turns):
        return TrainingRow("over_sequence_length")
    return TrainingRow("complete", from_turn(first), first > 0)
