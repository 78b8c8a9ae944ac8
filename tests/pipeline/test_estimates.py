"""Estimates of the plan, worked out by hand."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path

import pytest

from llama2_chat.ghost_attention.config import GhostAttentionConfig
from llama2_chat.pipeline.estimates import (
    data_size,
    estimate_stage,
    format_bytes,
    named_parameter_count,
    parameter_count,
)
from llama2_chat.ppo.config import PpoConfig
from llama2_chat.rejection_sampling.config import RejectionSamplingConfig
from llama2_chat.safety.config import ContextDistillationConfig
from llama2_chat.sft.config import SftConfig

EPOCHS = {"epochs": 2.0}


def needs(config, *, parameters: int | None = 10, tokens: float = 100.0, rows: float = 4.0):
    return estimate_stage(config, parameters, tokens, rows, flops=1.0)


def test_training_counts_six_operations_a_parameter_and_token() -> None:
    need = estimate_stage(SftConfig(dialogues=["d"], training=EPOCHS), 1_000, 500.0, 9.0, flops=1e6)
    assert need.seconds == pytest.approx(6 * 1_000 * 500 * 2 / 1e6, rel=1e-12)
    assert need.memory == 16 * 1_000
    assert need.disk == 4 * 1_000 + 2 * 12 * 1_000  # the model and two checkpoints' moments and weights


def test_an_adapter_needs_no_gradients_of_the_weights() -> None:
    need = needs(SftConfig(dialogues=["d"], training=EPOCHS | {"lora": {"rank": 4}}))
    assert need.seconds == pytest.approx(4 * 10 * 100 * 2, rel=1e-12)
    assert (need.memory, need.disk) == (4 * 10, 4 * 10)
    alone = needs(SftConfig(dialogues=["d"], training=EPOCHS | {"lora": {"rank": 4, "save": "adapter_only"}}))
    assert (alone.memory, alone.disk) == (4 * 10, 0)


def test_a_step_limit_caps_the_trained_tokens() -> None:
    training = {"epochs": 1, "max_steps": 2, "batch_size": 3, "sequence_length": 8}
    assert needs(SftConfig(dialogues=["d"], training=training)).seconds == pytest.approx(6 * 10 * 2 * 3 * 8)


@pytest.mark.parametrize(("safety", "models"), [(None, 2), ("s", 3)])
def test_rejection_sampling_adds_k_answers_of_each_model(safety: str | None, models: int) -> None:
    config = RejectionSamplingConfig(
        policy="p", helpfulness="h", safety=safety, prompts=["d"], samples_per_prompt=8, training=EPOCHS
    )
    assert needs(config).seconds == pytest.approx(6 * 10 * 100 * 2 + models * 2 * 10 * 100 * 8, rel=1e-12)


def test_ppo_with_adapters_holds_what_stands_still_once() -> None:
    def memory(lora: bool = True, **changes) -> float | None:
        training = {"lora": {"rank": 4}} if lora else {}
        given = {"policy": "p", "helpfulness": "h", "prompts": ["d"], "training": training, **changes}
        return needs(PpoConfig(**given)).memory

    # Ten parameters of four bytes: the policy, its merged copy, the reward model.
    assert memory() == 3 * 40
    assert memory(safety="s", reference="p", value="h") == 4 * 40
    assert memory(reference="r") == memory(value="v") == 4 * 40
    assert memory(value_head="shared") == 3 * 40
    # Without an adapter 16 bytes of what is trained: one trunk; reference and reward model beside it.
    assert memory(lora=False, value_head="shared") == 160 + 2 * 40


def test_ppo_holds_four_models_or_five_and_trains_two_of_them() -> None:
    values = {"policy": "p", "helpfulness": "h", "prompts": ["d"]}
    training = {"iterations": 3, "batch_size": 8, "mini_batch_size": 4}
    need = needs(PpoConfig(**values, training=training))
    assert need.memory == (16 + 16 + 4 + 4) * 10
    # 24 responses to prompts of 25 tokens: sampled, compared, valued, scored; then two models learn from them.
    assert need.seconds == pytest.approx(24 * 25 * 10 * (2 * 4 + 2 * 6), rel=1e-12)
    assert needs(PpoConfig(**values, safety="s", training=training)).memory == (16 + 16 + 4 + 4 + 4) * 10


def test_a_ppo_that_is_judged_holds_the_independent_model_and_keeps_the_best_policy() -> None:
    values = {"policy": "p", "helpfulness": "h", "prompts": ["d"], "held_out": ["o"]}
    training = {"iterations": 3, "batch_size": 8, "mini_batch_size": 4}
    alone = needs(PpoConfig(**values, keep="last", training=training))
    judged = needs(PpoConfig(**values, independent="i", training=training))
    assert judged.memory == (16 + 16 + 4 + 4 + 4) * 10
    assert alone.disk is not None
    assert judged.disk == alone.disk + 4 * 10


def test_a_custom_reward_is_no_model_to_hold() -> None:
    values = {
        "policy": "p",
        "prompts": ["d"],
        "training": {"iterations": 3, "batch_size": 8, "mini_batch_size": 4},
    }
    custom = {"callable": "my_rewards:brevity"}
    assert needs(PpoConfig(**values, helpfulness=custom)).memory == (16 + 16 + 4) * 10
    assert needs(PpoConfig(**values, helpfulness=custom, safety="s")).memory == (16 + 16 + 4 + 4) * 10


def test_ghost_attention_samples_and_trains_each_dialogue() -> None:
    config = GhostAttentionConfig(policy="p", dialogues=["d"], instructions=["i"], training=EPOCHS)
    assert needs(config).seconds == pytest.approx((2 + 6 * 2) * 10 * 100, rel=1e-12)


@pytest.mark.parametrize(("keep", "trained"), [("better", 0), ("all", 6 * 2)])
def test_context_distillation_answers_and_scores_each_prompt_twice(keep: str, trained: int) -> None:
    config = ContextDistillationConfig(policy="p", safety="s", prompts=["d"], keep=keep, training=EPOCHS)
    assert needs(config).seconds == pytest.approx((2 * (2 + 2) + trained) * 10 * 100, rel=1e-12)


def test_comparing_preprompts_takes_one_more_answer() -> None:
    config = ContextDistillationConfig(
        policy="p", safety="s", prompts=["d"], compare_preprompts=True, training=EPOCHS
    )
    assert needs(config).seconds == pytest.approx(3 * (2 + 2) * 10 * 100, rel=1e-12)


def test_unknown_stays_unknown() -> None:
    config = SftConfig(dialogues=["d"])
    need = needs(config, parameters=None)
    assert (need.memory, need.disk, need.seconds) == (None, None, None)
    assert needs(config, tokens=0.0).seconds is None


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("meta-llama/Llama-2-7b-hf", 7_000_000_000),
        ("codellama/CodeLlama-34b-hf", 34_000_000_000),
        ("/models/Llama-2-70b", 70_000_000_000),
        ("SmolLM2-135M-Instruct.Q4_1.gguf", 135_000_000),
        ("/runs/7b/base", None),
        ("mixtral-8x7b", None),
        ("stories260K", None),
    ],
)
def test_a_size_is_read_from_a_name(name: str, parameters: int | None) -> None:
    assert named_parameter_count(name) == parameters


def test_parameters_are_read_from_the_heads_of_the_files(tmp_path: Path) -> None:
    assert parameter_count(tmp_path) is None
    for name, shape in (("a", [3, 5]), ("b", [7])):
        header = json.dumps(
            {"__metadata__": {}, name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}
        ).encode()
        (tmp_path / f"{name}.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert parameter_count(tmp_path) == 22


def test_tokens_and_rows_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "small.jsonl").write_bytes(b"x" * 49 + b"\n" + b"x" * 49 + b"\n")
    assert data_size(tmp_path / "small.jsonl") == (pytest.approx(30.0, rel=1e-12), 2)
    (tmp_path / "large.jsonl").write_bytes((b"x" * 9 + b"\n") * 5000)
    assert data_size(tmp_path / "large.jsonl") == (pytest.approx(15_000.0, rel=1e-12), pytest.approx(5000))
    with gzip.open(tmp_path / "small.jsonl.gz", "wb") as stream:
        stream.write((b"x" * 9 + b"\n") * 40)
    assert data_size(tmp_path / "small.jsonl.gz") == (pytest.approx(120.0, rel=1e-12), 40)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "unknown"), (12, "12 B"), (1536, "1.5 KiB"), (3 * 2**30, "3.0 GiB"), (2**41, "2.0 TiB")],
)
def test_sizes_as_text(value: float | None, text: str) -> None:
    assert format_bytes(value) == text
