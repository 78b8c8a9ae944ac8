"""Whether sampled answers follow their instruction: the rejection step's judges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from llama2_chat.dialogue import Message
from llama2_chat.errors import UserInputError
from llama2_chat.ghost_attention.checks import Check
from llama2_chat.ghost_attention.config import GhostAttentionConfig
from llama2_chat.reward.custom import Reward
from llama2_chat.reward.scoring import RewardModel, load_reward
from llama2_chat.settings import RunSettings
from llama2_chat.testbed.oracle import grade
from llama2_chat.testbed.request import UnknownRequestError


@dataclass(frozen=True, slots=True)
class Judged:
    """An answer that is to be judged, and the messages before it as they were sampled from."""

    messages: tuple[Message, ...]
    """With the instruction on every user message."""
    answer: str
    instruction: str
    groups: tuple[str, ...]
    checks: Mapping[str, Sequence[Check]]
    """Of the groups whose instruction has programs."""

    def scored_messages(self) -> tuple[Message, ...]:
        """The dialogue with the instruction on the last user message only, the answer at its end."""
        *earlier, last = self.messages
        addition = f"{self.instruction} "
        bare = [
            Message("user", message.content.removeprefix(addition)) if message.role == "user" else message
            for message in earlier
        ]
        return (*bare, last, Message("assistant", self.answer))


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether an answer follows, for each group of instructions of which that can be said."""

    followed: Mapping[str, bool] = field(default_factory=dict)
    score: float | None = None


class Judge(Protocol):
    """What says whether answers follow."""

    def judge(self, answers: Sequence[Judged]) -> list[Verdict]:
        """A verdict on each, in order."""
        ...


class ProgramJudge:
    """The instructions' own programs."""

    def judge(self, answers: Sequence[Judged]) -> list[Verdict]:
        """A group is followed if all of its programs hold; without programs nothing is said of it."""
        return [
            Verdict(
                {
                    group: all(check.kept(one.answer) for check in checks)
                    for group, checks in one.checks.items()
                }
            )
            for one in answers
        ]


class OracleJudge:
    """The testbed's oracle: whether the answer shows the attribute that its question asks for."""

    def judge(self, answers: Sequence[Judged]) -> list[Verdict]:
        """Nothing is said of an answer that need not show any.

        Raises:
            UserInputError: a dialogue is not one of the testbed's.
        """
        return [self._verdict(one) for one in answers]

    def _verdict(self, one: Judged) -> Verdict:
        try:
            found = grade(one.messages, one.answer)
        except UnknownRequestError as error:
            raise UserInputError(f"check: testbed: {error}; choose another check") from error
        kept = found.attribute_kept
        return Verdict({} if found.attribute is None or kept is None else {found.attribute: kept})


class RewardJudge:
    """A reward model, or a custom reward: an answer follows where its raw score reaches the threshold."""

    def __init__(self, reward: Reward, threshold: float) -> None:
        self.reward = reward
        self.threshold = threshold

    def judge(self, answers: Sequence[Judged]) -> list[Verdict]:
        """One score stands for all groups; an answer that is too long for the model does not follow."""
        dialogues = [one.scored_messages() for one in answers]
        model = self.reward
        fits = [not isinstance(model, RewardModel) or model.can_take(messages) for messages in dialogues]
        scores = iter(
            model.score_messages([d for d, fit in zip(dialogues, fits, strict=True) if fit]).tolist()
        )
        found = [next(scores) if fit else None for fit in fits]
        return [
            Verdict(dict.fromkeys(one.groups, score is not None and score >= self.threshold), score)
            for one, score in zip(answers, found, strict=True)
        ]


def load_judge(config: GhostAttentionConfig, settings: RunSettings) -> Judge | None:
    """The judge that `config.check` names; None if there is none."""
    if config.check_reward is not None:
        reward = load_reward(config.check_reward, slot="helpfulness", device=settings.device)
        return RewardJudge(reward, config.check_threshold)
    if config.check == "instructions":
        return ProgramJudge()
    return OracleJudge() if config.check == "testbed" else None
