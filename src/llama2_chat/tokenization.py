"""Messages → token ids and a loss mask, with the length policy; a mask is True where a token is trained."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from llama2_chat.chat_format import ChatFormat
from llama2_chat.dialogue import Dialogue, Message

LossPolicy = Literal["all_answers", "last_answer", "all_tokens"]
"""Which tokens are trained: every answer (SFT), the last one (made data), everything (pretraining)."""


@dataclass(frozen=True, slots=True)
class TokenizedDialogue:
    """Token ids and, for each, whether it is trained."""

    input_ids: list[int]
    loss_mask: list[bool]


@dataclass
class LengthReport:
    """What the length policy did; each dialogue is counted under one of the three."""

    kept: int = 0
    shortened: int = 0
    dropped: int = 0

    @property
    def total(self) -> int:
        """All dialogues counted."""
        return self.kept + self.shortened + self.dropped

    def __add__(self, other: LengthReport) -> LengthReport:
        return LengthReport(
            self.kept + other.kept, self.shortened + other.shortened, self.dropped + other.dropped
        )

    def to_row(self) -> dict[str, int]:
        """As metrics."""
        return asdict(self)


def tokenize_dialogue(
    messages: Sequence[Message], chat_format: ChatFormat, loss_policy: LossPolicy
) -> TokenizedDialogue:
    """Token ids with the mask of `loss_policy`.

    A dialogue that ends with the user is a prompt to be answered: nothing in it is trained.
    """
    segments = chat_format.segments(messages)
    places = range(len(segments))
    answers = [place for place in places if segments[place].trained]
    trained: Sequence[int] = {
        "all_answers": answers,
        "last_answer": answers[-1:],
        "all_tokens": places,
    }[loss_policy]
    if messages[-1].role == "user":
        trained = []
    return TokenizedDialogue(
        [token for segment in segments for token in segment.ids],
        [place in trained for place in places for _ in segments[place].ids],
    )


def fit_to_length(
    messages: Sequence[Message], chat_format: ChatFormat, max_tokens: int
) -> tuple[Message, ...] | None:
    """The messages, without as many of the oldest whole turns as it takes to fit into `max_tokens`.

    The system message, the last question and its answer stay; None where even they are too long. Fewer turns are
    fewer tokens, so the turns to leave out are found by halving: a long dialogue costs a few encodings, not one a turn.
    """
    messages = tuple(messages)
    system = messages[:1] if messages[0].role == "system" else ()
    turns = messages[len(system) :]

    def fits(start: int) -> bool:
        segments = chat_format.segments(system + turns[start:])
        return sum(len(segment.ids) for segment in segments) <= max_tokens

    if fits(0):
        return messages
    starts = range(2, len(turns) - 1 + len(turns) % 2, 2)
    place = bisect_left(starts, True, key=fits)
    return None if place == len(starts) else system + turns[starts[place] :]


def tokenize_dialogues(
    dialogues: Iterable[Dialogue], chat_format: ChatFormat, loss_policy: LossPolicy, max_tokens: int
) -> tuple[list[TokenizedDialogue], LengthReport]:
    """Tokenise dialogues and count what the length policy shortened or dropped."""
    result, report = [], LengthReport()
    for dialogue in dialogues:
        tokenized = tokenize_dialogue(dialogue.messages, chat_format, loss_policy)
        if len(tokenized.input_ids) <= max_tokens:
            report.kept += 1
        else:
            fitted = fit_to_length(dialogue.messages, chat_format, max_tokens)
            if fitted is None:
                report.dropped += 1
                continue
            tokenized = tokenize_dialogue(fitted, chat_format, loss_policy)
            report.shortened += 1
        result.append(tokenized)
    return result, report
