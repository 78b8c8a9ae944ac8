"""Refusals, violations and mean scores by source of the prompts, by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from llama2_chat.dialogue import Message, Prompt
from llama2_chat.evaluation.policy import Judged, PolicyAnswers, policy_metrics, source_figures
from llama2_chat.evaluation.policy_report import policy_markdown
from llama2_chat.evaluation.statistics import mean_interval, share_interval
from llama2_chat.reward.scoring import Score


def judged(source: str | None, text: str, safety: float | None, helpfulness: float | None = None) -> Judged:
    prompt = Prompt((Message("user", "?"),), source=source)
    score = None if helpfulness is None else Score(helpfulness, safety, 0.5, 0.5, "helpfulness", 0.5)
    answer = SimpleNamespace(text=text, status="complete")
    return Judged(prompt, answer, score, None, safety)  # type: ignore[arg-type]


REFUSED, ANSWERED = "I can't help you with that.", "Take a saw."
ANSWERS = [
    judged("a", REFUSED, 2.0),
    judged("b", ANSWERED, -1.0),
    judged("a", ANSWERED, -3.0),
    judged("b", ANSWERED, 0.0),
    judged(None, ANSWERED, 4.0),
]


def test_figures_of_each_source() -> None:
    """A raw score of 0 is a probability of one half, which is not below one half."""
    figures = source_figures([[j] for j in ANSWERS])
    assert list(figures) == ["a", "b", "not named"]
    assert figures["a"]["refusal_rate"] == share_interval([True, False])
    assert figures["a"]["violation_rate"] == share_interval([False, True])
    assert figures["b"]["violation_rate"] == share_interval([True, False])
    assert figures["a"]["reward_safety_mean"]["mean"] == -0.5
    assert figures["not named"]["refusal_rate"]["count"] == 1
    assert "reward_helpfulness_mean" not in figures["a"]
    scored = source_figures([[judged("a", ANSWERED, None, 1.5)], [judged("b", ANSWERED, None, -1.0)]])
    assert set(scored["a"]) == {"refusal_rate", "reward_helpfulness_mean"}
    assert scored["a"]["reward_helpfulness_mean"]["mean"] == 1.5
    assert source_figures([ANSWERS[::2][:2]]) == {}
    assert source_figures([]) == {}


def test_metrics_without_harmless_prompts() -> None:
    answers = PolicyAnswers([], [], [[j] for j in ANSWERS], [[j] for j in ANSWERS[:2]])
    metrics = policy_metrics(answers)
    assert metrics["violation_rate"] == pytest.approx(2 / 5, rel=1e-12)
    assert metrics["unsafe_refusal_rate"] == pytest.approx(1 / 5, rel=1e-12)
    assert metrics["false_refusal_rate"] == {"borderline": 0.5}
    assert set(metrics) == {
        *("reward_safety_mean", "violation_rate", "unsafe_refusal_rate", "false_refusal_rate"),
        *("by_source", "intervals"),
    }
    assert set(metrics["intervals"]) == {
        *("reward_safety_mean", "violation_rate", "unsafe_refusal_rate", "false_refusal_rate.borderline")
    }
    lines = policy_markdown(metrics).splitlines()
    assert lines[lines.index("## Unsafe prompts by source") + 4] == (
        "| a | 2 | 0.500 (0.095 to 0.905) | 0.500 (0.095 to 0.905) | -0.500 (-5.400 to 4.400) |"
    )


def test_several_answers_to_a_prompt_are_one_observation() -> None:
    """Two prompts of two answers: the first's both refuse and are unsafe, the second's do not."""
    pairs = [[judged("a", REFUSED, -2.0)] * 2, [judged("b", ANSWERED, 2.0), judged("b", ANSWERED, 3.0)]]
    metrics = policy_metrics(PolicyAnswers([], [], pairs, pairs))
    names = ("violation_rate", "unsafe_refusal_rate", "false_refusal_rate.borderline")
    for name in names:
        assert metrics["intervals"][name] == share_interval([True, False])
    assert metrics["intervals"]["reward_safety_mean"] == mean_interval([-2.0, 2.5])
    assert metrics["by_source"]["safety"]["a"]["refusal_rate"] == share_interval([True])
    assert metrics["by_source"]["safety"]["b"]["reward_safety_mean"]["mean"] == 2.5
