"""Which samples are kept, against the rule written out, and what is counted."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from small_stage import LONG, World, question_of, rows_of

from llama2_chat.errors import UserInputError
from llama2_chat.rejection_sampling.select import all_unsafe, select


def candidate(response: str, combined: float, status: str = "complete", safety: float | None = 1.0) -> dict:
    return {"response": response, "status": status, "scores": {"combined": combined, "safety": safety}}


def test_the_best_complete_answer_is_kept_and_the_first_of_equals() -> None:
    rows = [
        candidate("a", 0.2),
        candidate("b", 0.9, "cut_off"),
        candidate("c", 0.7),
        candidate("d", 0.7),
        candidate("", 0.99, "empty"),
        candidate("e", 0.95, "chat_tag"),
        {"response": "f", "status": "too_long", "scores": None},
    ]
    assert select(rows, rule="best", rng=random.Random(0)) == [2]
    assert select(rows, rule="best", rng=random.Random(0), keep=2) == [2, 3]
    assert select(rows, rule="best", rng=random.Random(0), keep=9) == [2, 3, 0]
    assert select(rows[1:2], rule="best", rng=random.Random(0)) == []
    drawn = Counter(select(rows, rule="random", rng=random.Random(n))[0] for n in range(900))
    assert set(drawn) == {0, 2, 3}
    assert all(abs(count - 300) < 75 for count in drawn.values())  # five standard deviations


@pytest.mark.parametrize("rule", ["best", "random"])
def test_several_kept_answers_differ(rule: str) -> None:
    rows = [candidate("same", 0.9), candidate("same", 0.8), candidate("other", 0.1)]
    kept = select(rows, rule=rule, rng=random.Random(3), keep=2)
    assert sorted(rows[place]["response"] for place in kept) == ["other", "same"]


def test_only_scores_below_an_even_chance_are_unsafe() -> None:
    assert all_unsafe([candidate("a", 0.1, safety=-0.1), candidate("b", 0.1, "cut_off", safety=3.0)])
    assert not all_unsafe([candidate("a", 0.1, safety=-0.1), candidate("b", 0.1, safety=0.0)])
    assert not all_unsafe([candidate("a", 0.1, safety=None)])
    assert not all_unsafe([candidate("a", 0.1, "empty", safety=-1.0)])


@pytest.mark.parametrize("what", ["keep", "drop"])
def test_prompts_whose_answers_are_all_unsafe(world: World, what: str) -> None:
    prompts = world.prompts("prompts.jsonl", [f"question {n}" for n in range(200)])
    directory, metrics = world.run("stage", prompts, when_all_unsafe=what)
    rows = rows_of(directory.samples)
    unsafe, expected = 0, []
    for start in range(0, len(rows), 4):
        complete = [row for row in rows[start : start + 4] if row["status"] == "complete"]
        if not complete:
            continue
        bad = max(row["scores"]["safety"] for row in complete) < 0
        unsafe += bad
        if not bad or what == "keep":
            expected.append(max(complete, key=lambda row: row["scores"]["combined"])["response"])
    assert 5 < unsafe < 60
    assert [row["messages"][-1]["content"] for row in rows_of(directory.dataset)] == expected
    selection = metrics["selection"]
    assert selection["kept"] == len(expected)
    assert selection["prompts_all_unsafe_kept"] == (unsafe if what == "keep" else 0)
    assert selection["prompts_all_unsafe_dropped"] == (unsafe if what == "drop" else 0)
    total = sum(selection[key] for key in ("kept", "prompts_without_complete_answer"))
    assert total + selection["prompts_all_unsafe_dropped"] == selection["prompts"] == 200


def test_what_is_not_eligible_is_counted_by_reason(world: World) -> None:
    questions = [f"{LONG} {n}" if n % 5 == 0 else f"question {n}" for n in range(40)]
    directory, metrics = world.run("stage", world.prompts("prompts.jsonl", questions))
    rows = rows_of(directory.samples)
    assert len(rows) == 160
    assert metrics["selection"]["samples"] == Counter(row["status"] for row in rows)
    assert metrics["selection"]["samples"]["too_long"] == 8 * 4
    assert {row["scores"] is None for row in rows if row["status"] == "too_long"} == {True}
    assert not [row for row in rows_of(directory.dataset) if question_of(row).startswith(LONG)]


def test_an_answer_that_a_reward_model_cannot_take_is_not_eligible(world: World, monkeypatch) -> None:
    from llama2_chat.rejection_sampling.sample import RewardScorer

    monkeypatch.setattr(
        RewardScorer, "can_take", lambda self, messages: not messages[-1].content.endswith("3")
    )
    directory, metrics = world.run("stage", world.prompts("p.jsonl", [f"question {n}" for n in range(60)]))
    for row in rows_of(directory.samples):
        assert (row["scores"] is None) == row["response"].endswith("3")
        assert row["status"] != "complete" or row["scores"] is not None
    assert metrics["selection"]["samples"]["too_long"] > 5
    assert not [r for r in rows_of(directory.dataset) if r["messages"][-1]["content"].endswith("3")]


def test_nothing_to_keep_is_an_error_that_says_why(world: World) -> None:
    with pytest.raises(UserInputError, match=r"no answer is kept: the samples are \{'too_long': 12\}"):
        world.run("stage", world.prompts("prompts.jsonl", [f"{LONG} {n}" for n in range(3)]))
    assert not (world.folder / "stage" / "dataset.jsonl").exists()


def test_no_prompt_is_an_error_with_its_file(world: World) -> None:
    (world.folder / "none.jsonl").write_text("\n")
    with pytest.raises(UserInputError, match=r"none\.jsonl.*holds no rows"):
        world.run("stage", str(world.folder / "none.jsonl"))
    assert not (world.folder / "stage" / "samples.jsonl").exists()
