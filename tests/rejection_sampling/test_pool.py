"""The pool over iterations against a slow one made of whole files in memory."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from math import exp
from pathlib import Path

import pytest
from small_stage import Rewards, World, question_of, rows_of

from llama2_chat.errors import UserInputError
from llama2_chat.jsonl import read_samples
from llama2_chat.ppo.rewards import combine_scores


@pytest.fixture
def two_iterations(world: World) -> list[str]:
    """Samples of V1 (questions 0 to 29) and V2 (15 to 44), each scored by reward models of its own."""
    files = []
    for iteration, numbers in ((1, range(30)), (2, range(15, 45))):
        world.helpfulness, world.safety = Rewards(f"helpful {iteration}"), Rewards(f"safe {iteration}")
        prompts = world.prompts(f"prompts{iteration}.jsonl", [f"question {n}" for n in numbers])
        directory, _ = world.run(
            f"v{iteration}", prompts, iteration=iteration, sampling={"temperature": 1.5, "max_new_tokens": 8}
        )
        files.append(str(directory.samples))
        world.settings = world.settings.model_copy(update={"seed": 5 + iteration})
    world.helpfulness, world.safety = Rewards("helpful 3"), Rewards("safe 3")
    return files


def third(world: World, files: list[str], name: str = "v3", **changes):
    """V3 samples the questions 25 to 54, one of them twice."""
    prompts = world.prompts("prompts3.jsonl", [f"question {n}" for n in [*range(25, 55), 30]])
    return world.run(name, prompts, **{"iteration": 3, "earlier_samples": files, **changes})


def scored(world: World, question: str, answer: str) -> float:
    """R_c by its definition, from this iteration's reward models."""
    helpful, safe = world.helpfulness.score(question, answer), world.safety.score(question, answer)
    return 1 / (1 + exp(-(safe if 1 / (1 + exp(-safe)) < 0.15 else helpful)))


def slow_pool(world: World, files: list[str], own: list[dict]) -> dict[str, dict[str, dict]]:
    """Question → distinct answer → its earliest row, with this iteration's score as `score`."""
    pool: dict[str, dict[str, dict]] = {question_of(row): {} for row in own}
    for row in [*(row for file in files for row in rows_of(file)), *own]:
        question = question_of(row)
        answers = pool.setdefault(question, {})
        if row["status"] == "complete" and row["response"] not in answers:
            answers[row["response"]] = {**row, "score": scored(world, question, row["response"])}
    return pool


def test_the_best_answer_of_all_iterations_is_kept(world: World, two_iterations: list[str]) -> None:
    directory, metrics = third(world, two_iterations)
    pool = slow_pool(world, two_iterations, rows_of(directory.samples))
    expected = []
    for question, answers in pool.items():
        times = 2 if question == "question 30" else 1
        expected += [max(answers.values(), key=lambda row: row["score"])] * (times if answers else 0)
    dataset = rows_of(directory.dataset)
    found = [(question_of(row), row["messages"][-1]["content"], row["source"]) for row in dataset]
    assert found == [
        (question_of(row), row["response"], f"rejection_sampling:{row['iteration']}") for row in expected
    ]
    assert len(found) > 50  # questions 0 to 54, less those without a complete answer, and 30 twice
    assert [question for question, *_ in found][-1] == "question 24"  # no longer sampled, and kept
    kept = {(row["iteration"], row["policy"]): row["answers"] for row in metrics["kept_from"]}
    assert kept == Counter((row["iteration"], row["policy"]) for row in expected)
    assert len(kept) == 3
    for source in metrics["kept_from"]:
        scores = [row["score"] for row in expected if row["iteration"] == source["iteration"]]
        assert source["combined_mean"] == pytest.approx(sum(scores) / len(scores), rel=1e-6)
    mean = sum(row["score"] for row in expected) / len(expected)
    assert metrics["selection"]["combined_kept"] == pytest.approx(mean, rel=1e-6)


def test_the_pool_is_a_samples_file_with_new_scores(world: World, two_iterations: list[str]) -> None:
    directory, metrics = third(world, two_iterations)
    own = rows_of(directory.samples)
    slow = {
        (question, answer): row
        for question, answers in slow_pool(world, two_iterations, own).items()
        for answer, row in answers.items()
    }
    rows = rows_of(directory.pool)
    assert {(question_of(row), row["response"]) for row in rows} == set(slow)
    assert len(rows) == len(slow) == metrics["pool"]["answers"] == len(list(read_samples(directory.pool)))
    for row in rows:
        origin = slow[question_of(row), row["response"]]
        for name in ("policy", "iteration", "temperature", "sample_index", "status"):
            assert row[name] == origin[name]
        assert row["scores"]["combined"] == pytest.approx(origin["score"], rel=1e-6)
        assert row["scores"]["helpfulness"] == pytest.approx(
            world.helpfulness.score(question_of(row), row["response"]), rel=1e-6
        )
    changed = sum(r["scores"] != slow[question_of(r), r["response"]]["scores"] for r in rows)
    assert changed >= metrics["pool"]["scored_again"] > 50


def test_each_answer_is_scored_once_and_duplicates_are_counted(
    world: World, two_iterations: list[str]
) -> None:
    directory, metrics = third(world, two_iterations)
    own = rows_of(directory.samples)
    earlier = [row for file in two_iterations for row in rows_of(file)]
    complete = [row for row in [*earlier, *own] if row["status"] == "complete"]
    answers = {(question_of(row), row["response"]) for row in complete}
    sampled = {(question_of(row), row["response"]) for row in own if row["status"] == "complete"}
    pool = metrics["pool"]
    assert pool["earlier_samples"] == len(earlier) == 240
    assert pool["duplicates"] == len(complete) - len(answers) > 20
    assert pool["scored_again"] == len(answers) - len(sampled)
    assert pool["earlier_ineligible"] == Counter(
        row["status"] for row in earlier if row["status"] != "complete"
    )
    only = {question_of(row) for row in complete} - {question_of(row) for row in own}
    assert pool["prompts_from_earlier_only"] == len(only) == 25
    # Own samples are scored when they are sampled, equal ones in one call; the rest here, once each.
    assert Counter(world.helpfulness.scored[len(own) :]) == Counter(answers - sampled)


@pytest.mark.parametrize("k", [1, 3])
def test_the_top_k_distinct_answers_are_dialogues_of_their_own(
    world: World, two_iterations: list[str], k: int
) -> None:
    directory, metrics = third(world, two_iterations, pool="top_k_mix", pool_top_k=k)
    pool = slow_pool(world, two_iterations, rows_of(directory.samples))
    expected = []
    for question, answers in pool.items():
        best = sorted(answers, key=lambda answer: -answers[answer]["score"])[:k]
        expected += [(question, answer) for answer in best] * (2 if question == "question 30" else 1)
    assert [(question_of(r), r["messages"][-1]["content"]) for r in rows_of(directory.dataset)] == expected
    assert metrics["selection"]["kept"] == len(expected)
    if k == 1:
        best_of_all, _ = third(world, two_iterations, "v3-best")
        assert best_of_all.dataset.read_bytes() == directory.dataset.read_bytes()


def test_last_iteration_is_as_if_there_were_no_earlier_samples(
    world: World, two_iterations: list[str]
) -> None:
    last, metrics = third(world, two_iterations, "last", pool="last_iteration")
    alone, _ = third(world, [], "alone")
    assert last.dataset.read_bytes() == alone.dataset.read_bytes()
    assert not last.pool.exists()
    assert "pool" not in metrics
    assert [row["iteration"] for row in metrics["kept_from"]] == [3]


def test_the_order_of_the_files_and_packing_change_nothing(world: World, two_iterations: list[str]) -> None:
    whole, metrics = third(world, two_iterations)
    with gzip.open(world.folder / "v1.jsonl.gz", "wt") as stream:
        stream.write(Path(two_iterations[0]).read_text().replace("\n", "\n\n"))
    packed = [str(world.folder / "v1.jsonl.gz"), two_iterations[1]]
    again, found = third(world, packed, "packed")
    assert again.pool.read_bytes() == whole.pool.read_bytes()
    assert found == metrics
    turned, found = third(world, two_iterations[::-1], "turned")
    assert origins(turned.pool) == origins(whole.pool)
    assert found["pool"] == metrics["pool"]


def origins(file: Path) -> set[str]:
    """Rows without their scores, which the place in a batch may round differently."""
    return {json.dumps({**row, "scores": None}) for row in rows_of(file)}


def test_a_samples_file_without_status_and_scores_will_do(world: World, two_iterations: list[str]) -> None:
    """What another tool sampled: tags and empty responses are ineligible."""
    rows = [
        {k: v for k, v in row.items() if k not in ("status", "scores")} for row in rows_of(two_iterations[0])
    ]
    rows[0]["response"], rows[1]["response"] = "see [INST] this", ""
    file = world.folder / "bare.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    directory, metrics = third(world, [str(file)])
    empty = sum(not row["response"] for row in rows)
    assert metrics["pool"]["earlier_ineligible"] == {"chat_tag": 1, "empty": empty}
    assert not [row for row in rows_of(directory.pool) if "[INST]" in row["response"]]


def test_the_tag_of_a_prompt_is_this_iterations(world: World, two_iterations: list[str]) -> None:
    """A prompt that has become a safety prompt since is scored by the safety model."""
    tagged = world.prompts("tagged.jsonl", [f"question {n}" for n in range(10)], is_safety=True)
    directory, _ = world.run("v3", tagged, iteration=3, earlier_samples=two_iterations[:1])
    for row in rows_of(directory.pool):
        sampled_now = int(question_of(row).split()[1]) < 10
        assert row["is_safety"] == sampled_now
        if sampled_now:
            assert row["scores"]["combined"] == pytest.approx(
                1 / (1 + exp(-row["scores"]["safety"])), rel=1e-6
            )


def test_an_iteration_that_is_not_the_last_is_warned_of(
    world: World, two_iterations: list[str], capsys
) -> None:
    third(world, two_iterations, iteration=2)
    assert (
        "v3: iteration is 2, but among the earlier samples are some of iteration 2" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.pop("response"), r"response"),
        (lambda row: row.pop("policy"), r"policy"),
        (lambda row: row.update(status="fine"), r'"fine".*complete, cut_off'),
        (lambda row: row.update(iteration="one"), r"iteration"),
        (lambda row: row.update(scores={"safety": 1.0}), r"scores\.helpfulness"),
        (lambda row: row.update(prompt=[{"role": "assistant", "content": "x"}]), r"prompt"),
    ],
)
def test_rows_that_are_no_samples_are_named_by_file_and_line(
    world: World, two_iterations: list[str], change, message: str
) -> None:
    rows = rows_of(two_iterations[0])
    change(rows[6])
    file = world.folder / "bad.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserInputError, match=rf"bad\.jsonl:7: .*{message}"):
        third(world, [str(file)])
    assert not list((world.folder / "v3").glob("*"))  # told before anything is sampled


@pytest.mark.parametrize("row", [{"messages": []}, {"prompt": [{"role": "user", "content": "x"}]}])
def test_files_of_another_kind_are_refused(world: World, row: dict) -> None:
    file = world.folder / "other.jsonl"
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserInputError, match=r"other\.jsonl:1: "):
        third(world, [str(file)])


def test_combined_is_the_public_rule() -> None:
    """`scored` above, which the other tests rest on, against the public function."""
    import torch

    helpful, safe = torch.tensor([1.0, 1.0, -2.0]), torch.tensor([-1.8, -1.7, 0.5])
    combined, _ = combine_scores(helpful, safe, is_safety=torch.tensor([False] * 3), safety_threshold=0.15)
    # σ(-1.8) = 0.142 < 0.15 ≤ σ(-1.7) = 0.154
    assert combined.tolist() == pytest.approx([-1.8, 1.0, -2.0])
