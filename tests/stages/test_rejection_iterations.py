"""A second iteration with real models: samples of the first are scored again and compete."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from own_rewards import few_prompts, metrics_of, written

from llama2_chat import RewardScorer
from llama2_chat.cli.main import run_command
from llama2_chat.files import sha256_of
from llama2_chat.rejection_sampling import build


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def second_config(world, rejection, rejection_config, tmp_path_factory):
    """V2 samples 40 prompts from V1's model; V1 sampled 300, these among them."""
    prompts = few_prompts(world, tmp_path_factory.mktemp("few"), 40)
    training = {"learning_rate": 3e-3, "batch_size": 8, "epochs": 1, "sequence_length": 128}
    return rejection_config(
        policy=str(rejection[0].model),
        prompts=prompts,
        earlier_samples=[str(rejection[0].samples)],
        iteration=2,
        sft_dialogues=[],
        training={**training, "max_steps": 6, "checkpoint_steps": 2},
    )


@pytest.fixture(scope="module")
def second(settings, stage_at, second_config):
    directory = stage_at("second")
    return directory, build.run_stage(second_config, settings, directory)


def test_the_best_of_both_iterations_is_kept_by_the_new_scores(second, rejection, rewards) -> None:
    directory, metrics = second
    pool = rows_of(directory.pool)
    assert metrics["pool"]["earlier_samples"] == 900
    assert {row["iteration"] for row in pool} == {1, 2}
    scorer = RewardScorer.from_pretrained(rewards["helpfulness"][0].model, rewards["safety"][0].model)
    by_prompt: dict[str, list[dict]] = {}
    for row in pool:
        by_prompt.setdefault(json.dumps(row["prompt"]), []).append(row)
    dialogues = [[*row["prompt"], {"role": "assistant", "content": row["response"]}] for row in pool]
    for row, score in zip(pool, scorer.score(dialogues, [r["is_safety"] for r in pool]), strict=True):
        assert row["scores"]["helpfulness"] == pytest.approx(score.helpfulness, abs=1e-5)
        assert row["scores"]["combined"] == pytest.approx(score.combined, abs=1e-5)
    best = {max(rows, key=lambda row: row["scores"]["combined"])["response"] for rows in by_prompt.values()}
    dataset = rows_of(directory.dataset)
    assert {row["messages"][-1]["content"] for row in dataset} == best
    assert metrics["selection"]["kept"] == len(dataset) > 150
    assert sum(row["answers"] for row in metrics["kept_from"]) == len(dataset)
    assert metrics["pool"]["prompts_from_earlier_only"] > 100


def test_interrupted_training_ends_with_the_same_bytes(
    settings, stage_at, second, second_config, interrupted_after
) -> None:
    directory = stage_at("second-interrupted")
    with interrupted_after(3):
        build.run_stage(second_config, settings, directory)
    assert not directory.model.exists()
    assert build.run_stage(second_config, settings, directory) == second[1]
    for name in ("samples.jsonl", "pool.jsonl", "dataset.jsonl", "best_of.json", "metrics.jsonl"):
        assert (directory.path / name).read_bytes() == (second[0].path / name).read_bytes()
    assert sha256_of(directory.model) == sha256_of(second[0].model)


def test_through_the_command_line_with_a_search(world, second_config, tmp_path) -> None:
    held_out = few_prompts(world, tmp_path, 10)
    file = written(
        second_config,
        tmp_path,
        world,
        earlier_samples=[],
        temperatures=[0.5, 1.0],
        temperature_prompts=held_out,
        training=second_config.training.model_dump() | {"max_steps": 1},
    )
    out = tmp_path / "out"
    assert run_command(["rejection-sampling", str(file), "--output-dir", str(out)]) == 0
    search = json.loads((out / "temperature.json").read_text())
    assert [one["temperature"] for one in search["temperatures"]] == [0.5, 1.0]
    assert len(rows_of(out / "temperature_samples.jsonl")) == 2 * 10 * 3
    assert {row["temperature"] for row in rows_of(out / "samples.jsonl")} == {search["chosen"]}
    assert metrics_of(out)["temperature"] == search
    # Other settings in the same folder: what the first call found does not stay.
    assert run_command(["rejection-sampling", str(file), "temperatures=[0.7]", "--output-dir", str(out)]) == 0
    assert metrics_of(out)["temperature"]["chosen"] == 0.7


def test_samples_that_were_scored_otherwise_are_refused(
    world, second_config, distillation, tmp_path, capsys
) -> None:
    file = written(second_config, tmp_path, world, earlier_samples=[str(distillation[0].samples)])
    assert run_command(["rejection-sampling", str(file), "--output-dir", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert f"{distillation[0].samples}:1: " in said
    assert "scores.helpfulness" in said
    assert not (tmp_path / "out" / "samples.jsonl").exists()  # told before anything is sampled
