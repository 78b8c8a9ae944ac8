"""Reward training: its loss, what it does to accuracy, and that batching and padding change nothing."""

from __future__ import annotations

import json
import random

import pytest
import torch
from datasets import Dataset
from transformers import LlamaForSequenceClassification
from trl.trainer.reward_config import RewardConfig as TrlRewardConfig

from llama2_chat.reward.config import RewardTraining
from llama2_chat.reward.data import collate_pairs
from llama2_chat.reward.pooling import pack_dialogues, pool_at_ends, row_layout, scores_at_ends, unpool
from llama2_chat.reward.trainer import MarginRewardTrainer
from llama2_chat.training import placeholder_tokenizer, run_trainer, trainer_arguments


@pytest.fixture
def reward_model(tiny_llama):
    def make():
        config = tiny_llama().config
        config.num_labels = 1
        config.pad_token_id = 0
        torch.manual_seed(1)
        return LlamaForSequenceClassification(config).eval()

    return make


@pytest.fixture
def columns() -> dict[str, list]:
    """Sixty pairs: the preferred answer holds token 5, the other token 6; every third pair has no safety label."""
    rng = random.Random(0)
    made: dict[str, list] = {
        "chosen_ids": [],
        "rejected_ids": [],
        "margin": [],
        "chosen_safe": [],
        "rejected_safe": [],
    }
    for number in range(60):
        prompt = [1] + [rng.randrange(7, 50) for _ in range(rng.randrange(1, 6))]
        made["chosen_ids"].append(prompt + [5] * rng.randrange(1, 5) + [2])
        made["rejected_ids"].append(prompt + [6] * rng.randrange(1, 5) + [2])
        made["margin"].append([0.0, 1 / 3, 1.0][number % 3])
        made["chosen_safe"].append(-1 if number % 3 == 0 else 1)
        made["rejected_safe"].append(-1 if number % 3 == 0 else number % 2)
    return made


def train(model, columns, settings, directory, *, safety_weight=0.0, **changes):
    training = RewardTraining(
        **{
            "learning_rate": 2e-3,
            "batch_size": 12,
            "epochs": 1,
            "min_warmup_steps": 0,
            "warmup_ratio": 0.0,
            **changes,
        }
    )
    count = len(columns["margin"])
    pool_at_ends(model)
    trainer = MarginRewardTrainer(
        model=model,
        args=TrlRewardConfig(**trainer_arguments(training, settings, directory.checkpoints, count)),
        train_dataset=Dataset.from_dict(columns),
        data_collator=lambda rows: collate_pairs(rows, 0, row_layout(model)),
        processing_class=placeholder_tokenizer(0),
        safety_weight=safety_weight,
    )
    run_trainer(trainer, directory, "test")
    unpool(model)
    return [json.loads(line) for line in directory.metrics_file.read_text().splitlines()]


def scores(model, rows: list[list[int]]) -> torch.Tensor:
    """One row at a time, without padding."""
    with torch.no_grad():
        return torch.stack(
            [model.score(model.model(torch.tensor([row])).last_hidden_state[0, -1]).squeeze() for row in rows]
        )


@pytest.mark.parametrize("safety_weight", [0.0, 0.7])
def test_the_logged_loss_is_the_definition(
    reward_model, columns, settings, stage_directory, safety_weight
) -> None:
    model = reward_model()
    chosen, rejected = scores(model, columns["chosen_ids"]), scores(model, columns["rejected_ids"])
    # Written out: ranking over all pairs, classification over the labelled responses only.
    ranking = -(chosen - rejected - torch.tensor(columns["margin"])).sigmoid().log().mean()
    labels = torch.tensor(columns["chosen_safe"] + columns["rejected_safe"])
    probability = torch.cat([chosen, rejected]).sigmoid()[labels >= 0]
    safe = labels[labels >= 0].float()
    classification = -(safe * probability.log() + (1 - safe) * (1 - probability).log()).mean()
    logged = train(model, columns, settings, stage_directory(), batch_size=60, safety_weight=safety_weight)
    assert logged[0]["loss"] == pytest.approx((ranking + safety_weight * classification).item(), rel=1e-5)


def test_accuracy_rises(reward_model, columns, settings, stage_directory) -> None:
    model = reward_model()
    logged = train(model, columns, settings, stage_directory(), epochs=10)
    assert logged[-1]["loss"] < 0.5 * logged[0]["loss"]
    gaps = scores(model, columns["chosen_ids"]) - scores(model, columns["rejected_ids"])
    assert (gaps > 0).float().mean() == 1.0


def test_the_safety_loss_puts_unsafe_responses_below_zero(
    reward_model, columns, settings, stage_directory
) -> None:
    columns["rejected_safe"] = [0 if label >= 0 else -1 for label in columns["rejected_safe"]]
    model = reward_model()
    train(model, columns, settings, stage_directory(), epochs=10, safety_weight=1.0)
    assert (scores(model, columns["chosen_ids"]) > 0).all()
    assert (scores(model, columns["rejected_ids"]) < 0).all()


@pytest.mark.parametrize("safety_weight", [0.0, 0.7])
def test_equivalence_of_accumulated_and_one_batch(
    reward_model, columns, settings, stage_directory, safety_weight
) -> None:
    """Micro-batches of 4 against one batch: losses of every step and weights."""
    whole, parts = reward_model(), reward_model()
    a = train(whole, columns, settings, stage_directory("whole"), safety_weight=safety_weight)
    b = train(
        parts, columns, settings, stage_directory("parts"), safety_weight=safety_weight, micro_batch_size=4
    )
    assert [row["loss"] for row in a] == pytest.approx([row["loss"] for row in b], rel=1e-4)
    for left, right in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padding_id", [0, 2, 17])
def test_a_score_depends_neither_on_padding_nor_on_packing(reward_model, columns, padding_id: int) -> None:
    """Scores of packed rows against scores of one padded batch."""
    model, rows = reward_model(), columns["chosen_ids"]
    packed = pack_dialogues(rows, padding_id)
    assert len(packed.input_ids) < len(rows)
    with torch.no_grad():
        found = scores_at_ends(model, packed.input_ids, packed.position_ids, packed.rows, packed.ends)
    torch.testing.assert_close(found, scores(model, rows), rtol=1e-5, atol=1e-6)


def test_the_saved_folder_scores_alike_under_transformers_own_forward(
    reward_model, columns, tmp_path
) -> None:
    model, rows = reward_model(), columns["chosen_ids"]
    model.save_pretrained(tmp_path)
    again = LlamaForSequenceClassification.from_pretrained(tmp_path)
    longest = max(len(row) for row in rows)
    ids = torch.tensor([row + [again.config.pad_token_id] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    with torch.no_grad():
        theirs = again(input_ids=ids, attention_mask=mask).logits.squeeze(-1)
    torch.testing.assert_close(theirs, scores(model, rows), rtol=1e-5, atol=1e-6)
