"""Reward training: its loss, what it does to accuracy, and that batching and padding change nothing."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import LlamaForSequenceClassification

from llama2_chat.dialogue import Message, Preference
from llama2_chat.reward.config import RewardTraining
from llama2_chat.reward.data import collate_pairs, training_columns
from llama2_chat.reward.pooling import pack_dialogues, pool_at_ends, row_layout, scores_at_ends, unpool
from llama2_chat.reward.trainer import MarginRewardTrainer, reward_arguments
from llama2_chat.training import placeholder_tokenizer, run_trainer


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


def train(
    model, columns, settings, directory, *, safety_weight=0.0, centering=0.0, collate=collate_pairs, **changes
):
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
        args=reward_arguments(training, settings, directory.checkpoints, count),
        train_dataset=Dataset.from_dict(columns),
        data_collator=lambda rows: collate(rows, 0, row_layout(model)),
        processing_class=placeholder_tokenizer(0),
        safety_weight=safety_weight,
        centering=centering,
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


def row_by_row(chosen: float, rejected: float, row: dict[str, float], centering: float) -> float:
    """The pair's part of the loss, but for the safety classification."""
    gap = chosen - rejected - row["margin"]
    return math.log1p(math.exp(-gap)) + centering * (chosen + rejected) ** 2


@pytest.mark.parametrize("centering", [0.0, 0.3])
@pytest.mark.parametrize("unlabelled", [[], [0], [0, 1, 2, 3], list(range(12))])
def test_the_logged_loss_is_the_sum_over_rows_whichever_lack_a_rating_or_a_label(
    reward_model, columns, settings, stage_directory, unlabelled: list[int], centering: float
) -> None:
    """The named rows have neither rating nor label; the first of a batch, some, or all; the others keep theirs."""
    ratings = ["significantly_better", "better", "slightly_better", "negligibly_better"]
    prompt = (Message("user", "q"),)
    pairs = [
        Preference(prompt, "x", "y")
        if number in unlabelled
        else Preference(prompt, "x", "y", ratings[number % 4], number % 3 > 0 or None, number % 2 > 0)
        for number in range(12)
    ]
    tokens = list(zip(columns["chosen_ids"][:12], columns["rejected_ids"][:12], strict=True))
    made = training_columns(pairs, tokens, margin_table="large")
    model = reward_model()
    chosen, rejected = (scores(model, made[f"{side}_ids"]).tolist() for side in ("chosen", "rejected"))
    total, classified = 0.0, []
    for number in range(12):
        row = {name: made[name][number] for name in ("margin", "chosen_safe", "rejected_safe")}
        assert row["margin"] == pytest.approx(0.0 if number in unlabelled else [3, 2, 1, 0][number % 4])
        total += row_by_row(chosen[number], rejected[number], row, centering)
        for score, label in ((chosen[number], row["chosen_safe"]), (rejected[number], row["rejected_safe"])):
            if label >= 0:
                classified.append(math.log1p(math.exp(-score if label else score)))
    expected = total / 12 + 0.7 * (sum(classified) / len(classified) if classified else 0.0)
    directory = stage_directory()
    logged = train(
        model, made, settings, directory, batch_size=12, micro_batch_size=4, safety_weight=0.7, centering=centering
    )  # fmt: skip
    assert len(logged) == 1
    assert logged[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_centering_brings_the_scores_to_zero(reward_model, columns, settings, stage_directory) -> None:
    """From a head that scores everything high: the ranking loss alone leaves the level where it is."""
    level = {}
    rows = columns["chosen_ids"] + columns["rejected_ids"]
    for centering in (0.0, 1.0):
        model = reward_model()
        with torch.no_grad():
            last = [model.model(torch.tensor([row])).last_hidden_state[0, -1] for row in rows]
            model.score.weight.copy_(torch.stack(last).mean(0, keepdim=True))
        assert scores(model, rows).mean() > 5
        train(model, columns, settings, stage_directory(str(centering)), epochs=10, centering=centering)
        chosen, rejected = scores(model, columns["chosen_ids"]), scores(model, columns["rejected_ids"])
        assert (chosen > rejected).float().mean() > 0.9
        level[centering] = (chosen + rejected).square().mean().item()
    assert level[0.0] > 25
    assert level[1.0] < 0.1


def test_pairs_are_shuffled(reward_model, columns, settings, stage_directory) -> None:
    """Pairs that lie file after file in the data set come mixed: no batch of one file alone."""
    columns["margin"] = [0.0] * 30 + [1.0] * 30  # tells the file
    seen = []

    def collate(rows, padding_id, layout):
        seen.append([row["margin"] for row in rows])
        return collate_pairs(rows, padding_id, layout)

    train(reward_model(), columns, settings, stage_directory(), collate=collate)
    assert len(seen) == 5
    assert sum(sum(batch) for batch in seen) == 30
    assert all(0 < sum(batch) < 12 for batch in seen)


def test_optimiser_and_rates_are_the_papers(
    reward_model, columns, settings, stage_directory, monkeypatch
) -> None:
    """With the stage's defaults over 60 steps: what AdamW really steps with, and what gradients are clipped to."""
    stepped: list[list[dict]] = []
    clipped = []
    step, clip = torch.optim.AdamW.step, Accelerator.clip_grad_norm_

    def recording_step(self, *args, **kwargs):
        stepped.append(
            [{name: group[name] for name in group if name != "params"} for group in self.param_groups]
        )
        return step(self, *args, **kwargs)

    def recording_clip(self, parameters, max_norm, *args, **kwargs):
        clipped.append(max_norm)
        return clip(self, parameters, max_norm, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", recording_step)
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", recording_clip)
    defaults = RewardTraining()
    assert (defaults.batch_size, defaults.epochs, defaults.learning_rate) == (512, 1.0, 1e-5)
    logged = train(
        reward_model(),
        columns,
        settings,
        stage_directory(),
        **(defaults.model_dump(exclude={"batch_size", "checkpoint_steps"}) | {"batch_size": 1}),
    )
    assert len(logged) == len(stepped) == 60
    # 3 % of 60 steps is 2, so the minimum of 5 holds; after it a cosine that ends at a tenth.
    expected = [
        1e-5 * done / 5 if done < 5 else 1e-5 * (0.1 + 0.9 * (1 + math.cos(math.pi * (done - 5) / 55)) / 2)
        for done in range(60)
    ]
    for rate, groups in zip(expected, stepped, strict=True):
        assert [group["lr"] for group in groups] == pytest.approx([rate] * len(groups), rel=1e-9, abs=1e-20)
        assert all(group["betas"] == (0.9, 0.95) and group["eps"] == 1e-5 for group in groups)
        assert sorted(group["weight_decay"] for group in groups) == [0.0, 0.1]  # norms do not decay
    assert [row["learning_rate"] for row in logged] == pytest.approx(expected, rel=1e-9, abs=1e-20)
    assert clipped == [1.0] * 60


@pytest.mark.parametrize("centering", [0.0, 0.3])
@pytest.mark.parametrize("safety_weight", [0.0, 0.7])
def test_equivalence_of_accumulated_and_one_batch(
    reward_model, columns, settings, stage_directory, safety_weight, centering
) -> None:
    """Micro-batches of 4 against one batch: losses of every step and weights."""
    whole, parts = reward_model(), reward_model()
    weights = {"safety_weight": safety_weight, "centering": centering}
    a = train(whole, columns, settings, stage_directory("whole"), **weights)
    b = train(parts, columns, settings, stage_directory("parts"), micro_batch_size=4, **weights)
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
