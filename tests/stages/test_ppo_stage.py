"""The `ppo` stage: what it starts from, what it does to a model, and that it can be stopped anywhere."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from llama2_chat.errors import TrainingError, UserInputError
from llama2_chat.files import sha256_of
from llama2_chat.jsonl import write_rows
from llama2_chat.ppo import learners, loop, value_model
from llama2_chat.ppo.train import run_stage
from llama2_chat.reward.scoring import Score
from llama2_chat.stage import StageDirectory

ITERATIONS = 4


@pytest.fixture(scope="session")
def ppo(settings, stage_at, ppo_config):
    directory = stage_at("ppo")
    return directory, run_stage(ppo_config(), settings, directory)


def records(directory) -> list[dict]:
    return [json.loads(line) for line in directory.metrics_file.read_text().splitlines()]


def weights(directory) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(directory.model).state_dict()


def test_one_line_of_finite_metrics_an_iteration(ppo, sft) -> None:
    directory, metrics = ppo
    rows = records(directory)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    # The policy starts as its own reference, the values at the mean of whitened scores.
    assert (rows[0]["kl_nats"], rows[0]["explained_variance"]) == (0.0, 0.0)
    assert rows[-1]["kl_nats"] > 0.0
    assert rows[-1]["explained_variance"] != 0.0
    assert metrics["iterations"] == 4
    assert (metrics["prompts"], metrics["dropped_prompts"]) == (300, 0)
    assert metrics["score_first"] == rows[0]["score_mean"]
    assert metrics["kl_nats_last"] == rows[-1]["kl_nats"]
    before, after = weights(sft[0]), weights(directory)
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_times_go_to_the_events(ppo) -> None:
    directory, _ = ppo
    events = [json.loads(line) for line in directory.events.path.read_text().splitlines()]
    (finished,) = [event for event in events if event["event"] == "ppo_finished"]
    assert {"sampling_seconds", "scoring_seconds", "training_seconds", "response_tokens"} <= set(finished)
    assert not any("second" in name or "time" in name for row in records(directory) for name in row)


def test_the_first_ratios_are_exactly_1(settings, stage_at, ppo_config, monkeypatch) -> None:
    seen = []
    original = learners.policy_loss

    def watched(logprobs, old_logprobs, advantages, **rest):
        seen.append(torch.exp(logprobs - old_logprobs).detach())
        return original(logprobs, old_logprobs, advantages, **rest)

    monkeypatch.setattr(learners, "policy_loss", watched)
    config = ppo_config(training={"iterations": 1, "micro_batch_size": 4})
    run_stage(config, settings, stage_at("ppo-ratios"))
    assert len(seen) == 4  # two mini-batches of two micro-batches
    assert all(bool((ratios == 1).all()) for ratios in seen[:2])
    assert not all(bool((ratios == 1).all()) for ratios in seen[2:])


def test_accumulated_micro_batches_equal_one_batch(settings, stage_at, ppo_config, monkeypatch) -> None:
    gradients: list[list[torch.Tensor]] = []
    original = torch.nn.utils.clip_grad_norm_

    def watched(parameters, limit):
        parameters = list(parameters)
        gradients.append([parameter.grad.clone() for parameter in parameters])
        return original(parameters, limit)

    monkeypatch.setattr(learners.nn.utils, "clip_grad_norm_", watched)
    found = []
    for name, micro in (("whole", None), ("parts", 3)):
        gradients.clear()
        # Adam's first step turns rounding in near-zero gradients into whole steps: hence a large epsilon.
        training = {
            "iterations": 1, "batch_size": 12, "mini_batch_size": 6, "micro_batch_size": micro,
            "adam_epsilon": 1e-2,
        }  # fmt: skip
        directory = stage_at(f"ppo-{name}")
        run_stage(ppo_config(training=training), settings, directory)
        found.append((list(gradients), weights(directory)))
    (whole, whole_weights), (parts, parts_weights) = found
    assert len(whole) == len(parts) == 4  # two steps of two models
    for left, right in zip(whole, parts, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole_weights, parts_weights, rtol=1e-5, atol=1e-5)


def test_interrupted_and_resumed_equals_uninterrupted_to_the_byte(
    settings, stage_at, ppo, ppo_config, stopped_in_the_fourth_iteration
) -> None:
    """A run stopped by a signal and continued against one that ran through: weights and metrics."""
    directory = stage_at("ppo-interrupted")
    with stopped_in_the_fourth_iteration():
        run_stage(ppo_config(), settings, directory)
    assert sorted(folder.name for folder in directory.checkpoints.iterdir()) == [
        "checkpoint-2",
        "checkpoint-3",
    ]
    assert len(records(directory)) == 3
    assert run_stage(ppo_config(), settings, directory) == ppo[1]
    assert directory.metrics_file.read_bytes() == ppo[0].metrics_file.read_bytes()
    assert sha256_of(directory.model) == sha256_of(ppo[0].model)


def test_killed_and_resumed_equals_uninterrupted_to_the_byte(
    settings, stage_at, ppo, ppo_config, monkeypatch
) -> None:
    """A run killed between two checkpoints and continued against one that ran through."""
    directory = stage_at("ppo-killed")
    original = learners.ValueLearner.step
    steps = iter(range(100))

    def dies_between_two_steps(self, mini_batch, experience):
        if next(steps) == 7:  # the last of the fourth iteration, after the policy's
            raise KeyboardInterrupt
        return original(self, mini_batch, experience)

    monkeypatch.setattr(learners.ValueLearner, "step", dies_between_two_steps)
    with pytest.raises(KeyboardInterrupt):
        run_stage(ppo_config(), settings, directory)
    # What a kill in the middle of a write leaves: half a line, half a checkpoint.
    with directory.metrics_file.open("a") as stream:
        stream.write('{"step": 4, "score_me')
    (directory.checkpoints / "checkpoint-3").mkdir()
    monkeypatch.undo()
    run_stage(ppo_config(), settings, directory)
    assert directory.metrics_file.read_bytes() == ppo[0].metrics_file.read_bytes()
    assert sha256_of(directory.model) == sha256_of(ppo[0].model)


def test_checkpoints_are_plain_tensors_and_lose_their_optimiser_state(ppo, tmp_path: Path) -> None:
    names = {folder.name: {file.name for file in folder.iterdir()} for folder in ppo[0].checkpoints.iterdir()}
    whole = {"complete", "policy.safetensors", "value.safetensors", "optimizer.pt", "state.json"}
    assert names == {"checkpoint-2": whole, "checkpoint-4": whole}
    directory = StageDirectory(tmp_path, ppo[0].events)
    shutil.copytree(ppo[0].checkpoints, directory.checkpoints)
    directory.drop_progress()  # as the pipeline does when the stage is done
    left = {
        folder.name: {file.name for file in folder.iterdir()} for folder in directory.checkpoints.iterdir()
    }
    assert left == {name: whole - {"optimizer.pt"} for name in names}


def test_the_warmup_trains_the_value_model_alone(settings, stage_at, ppo_config, sft) -> None:
    directory = stage_at("ppo-warmup")
    run_stage(ppo_config(training={"iterations": 2, "warmup_iterations": 2}), settings, directory)
    assert [row["policy_loss"] for row in records(directory)] == [None, None]
    assert records(directory)[-1]["kl_nats"] == 0.0
    before, after = weights(sft[0]), weights(directory)
    assert all(torch.equal(before[name], after[name]) for name in before)


def run_on_short_answers(settings, directory, config, monkeypatch) -> list[dict]:
    """The reward is minus the response's length in tokens: stopping early pays, which is easy to learn."""
    original = loop.score_answers

    def scored(scorer, prompts, answers):
        scores = original(scorer, prompts, answers)
        return [
            Score(-float(len(answer.response.token_ids)), None, 0.5, None, "helpfulness", 0.5)
            for answer, _ in zip(answers, scores, strict=True)
        ]

    monkeypatch.setattr(loop, "score_answers", scored)
    run_stage(config, settings, directory)
    monkeypatch.undo()
    return records(directory)


def test_reward_rises_and_a_larger_beta_keeps_the_policy_closer(
    settings, stage_at, ppo_config, monkeypatch
) -> None:
    rows = {}
    for beta in (0.0, 1.0):
        config = ppo_config(
            kl_coefficient=beta,
            sampling={"max_new_tokens": 12},
            training={
                "iterations": 12, "batch_size": 32, "mini_batch_size": 8, "learning_rate": 2e-3,
                "checkpoint_iterations": 100,
            },
        )  # fmt: skip
        rows[beta] = run_on_short_answers(settings, stage_at(f"ppo-beta-{beta}"), config, monkeypatch)
    free, held = rows[0.0], rows[1.0]
    assert free[-1]["score_mean"] > free[0]["score_mean"] + 2.0
    assert free[0]["score_mean"] == held[0]["score_mean"]
    assert 0 <= held[-1]["kl_nats"] < 0.5 * free[-1]["kl_nats"]
    assert held[-1]["score_mean"] < free[-1]["score_mean"]


def test_a_value_model_of_another_tokenizer_starts_from_the_policy(
    world, settings, stage_at, ppo_config, monkeypatch
) -> None:
    monkeypatch.setattr(value_model, "same_tokens", lambda left, right: False)
    directory = stage_at("ppo-other-tokenizer")
    run_stage(ppo_config(training={"iterations": 1}), settings, directory)
    (warning,) = [
        event
        for event in map(json.loads, directory.events.path.read_text().splitlines())
        if event["event"] == "warning"
    ]
    assert "another tokenizer" in warning["message"]


def test_a_loss_that_is_not_finite_ends_the_run(settings, stage_at, ppo_config, monkeypatch) -> None:
    monkeypatch.setattr(learners, "value_loss", lambda values, *_, **__: values.sum() * float("nan"))
    with pytest.raises(TrainingError, match=r"value loss became nan .*; lower training\.value_learning"):
        run_stage(ppo_config(), settings, stage_at("ppo-nan"))


def test_prompts_that_do_not_fit_are_dropped_and_counted(
    world, settings, stage_at, ppo_config, tmp_path
) -> None:
    long = {"prompt": [{"role": "user", "content": "What is 1 plus 2? " * 60}]}
    rows = [json.loads(line) for line in (world / "prompts.jsonl").read_text().splitlines()[:20]]
    write_rows(tmp_path / "mixed.jsonl", [*rows, long])
    config = ppo_config(prompts=[str(tmp_path / "mixed.jsonl")], training={"iterations": 1})
    metrics = run_stage(config, settings, stage_at("ppo-dropped"))
    assert (metrics["prompts"], metrics["dropped_prompts"]) == (20, 1)
    write_rows(tmp_path / "long.jsonl", [long])
    with pytest.raises(UserInputError, match=r"long\.jsonl: none of the 1 prompts leaves room for 8 new"):
        run_stage(ppo_config(prompts=[str(tmp_path / "long.jsonl")]), settings, stage_at("ppo-nothing-fits"))


def test_bfloat16_and_gradient_checkpointing_run(settings, stage_at, ppo_config, ppo) -> None:
    bfloat16 = settings.model_copy(update={"precision": "bfloat16"})
    directory = stage_at("ppo-bfloat16")
    run_stage(ppo_config(training={"iterations": 1}), bfloat16, directory)
    assert records(directory)[0]["kl_nats"] == 0.0
    directory = stage_at("ppo-gradient-checkpointing")
    config = ppo_config(training={"iterations": 2, "gradient_checkpointing": True})
    run_stage(config, settings, directory)
    for recomputed, stored in zip(records(directory), records(ppo[0]), strict=False):
        assert recomputed == pytest.approx(stored, rel=1e-4, abs=1e-6)
