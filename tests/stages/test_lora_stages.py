"""Stages that train an adapter: their model folder is whole, the adapter lies beside it."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from llama2_chat import RewardScorer
from llama2_chat.models import reward_model_from_policy
from llama2_chat.rejection_sampling import build
from llama2_chat.reward.config import RewardConfig
from llama2_chat.reward.train import run_stage as run_reward
from llama2_chat.sft.config import SftConfig
from llama2_chat.sft.train import run_stage as run_sft

IDS = torch.tensor([[1, 20, 33, 48, 5, 2]])
LORA_TRAINING = {
    "learning_rate": 1e-2,
    "batch_size": 8,
    "epochs": 2,
    "sequence_length": 128,
    "lora": {"rank": 8},
}


@pytest.fixture(scope="module")
def adapted_sft(world: Path, settings, stage_at):
    config = SftConfig(
        model=str(world / "base"), dialogues=[str(world / "demonstrations.jsonl")], training=LORA_TRAINING
    )
    directory = stage_at("sft-lora")
    return directory, run_sft(config, settings, directory)


def test_the_model_folder_loads_alone_and_equals_base_and_adapter(adapted_sft, world: Path) -> None:
    directory, metrics = adapted_sft
    assert metrics["loss_last"] < metrics["loss_first"]
    assert not list(directory.model.glob("adapter*"))
    whole = AutoModelForCausalLM.from_pretrained(directory.model)
    base = AutoModelForCausalLM.from_pretrained(world / "base")
    plain = base(input_ids=IDS).logits
    adapted = peft.PeftModel.from_pretrained(base, directory.adapter)
    torch.testing.assert_close(
        whole(input_ids=IDS).logits, adapted(input_ids=IDS).logits, rtol=1e-4, atol=1e-5
    )
    assert (whole(input_ids=IDS).logits - plain).abs().max() > 0.1


def test_the_adapter_names_its_base_by_the_way_there(adapted_sft, world: Path) -> None:
    directory, _ = adapted_sft
    named = json.loads((directory.adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert not Path(named).is_absolute()
    assert (directory.adapter / named).resolve() == (world / "base").resolve()


def test_a_reward_model_trains_its_head_in_full(adapted_sft, world: Path, settings, stage_at) -> None:
    sft, directory = adapted_sft[0], stage_at("reward-lora")
    config = RewardConfig(
        model=str(sft.model),
        preferences=[str(world / "helpful_pairs.jsonl")],
        held_out=[str(world / "held_out.jsonl")],
        domain="helpfulness",
        training={**LORA_TRAINING, "learning_rate": 3e-3, "batch_size": 16, "epochs": 6},
    )
    metrics = run_reward(config, settings, directory)
    assert metrics["loss_last"] < metrics["loss_first"]
    whole = AutoModelForSequenceClassification.from_pretrained(directory.model)
    start = reward_model_from_policy(str(sft.model), settings)
    assert whole.config.num_labels == 1
    assert not torch.equal(whole.score.weight, start.score.weight)
    adapted = peft.PeftModel.from_pretrained(start, directory.adapter)
    torch.testing.assert_close(
        whole(input_ids=IDS).logits, adapted(input_ids=IDS).logits, rtol=1e-4, atol=1e-5
    )
    scorer = RewardScorer.from_pretrained(directory.model, device="cpu")
    assert scorer.helpfulness.score_tokens([IDS[0].tolist()]).shape == (1,)


def test_a_data_maker_fine_tunes_an_adapter(rejection, rejection_config, settings, stage_at) -> None:
    directory = stage_at("rejection-lora")
    metrics = build.run_stage(rejection_config(training=LORA_TRAINING), settings, directory)
    assert directory.samples.read_bytes() == rejection[0].samples.read_bytes()
    assert metrics["loss_last"] < metrics["loss_first"]
    assert (directory.adapter / "adapter_model.safetensors").is_file()
    assert AutoModelForCausalLM.from_pretrained(directory.model).num_parameters() > 0
