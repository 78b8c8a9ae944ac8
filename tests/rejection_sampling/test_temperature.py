"""The temperature search against the definition, and the curves of the stage's own samples."""

from __future__ import annotations

import json
from itertools import combinations
from statistics import fmean

import pytest
from pydantic import ValidationError
from small_stage import LONG, World, question_of, rows_of

from llama2_chat.errors import UserInputError
from llama2_chat.rejection_sampling.config import RejectionSamplingConfig
from llama2_chat.rejection_sampling.temperature import choose

SEARCH = {"temperatures": [0.5, 2.5, 1.0], "temperature_samples_per_prompt": 6}


@pytest.fixture
def found(world: World):
    prompts = world.prompts("prompts.jsonl", [f"question {n}" for n in range(20)])
    held_out = world.prompts("held_out.jsonl", [f"held out {n}" for n in range(50)])
    return world.run("stage", prompts, temperature_prompts=[held_out], temperature_max_prompts=40, **SEARCH)


def worth(row: dict) -> float:
    return row["scores"]["combined"] if row["status"] == "complete" else 0.0


def test_the_temperature_with_the_highest_best_of_k_is_used(found) -> None:
    directory, metrics = found
    rows = rows_of(directory.temperature_samples)
    assert len(rows) == 3 * 40 * 6
    by_hand = {}
    for temperature in SEARCH["temperatures"]:
        of = [row for row in rows if row["temperature"] == temperature]
        prompts = [of[start : start + 6] for start in range(0, len(of), 6)]
        assert all(len({question_of(row) for row in prompt}) == 1 for prompt in prompts)
        by_hand[temperature] = fmean(
            fmean(max(map(worth, subset)) for subset in combinations(prompt, 4)) for prompt in prompts
        )
    search = json.loads(directory.temperature.read_text())
    assert search == metrics["temperature"]
    assert (search["k"], search["prompts"], search["samples_per_prompt"]) == (4, 40, 6)
    for one in search["temperatures"]:
        assert [row["n"] for row in one["maximum"]] == [1, 2, 4, 6] == [row["n"] for row in one["median"]]
        (at_k,) = (row for row in one["maximum"] if row["n"] == 4)
        assert at_k["mean"] == pytest.approx(by_hand[one["temperature"]], rel=1e-9)
        assert at_k["low"] < at_k["mean"] < at_k["high"]
    assert search["chosen"] == max(by_hand, key=lambda temperature: by_hand[temperature])
    assert {row["temperature"] for row in rows_of(directory.samples)} == {search["chosen"]}
    assert len(set(by_hand.values())) == 3


def test_samples_at_two_temperatures_share_their_random_numbers(found) -> None:
    """The fake policy's word is a temperature times a draw: the draws are the same."""
    rows = rows_of(found[0].temperature_samples)
    words = {(r["temperature"], question_of(r), r["sample_index"]): r["response"] for r in rows}
    pairs = [
        (int(words[1.0, question, index].split()[1]), int(words[2.5, question, index].split()[1]))
        for temperature, question, index in words
        if temperature == 1.0 and words[1.0, question, index] and words[2.5, question, index]
    ]
    assert len(pairs) > 100
    assert all(2.5 * cold - 1 <= hot <= 2.5 * (cold + 1) for cold, hot in pairs)


def test_the_time_of_each_phase_is_written_down(found) -> None:
    events = [event for event in rows_of(found[0].events.path) if event["event"] == "sampling_time"]
    assert [event["phase"] for event in events] == ["temperatures", "samples"]
    assert all(event["generate"] > 0 and event["score"] > 0 for event in events)


def test_equal_temperatures_choose_the_lowest() -> None:
    def one(temperature: float, mean: float) -> dict:
        return {"temperature": temperature, "maximum": [{"n": 1, "mean": 9 - mean}, {"n": 2, "mean": mean}]}

    assert choose([one(1.5, 0.5), one(0.5, 0.5), one(1.0, 0.4)], 2) == 0.5
    assert choose([one(1.5, 0.5), one(0.5, 0.4)], 2) == 1.5
    assert choose([one(1.5, 0.5), one(0.5, 0.4)], 1) == 0.5


def test_the_curves_of_the_own_samples(found) -> None:
    """Incomplete answers count as 0."""
    directory, metrics = found
    rows = rows_of(directory.samples)
    prompts = [rows[start : start + 4] for start in range(0, len(rows), 4)]
    assert {row["status"] for row in rows} >= {"complete", "cut_off"}
    stored = json.loads(directory.best_of.read_text())
    assert (stored["prompts"], stored["samples_per_prompt"]) == (20, 4)
    assert stored["maximum"] == metrics["best_of"]["maximum"]
    for row in stored["maximum"]:
        subsets = (fmean(max(map(worth, s)) for s in combinations(prompt, row["n"])) for prompt in prompts)
        assert row["mean"] == pytest.approx(fmean(subsets), rel=1e-9)


def test_no_complete_answer_at_any_temperature(world: World) -> None:
    held_out = world.prompts("held_out.jsonl", [f"{LONG} {n}" for n in range(3)])
    prompts = world.prompts("prompts.jsonl", ["question"])
    with pytest.raises(UserInputError, match=r"held_out\.jsonl: no temperature of \[0\.5, 2\.5, 1\.0\]"):
        world.run("stage", prompts, temperature_prompts=[held_out], **SEARCH)
    assert not (world.folder / "stage" / "temperature.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperatures": [1.0, 1.0]}, "1 stands there more than once"),
        ({"temperatures": [1.0, -0.5]}, "greater than or equal to 0"),
        ({"temperatures": []}, "temperature_prompts without temperatures"),
        ({"temperature_prompts": []}, "temperatures without temperature_prompts"),
        ({"temperature_samples_per_prompt": 9}, "fewer than samples_per_prompt"),
        ({"pool_top_k": 0}, "greater than or equal to 1"),
    ],
)
def test_a_search_that_cannot_work_is_refused(changes: dict, message: str) -> None:
    values = {"policy": "sft", "helpfulness": "h", "prompts": ["p"], "temperatures": [1.0, 2.0]}
    RejectionSamplingConfig(**values, temperature_prompts=["t"])
    with pytest.raises(ValidationError, match=message):
        RejectionSamplingConfig(**{**values, "temperature_prompts": ["t"], **changes})
