"""How many turns a policy keeps what the first message stated (Table 30).

Each dialogue states attributes in its first message and asks for one of them in its last. The policy answers
the questions before; at each turn that is measured, the last question is asked in place of that turn's and
the conversation goes on as if it had not been. So every turn is measured in the same conversations, and no
recall helps a later one. All answers are greedy: what counts is what the policy remembers, not a draw.

One attribute shows without being asked for, the language of the answers: it is graded in every answer on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llama2_chat.chat_format import ChatFormat
from llama2_chat.dialogue import Dialogue, Message
from llama2_chat.errors import UserInputError
from llama2_chat.evaluation.statistics import Interval, mean, share_interval
from llama2_chat.generation.conversation import Conversation, SampledConversation, sample_conversations
from llama2_chat.generation.transformers_engine import TransformersEngine
from llama2_chat.settings import SamplingConfig
from llama2_chat.testbed.oracle import grade


@dataclass(frozen=True, slots=True)
class Recall:
    """One answer to the question for an attribute, asked at `turn` (1 is the first)."""

    turn: int
    attribute: str
    messages: tuple[Message, ...]
    answer: str
    kept: bool

    def to_row(self) -> dict[str, Any]:
        """As a JSON row."""
        return {
            "set": "recall",
            "turn": self.turn,
            "attribute": self.attribute,
            "prompt": [message.to_row() for message in self.messages],
            "response": self.answer,
            "kept": self.kept,
        }


@dataclass(frozen=True, slots=True)
class Recalls:
    """What was asked for, and by turn whether the answers on the way showed what shows unasked."""

    asked: list[Recall]
    shown: dict[int, list[bool]]


def measure_recall(
    engine: TransformersEngine,
    chat_format: ChatFormat,
    dialogues: Sequence[Dialogue],
    *,
    turns: Sequence[int],
    sampling: SamplingConfig,
    seed: int,
) -> Recalls:
    """Every dialogue's attribute, asked for at each of `turns` (from 2 on), and shown at every turn before the last.

    Raises:
        UserInputError: a dialogue has fewer turns than are measured.
    """
    sampling = sampling.model_copy(update={"temperature": 0.0})
    questions = [tuple(m.content for m in d.messages if m.role == "user") for d in dialogues]
    systems = [d.messages[:1] if d.messages[0].role == "system" else () for d in dialogues]
    longest = max(turns)
    if any(len(asked) < longest for asked in questions):
        raise UserInputError(
            f"evaluation.attribute_dialogues: recall is measured at turn {longest}, but a dialogue has "
            f"{min(map(len, questions))}; use longer dialogues (option turns) or change evaluation.recall_turns"
        )
    talks = [
        Conversation(asked[: longest - 1], system, {turn - 1: asked[-1] for turn in turns})
        for asked, system in zip(questions, systems, strict=True)
    ]
    sampled = sample_conversations(engine, chat_format, talks, sampling=sampling, seed=seed)
    pairs = list(zip(talks, sampled, strict=True))
    asked_for = [_recall(turn, talk, conversation) for turn in turns for talk, conversation in pairs]
    return Recalls(asked_for, _shown(pairs))


def _shown(pairs: Sequence[tuple[Conversation, SampledConversation]]) -> dict[int, list[bool]]:
    """By turn, for each conversation whose answer there has to show an attribute, whether it does."""
    shown: dict[int, list[bool]] = {}
    for talk, sampled in pairs:
        for turn, answer in enumerate(sampled.answers, start=1):
            graded = grade(
                [*_history(talk, sampled, turn), Message("user", talk.questions[turn - 1])], answer.text
            )
            if graded.attribute_kept is not None:
                shown.setdefault(turn, []).append(graded.attribute_kept)
    return dict(sorted(shown.items()))


def _history(talk: Conversation, sampled: SampledConversation, turn: int) -> list[Message]:
    """What has been said before turn `turn`."""
    messages = list(talk.history)
    for question, answer in zip(talk.questions[: turn - 1], sampled.answers, strict=False):
        messages += [Message("user", question), Message("assistant", answer.text)]
    return messages


def _recall(turn: int, talk: Conversation, sampled: SampledConversation) -> Recall:
    messages = _history(talk, sampled, turn)
    question, text = talk.asides[turn - 1], sampled.asides[turn - 1].text
    messages.append(Message("user", question))
    graded = grade(messages, text)
    if graded.attribute is None:
        raise UserInputError(
            "evaluation.attribute_dialogues: the last question of a dialogue, "
            f'"{question}", asks for nothing that was stated'
        )
    return Recall(turn, graded.attribute, tuple(messages), text, bool(graded.attribute_kept))


def recall_metrics(recalls: Recalls) -> tuple[dict[str, Any], dict[str, Interval]]:
    """`attribute_recall` by turn, the same for each attribute, `attribute_shown` by turn, and intervals by turn."""
    asked = recalls.asked
    turns = sorted({recall.turn for recall in asked})
    attributes = sorted({recall.attribute for recall in asked})
    recalled = {str(turn): share_interval([r.kept for r in asked if r.turn == turn]) for turn in turns}
    shown = {str(turn): share_interval(flags) for turn, flags in recalls.shown.items()}
    by_attribute = {
        attribute: {
            str(turn): mean([float(r.kept) for r in asked if (r.turn, r.attribute) == (turn, attribute)])
            for turn in turns
        }
        for attribute in attributes
    }
    metrics = {
        "attribute_recall": {turn: interval["mean"] for turn, interval in recalled.items()},
        "attribute_recall_by_attribute": by_attribute,
        "attribute_shown": {turn: interval["mean"] for turn, interval in shown.items()},
    }
    intervals = {f"attribute_recall.{turn}": interval for turn, interval in recalled.items()}
    return metrics, intervals | {f"attribute_shown.{turn}": interval for turn, interval in shown.items()}
