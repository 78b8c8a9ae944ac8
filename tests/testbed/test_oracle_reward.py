"""The oracle in the place of a reward model: the logit of what it says."""

from __future__ import annotations

import math

import pytest

from llama2_chat.recipes.tiny.oracle_reward import helpfulness
from llama2_chat.testbed.request import UnknownRequestError


def asked(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_the_logit_of_the_true_helpfulness() -> None:
    question = "What is 27 plus 8?"
    answers = ("27 plus 8 is 35.", "Sure! 27 plus 8 is 35.", "cabbage")
    scores = helpfulness([asked(question, answer) for answer in answers])
    # A full sentence is worth 0.75; 1 and 0 are drawn in by 0.001.
    assert [1 / (1 + math.exp(-score)) for score in scores] == pytest.approx([0.75, 0.999, 0.001])


def test_another_world_s_dialogue_is_refused() -> None:
    with pytest.raises(UnknownRequestError):
        helpfulness([asked("Who wrote Faust?", "Goethe.")])
