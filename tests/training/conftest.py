"""A Llama small enough to train in a second, and the settings around it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llama2_chat.settings import BaseModelSource, RunSettings
from llama2_chat.stage import EventLog, StageDirectory
from llama2_chat.tokenization import TokenizedDialogue

torch.set_num_threads(1)  # these models are too small to share between threads

VOCABULARY = 50
STOP = 2


@pytest.fixture
def settings() -> RunSettings:
    return RunSettings(base_model=BaseModelSource(path="unused"), seed=3, device="cpu")


@pytest.fixture
def tiny_llama():
    """A function that makes the same randomly initialised model at every call."""

    def make(attention: str = "sdpa") -> LlamaForCausalLM:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            bos_token_id=1,
            eos_token_id=STOP,
        )
        return LlamaForCausalLM._from_config(config, attn_implementation=attention).eval()

    return make


@pytest.fixture
def stage_directory(tmp_path: Path):
    """A function that makes a stage's folder by name."""

    def make(name: str = "stage") -> StageDirectory:
        path = tmp_path / name
        path.mkdir(parents=True, exist_ok=True)
        return StageDirectory(path, EventLog(path / "events.jsonl"))

    return make


@pytest.fixture
def dialogues() -> list[TokenizedDialogue]:
    """Forty dialogues: a prompt that is not trained, then an answer that is."""
    rng = random.Random(0)
    made = []
    for _ in range(40):
        prompt = [1] + [rng.randrange(3, VOCABULARY) for _ in range(rng.randrange(2, 9))]
        answer = [rng.randrange(3, 8) for _ in range(rng.randrange(1, 7))] + [STOP]
        made.append(TokenizedDialogue(prompt + answer, [False] * len(prompt) + [True] * len(answer)))
    return made
