"""Guards and early stopping on histories made by hand: each sees what it is for and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from llama2_chat.ppo.guards import (
    Finding,
    all_findings,
    best_evaluation,
    findings,
    new_findings,
    stops_early,
)
from llama2_chat.ppo.watching_config import EarlyStopping, GuardsConfig

HEALTHY = {
    "kl_nats": 1.0,
    "response_tokens_mean": 100.0,
    "complete_share": 1.0,
    "entropy_nats": 2.0,
    "score_mean": 0.0,
    "sampler_logprob_difference": 1e-6,
}


def history(count: int, **columns: list[float | None]) -> list[dict[str, Any]]:
    """`count` healthy iterations, of which the last ones have these values."""
    rows = [{"step": step, **HEALTHY} for step in range(1, count + 1)]
    for name, values in columns.items():
        for row, value in zip(rows[-len(values) :], values, strict=True):
            row[name] = value
    return rows


def evaluations(every: int, scores: list[float], **columns: list[float]) -> list[dict[str, Any]]:
    return [
        {"step": every * place, "score_mean": score, "score_se": 0.01}
        | {name: values[place] for name, values in columns.items()}
        for place, score in enumerate(scores)
    ]


def found_in(rows, judged=(), **guards) -> dict[str, Finding]:
    found = findings(rows, judged, GuardsConfig.model_validate(guards), sampler_bound=0.01)
    return {finding.guard: finding for finding in found}


def test_a_healthy_run_has_no_findings() -> None:
    judged = evaluations(10, [0.0, 0.1, 0.2, 0.3], independent_mean=[1.0, 1.1, 1.2, 1.3])
    assert all_findings(history(30), judged, GuardsConfig(), sampler_bound=0.01) == []
    assert findings([], [], GuardsConfig(), sampler_bound=0.01) == []


@pytest.mark.parametrize(
    ("guard", "quiet", "loud", "said"),
    [
        # Means over the last three: 50 exactly, then just above.
        ("kl", {"kl_nats": [40, 50, 60]}, {"kl_nats": [40, 50, 61]}, "50.33 nats a response, above 50"),
        ("length", {"response_tokens_mean": [300] * 3}, {"response_tokens_mean": [300, 300, 301]}, "longer"),
        ("length", {"response_tokens_mean": [34] * 3}, {"response_tokens_mean": [33] * 3}, "3 times shorter"),
        ("complete", {"complete_share": [0.5] * 3}, {"complete_share": [0.5, 0.5, 0.4]}, "46.7 %"),
        ("entropy", {"entropy_nats": [0.4] * 3}, {"entropy_nats": [0.4, 0.4, 0.3]}, "from 2 to 0.3667 nats"),
        (
            "sampler_difference",
            {"sampler_logprob_difference": [0.01] * 3},
            {"sampler_logprob_difference": [0.01, 0.01, 0.02]},
            "differ by 0.01333 nats a token, above 0.01",
        ),
    ],
)
def test_each_bound(guard: str, quiet: dict, loud: dict, said: str) -> None:
    assert found_in(history(9, **quiet)) == {}
    found = found_in(history(9, **loud))
    assert list(found) == [guard]
    assert (found[guard].iteration, found[guard].action) == (9, "warn")
    assert said in found[guard].reason


def test_a_bound_and_an_action_of_one_s_own() -> None:
    rows = history(9, kl_nats=[12.0] * 3)
    assert found_in(rows) == {}
    assert found_in(rows, kl={"bound": 11.0, "action": "stop"})["kl"].action == "stop"
    assert found_in(rows, kl={"bound": 11.0, "action": "off"}) == {}
    assert found_in(rows, kl={"bound": 11.0, "action": False}) == {}  # what YAML makes of a bare off


def test_one_batch_alone_is_no_finding() -> None:
    assert found_in(history(2, kl_nats=[500.0] * 2, complete_share=[0.0] * 2)) == {}
    # Three iterations are first and last at once: nothing can have changed between them.
    assert found_in(history(3, entropy_nats=[2.0, 0.01, 0.01], response_tokens_mean=[1, 1, 900])) == {}


def test_a_condition_that_lasts_is_told_once_and_again_when_it_comes_back() -> None:
    kl = [1.0, 1.0, 90.0, 90.0, 90.0, 1.0, 1.0, 1.0, 1.0, 170.0, 1.0]
    rows = history(len(kl), kl_nats=kl)
    # Means over three: 92/3, 181/3 (at 4), 90, 181/3, 92/3 (at 7), 1, 1, 172/3 (at 10), 172/3.
    found = all_findings(rows, [], GuardsConfig(), sampler_bound=0.01)
    assert [(finding.guard, finding.iteration) for finding in found] == [("kl", 4), ("kl", 10)]
    assert [f.iteration for f in new_findings(rows[:4], [], GuardsConfig(), sampler_bound=0.01)] == [4]
    assert new_findings(rows[:5], [], GuardsConfig(), sampler_bound=0.01) == []


def rising(count: int) -> list[dict[str, Any]]:
    return history(count, score_mean=[step / 10 for step in range(count)])


@pytest.mark.parametrize(
    ("scores", "independent", "expected"),
    [
        ([0.5, 0.4, 0.3, 0.2], [1.0, 1.1, 1.2, 1.3], "the held-out reward fell in 3"),
        (
            [0.5, 0.6, 0.7, 0.8],
            [1.0, 0.9, 0.8, 0.7],
            "the independent reward model's held-out reward fell in 3",
        ),
        ([0.5, 0.6, 0.7, 0.8], [1.0, 0.9, 0.95, 0.7], None),  # one rise between
        ([0.5, 0.6, 0.7, 0.8], [1.0, 0.999, 0.998, 0.997], None),  # within one standard error
        ([0.5, 0.6, 0.7], [1.0, 0.9, 0.8], None),  # two falls only
    ],
)
def test_reward_hacking(scores: list[float], independent: list[float], expected: str | None) -> None:
    columns = {"independent_mean": independent, "independent_se": [0.01] * len(scores)}
    judged = evaluations(10, scores, **columns)
    rows = rising(10 * (len(scores) - 1))
    found = found_in(rows, judged)
    if expected is None:
        assert found == {}
        return
    assert expected in found["reward_hacking"].reason
    # Where the reward that is optimised does not rise, nothing is exploited.
    for row in rows:
        row["score_mean"] = -row["score_mean"]
    assert found_in(rows, judged) == {}


def test_reward_hacking_names_the_batches_rewards() -> None:
    """Means over the iterations around the two ends: the first is iteration 1 alone, the last are 21 to 30."""
    judged = evaluations(10, [0.5, 0.4, 0.3, 0.2])
    reason = found_in(rising(30), judged)["reward_hacking"].reason
    assert "from 0.5 to 0.2, while the batches' rose from 0 to 2.45:" in reason
    assert "reward_hacking" not in found_in(rising(30), judged, reward_hacking={"bound": 4})


def test_what_is_not_finite_is_found_at_once() -> None:
    rows = history(1)
    rows[-1] |= {"kl_nats": None, "not_finite": ["kl_nats", "ratio_max"]}
    assert found_in(rows)["not_finite"] == Finding(
        "not_finite",
        "stop",
        1,
        "kl_nats, ratio_max became NaN or infinite: lower training.learning_rate",
    )


@pytest.mark.parametrize(
    ("scores", "patience", "min_delta", "stops"),
    [
        ([1.0, 0.9, 0.8], 2, 0.0, True),
        ([1.0, 0.9], 2, 0.0, False),
        ([1.0, 0.9, 1.1, 1.0], 2, 0.0, False),
        ([1.0, 0.9, 1.1, 1.0, 1.1], 2, 0.0, True),  # as good is no gain
        ([1.0, 1.05, 1.1], 2, 0.1, True),  # too small a gain, each time from 1.0
        ([1.0, 1.05, 1.11], 2, 0.1, False),  # small steps that add up
        ([], 1, 0.0, False),
    ],
)
def test_early_stopping(scores: list[float], patience: int, min_delta: float, stops: bool) -> None:
    reason = stops_early(evaluations(5, scores), EarlyStopping(patience=patience, min_delta=min_delta))
    assert (reason is not None) == stops
    assert stops_early(evaluations(5, scores), None) is None


def test_early_stopping_says_why() -> None:
    reason = stops_early(evaluations(5, [0.5, 1.0, 0.9, 0.8]), EarlyStopping(patience=2))
    assert reason == (
        "for 2 evaluations the held-out reward has not risen above 1, which it had after 5 iterations"
    )


def test_the_best_evaluation_is_the_earliest_of_equals() -> None:
    best = best_evaluation(evaluations(10, [0.1, 0.7, 0.7, 0.3]))
    assert best is not None
    assert best["step"] == 10
    assert best_evaluation([]) is None
