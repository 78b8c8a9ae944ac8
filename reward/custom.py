"""Rewards that are no reward model: a Python function, or a server that speaks `POST /v1/score`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from llama2_chat.callables import load_callable
from llama2_chat.dialogue import Message, messages_to_rows
from llama2_chat.errors import Llama2ChatError, UserInputError
from llama2_chat.settings import CallableSource, UrlSource

Slot = Literal["helpfulness", "safety"]
_LARGEST = torch.finfo(torch.float32).max
_SHOWN = 60
"""Characters of an answer in a message."""


class Reward(Protocol):
    """Anything that scores dialogues; a `RewardModel` is one."""

    def score_messages(self, dialogues: Sequence[Sequence[Message]]) -> Tensor:
        """Raw scores (logits), finite, float32 (B,), of dialogues that end with the assistant."""
        ...


class CallableReward:
    """A function: list of dialogues, each a list of `{"role", "content"}`, to a list of raw scores."""

    def __init__(
        self, function: Callable[[list[list[dict[str, str]]]], Iterable[float]], *, name: str
    ) -> None:
        self.function = function
        self.name = name

    def score_messages(self, dialogues: Sequence[Sequence[Message]]) -> Tensor:
        """Raw scores, float32 (B,): what one call of the function returns.

        Raises:
            UserInputError: the function fails, or returns anything but a finite number for each dialogue.
        """
        if not dialogues:
            return torch.zeros(0)
        try:
            returned = self.function([messages_to_rows(messages) for messages in dialogues])
            values = list(returned) if isinstance(returned, Iterable) else None
        except Llama2ChatError:
            raise
        except Exception as error:
            raise UserInputError(
                f"{self.name}: failed on {len(dialogues)} dialogues: {type(error).__name__}: {error}"
            ) from error
        if values is None:
            raise UserInputError(
                f"{self.name}: must return a list of {len(dialogues)} numbers, one for each dialogue; "
                f"it returned {type(returned).__name__}"
            )
        return checked_scores(values, dialogues, self.name)


def checked_scores(values: Sequence[Any], dialogues: Sequence[Sequence[Message]], name: str) -> Tensor:
    """`values` as raw scores, float32 (B,).

    Raises:
        UserInputError: not as many as dialogues, or one that is no finite float32; it names the dialogue.
    """
    if len(values) != len(dialogues):
        raise UserInputError(
            f"{name}: {len(values)} scores for {len(dialogues)} dialogues; one for each is wanted"
        )
    scores: list[float] = []
    for number, value in enumerate(values):
        try:
            if isinstance(value, str | bytes | bool):
                raise TypeError
            score = float(value)
        except (TypeError, ValueError, OverflowError):
            raise UserInputError(
                f"{name}: {_place(number, dialogues)}: a number is wanted, found {_shown(value)}"
            ) from None
        if not abs(score) <= _LARGEST:  # so that NaN is refused too
            raise UserInputError(
                f"{name}: {_place(number, dialogues)}: a finite raw score (logit) is wanted, found {_shown(value)}"
            )
        scores.append(score)
    return torch.tensor(scores, dtype=torch.float32)


def _shown(value: Any) -> str:
    try:
        return f"{value!r:.80}"
    except Exception:  # whatever a stranger's object, or an integer of too many digits, makes of it
        return type(value).__name__


def _place(number: int, dialogues: Sequence[Sequence[Message]]) -> str:
    answer = dialogues[number][-1].content
    shown = answer if len(answer) <= _SHOWN else answer[: _SHOWN - 1] + "…"
    return f"dialogue {number + 1} of {len(dialogues)} (answer {shown!r})"


def custom_reward(source: CallableSource | UrlSource, *, slot: Slot) -> Reward:
    """The reward that a configuration names in place of a reward model.

    Args:
        slot: Which of a server's scores is taken.

    Raises:
        UserInputError: the function cannot be imported, or the variable with the server's key is not set.
    """
    if isinstance(source, UrlSource):
        from llama2_chat.reward.remote import RemoteReward

        return RemoteReward(source, slot=slot)
    return CallableReward(load_callable(source), name=source.callable)
