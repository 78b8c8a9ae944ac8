"""PPO stopped or killed at any point of an iteration ends as if it had run through; steps are counted right."""

from __future__ import annotations

import itertools
import json
import signal
from collections.abc import Callable

import pytest
import torch

from llama2_chat import interruption
from llama2_chat.files import sha256_of
from llama2_chat.ppo import learners, loop
from llama2_chat.ppo.config import PpoConfig
from llama2_chat.ppo.train import run_stage

STOPPED_IN = 1
"""The second of three iterations."""


@pytest.fixture(scope="module")
def config(world, sft, rewards) -> Callable[..., PpoConfig]:
    """Whatever is carried over iterations is switched on."""

    def make(**training) -> PpoConfig:
        return PpoConfig(
            policy=str(sft[0].model),
            helpfulness=str(rewards["helpfulness"][0].model),
            safety=str(rewards["safety"][0].model),
            prompts=[str(world / "prompts.jsonl")],
            sampling={"max_new_tokens": 6},
            incomplete="own",
            whiten_scores="running",
            kl_target=0.05,
            kl_horizon=40,
            training={
                "iterations": 3, "batch_size": 6, "mini_batch_size": 3, "epochs_per_batch": 2,
                "learning_rate": 1e-3, **training,
            },
        )  # fmt: skip

    return make


@pytest.fixture(scope="module")
def uninterrupted(settings, stage_at, config):
    directory = stage_at("ppo-running-state")
    run_stage(config(), settings, directory)
    return directory


def in_sampling(monkeypatch, ends) -> None:
    original, calls = loop.sample_batch, iter(range(10))

    def sampled(*args, **kwargs):
        if next(calls) == STOPPED_IN:
            ends()
        return original(*args, **kwargs)

    monkeypatch.setattr(loop, "sample_batch", sampled)


def after_scoring(monkeypatch, ends) -> None:
    original, calls = loop.score_answers, iter(range(10))

    def scored(*args):
        scores = original(*args)
        if next(calls) == STOPPED_IN:
            ends()
        return scores

    monkeypatch.setattr(loop, "score_answers", scored)


def in_an_update(monkeypatch, ends) -> None:
    original, calls = learners.ValueLearner.step, iter(range(100))

    def stepped(self, *args):
        if next(calls) == 4 * STOPPED_IN + 1:  # four steps an iteration; the policy's own is done
            ends()
        return original(self, *args)

    monkeypatch.setattr(learners.ValueLearner, "step", stepped)


def between_passes(monkeypatch, ends) -> None:
    original = loop.PpoLoop._mini_batches

    def split(self, prompts, answers, iteration, epoch):
        if (iteration, epoch) == (STOPPED_IN, 1):
            ends()
        return original(self, prompts, answers, iteration, epoch)

    monkeypatch.setattr(loop.PpoLoop, "_mini_batches", split)


POINTS = [in_sampling, after_scoring, in_an_update, between_passes]


def test_what_is_carried_over_is_at_work(uninterrupted) -> None:
    rows = [json.loads(line) for line in uninterrupted.metrics_file.read_text().splitlines()]
    assert rows[0]["kl_coefficient"] == 0.01
    assert len({row["kl_coefficient"] for row in rows}) == 3
    for before, after in itertools.pairwise(rows):
        error = min(max(before["kl_nats"] / 0.05 - 1, -0.2), 0.2)
        expected = before["kl_coefficient"] * (1 + error * 6 / 40)
        assert after["kl_coefficient"] == pytest.approx(expected, rel=1e-12)
    state = json.loads((uninterrupted.checkpoints / "checkpoint-3" / "state.json").read_text())
    assert state["scores"]["count"] == 3 * 6
    means = [row["score_mean"] for row in rows]  # own scores for all: nothing was replaced
    assert state["scores"]["mean"] == pytest.approx(sum(means) / 3, rel=1e-6)


@pytest.mark.parametrize("point", POINTS)
def test_stopped_by_a_signal(settings, stage_at, config, uninterrupted, monkeypatch, point) -> None:
    directory = stage_at(f"ppo-stopped-{point.__name__}")
    sampled, original = [], loop.sample_batch

    def watched(*args, **kwargs):
        sampled.append(kwargs["iteration"])
        return original(*args, **kwargs)

    monkeypatch.setattr(loop, "sample_batch", watched)
    point(monkeypatch, lambda: monkeypatch.setattr(interruption, "_requested", signal.SIGTERM))
    with pytest.raises(interruption.Interrupted):
        run_stage(config(), settings, directory)
    assert sampled == [0, STOPPED_IN]
    # What is sampled is thrown away; an update that has begun is brought to its end.
    done = STOPPED_IN if point in POINTS[:2] else STOPPED_IN + 1
    assert [folder.name for folder in directory.checkpoints.iterdir()] == [f"checkpoint-{done}"]
    monkeypatch.undo()
    run_stage(config(), settings, directory)
    assert directory.metrics_file.read_bytes() == uninterrupted.metrics_file.read_bytes()
    assert sha256_of(directory.model) == sha256_of(uninterrupted.model)


@pytest.mark.parametrize("point", POINTS)
def test_killed(settings, stage_at, config, uninterrupted, monkeypatch, point) -> None:
    directory = stage_at(f"ppo-killed-{point.__name__}")

    def dies() -> None:
        raise KeyboardInterrupt

    point(monkeypatch, dies)
    with pytest.raises(KeyboardInterrupt):
        run_stage(config(checkpoint_iterations=1), settings, directory)
    assert [folder.name for folder in directory.checkpoints.iterdir()] == [f"checkpoint-{STOPPED_IN}"]
    monkeypatch.undo()
    run_stage(config(checkpoint_iterations=1), settings, directory)
    assert directory.metrics_file.read_bytes() == uninterrupted.metrics_file.read_bytes()
    weights = "model.safetensors"  # the model card tells how often there was a checkpoint
    assert sha256_of(directory.model / weights) == sha256_of(uninterrupted.model / weights)


def test_one_step_a_mini_batch_however_many_micro_batches(settings, stage_at, config, monkeypatch) -> None:
    """2 mini-batches x 2 passes x 3 micro-batches: 12 losses, 4 steps of each model by AdamW's own count."""
    losses = []
    original = learners.policy_loss

    def watched(*args, **kwargs):
        losses.append(original(*args, **kwargs))
        return losses[-1]

    monkeypatch.setattr(learners, "policy_loss", watched)
    directory = stage_at("ppo-steps")
    run_stage(config(iterations=1, micro_batch_size=1), settings, directory)
    assert len(losses) == 12
    states = torch.load(directory.checkpoints / "checkpoint-1" / "optimizer.pt", weights_only=True)
    for name in ("policy", "value"):
        assert {float(state["step"]) for state in states[name]["state"].values()} == {4.0}
