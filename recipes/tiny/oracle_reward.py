"""The testbed's truth in the place of a reward model: for recipes that measure and train none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from llama2_chat.testbed.oracle import grade

_LEAST = 0.001
"""The logits of 0 and 1 are infinite."""


def helpfulness(dialogues: Sequence[Sequence[Mapping[str, str]]]) -> list[float]:
    """The logit of each answer's true helpfulness.

    Raises:
        UnknownRequestError: a dialogue is not of the testbed.
    """
    return [_logit(grade(messages[:-1], messages[-1]["content"]).helpfulness) for messages in dialogues]


def _logit(value: float) -> float:
    inside = min(max(value, _LEAST), 1 - _LEAST)
    return math.log(inside / (1 - inside))
