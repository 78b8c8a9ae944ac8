"""The paper's optimiser (§2.2) as it comes out of the stage: rates step by step, what decays, the defaults."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from llama2_chat.pretrain.config import PretrainConfig, PretrainTraining


def rate(step: int, *, steps: int, warmup: int, peak: float) -> float:
    """Of optimiser step `step` (from 1): linear from 0, then a cosine that would be at 10 % one step after the end."""
    done = step - 1
    if done < warmup:
        return peak * done / warmup
    turn = math.pi * (done - warmup) / (steps - warmup)
    return peak * (0.1 + 0.9 * (1 + math.cos(turn)) / 2)


def test_defaults_are_the_papers() -> None:
    config = PretrainConfig(text="text.jsonl", architecture={"context_length": 4096})
    training = config.training
    assert config.vocabulary_size == 32_000
    assert (training.adam_beta1, training.adam_beta2, training.adam_epsilon) == (0.9, 0.95, 1e-5)
    assert (training.weight_decay, training.max_grad_norm) == (0.1, 1.0)
    assert (training.min_warmup_steps, training.warmup_ratio) == (2000, 0.0)
    assert training.min_learning_rate_ratio == 0.1
    assert training.batch_size * training.sequence_length == 4 * 2**20  # 4M tokens


def test_rates_of_a_run(pretrain, text_file, texts) -> None:
    _, directory = pretrain("stage", str(text_file("text.jsonl", texts[:1000])), training={"max_steps": 40})
    found = [json.loads(line)["learning_rate"] for line in directory.metrics_file.read_text().splitlines()]
    assert found == pytest.approx(
        [rate(step, steps=40, warmup=5, peak=3e-3) for step in range(1, 41)], rel=1e-9
    )


@pytest.fixture
def made_trainer(trainer_of, text_file, texts) -> Any:
    """The trainer of a run of 10,000 steps with the default schedule."""
    training = {
        **{"min_warmup_steps": 2000, "learning_rate": 3e-4, "batch_size": 1},
        **{"epochs": 1e3, "max_steps": 10_000},
    }
    trainer = trainer_of("stage", str(text_file("text.jsonl", texts[:1000])), training=training)
    trainer.create_optimizer_and_scheduler(trainer.args.max_steps)
    return trainer


def test_rates_of_the_paper(made_trainer) -> None:
    assert PretrainTraining().learning_rate == 3e-4
    found = []
    for _ in range(10_000):
        found.append(made_trainer.lr_scheduler.get_last_lr()[0])
        made_trainer.optimizer.step()
        made_trainer.lr_scheduler.step()
    expected = [rate(step, steps=10_000, warmup=2000, peak=3e-4) for step in range(1, 10_001)]
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-18)
    assert (found[1000], found[2000], found[6000]) == pytest.approx((1.5e-4, 3e-4, 3e-4 * 0.55), rel=1e-9)
    assert made_trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(3e-5, rel=1e-9)


def test_matrices_decay_and_norms_do_not(made_trainer) -> None:
    optimizer, model = made_trainer.optimizer, made_trainer.model
    assert type(optimizer) is torch.optim.AdamW
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {
        group["weight_decay"]: {by_id[id(p)] for p in group["params"]} for group in optimizer.param_groups
    }
    matrices = {name for name, parameter in model.named_parameters() if parameter.ndim == 2}
    vectors = {name for name, parameter in model.named_parameters() if parameter.ndim == 1}
    assert groups == {0.1: matrices, 0.0: vectors}
    assert len(matrices) == 2 * 7 + 2  # two layers, embeddings and head
    assert len(vectors) == 2 * 2 + 1
    assert all("norm" in name for name in vectors)
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.9, 0.95), 1e-5)
