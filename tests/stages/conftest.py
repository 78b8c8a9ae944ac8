"""A complete small model folder made from nothing: its own tokenizer and a random Llama."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llama2_chat.jsonl import write_rows
from llama2_chat.models import save_model
from llama2_chat.pretrain.tokenizer import train_tokenizer
from llama2_chat.settings import BaseModelSource, RunSettings
from llama2_chat.stage import EventLog, StageDirectory
from llama2_chat.testbed.generators import GENERATORS
from llama2_chat.tokenizers import HuggingFaceTokenizer

torch.set_num_threads(1)  # these models are too small to share between threads


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base/` (a random model) and testbed data files."""
    folder = tmp_path_factory.mktemp("world")
    texts = [row["text"] for row in GENERATORS["pretraining_text"](rows=1500, seed=0)]
    tokenizer = HuggingFaceTokenizer(train_tokenizer(texts, 600))
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            bos_token_id=tokenizer.bos_id,
            eos_token_id=tokenizer.eos_id,
        )
    )
    settings = RunSettings(base_model=BaseModelSource(path=str(folder / "base")), device="cpu")
    save_model(model, tokenizer, folder / "base", settings=settings, card="")
    write_rows(folder / "demonstrations.jsonl", GENERATORS["demonstrations"](rows=300, seed=0))
    write_rows(folder / "helpful_pairs.jsonl", GENERATORS["preferences"](rows=300, seed=0))
    write_rows(folder / "safety_pairs.jsonl", GENERATORS["preferences"](rows=300, seed=0, domain="safety"))
    write_rows(folder / "held_out.jsonl", GENERATORS["preferences"](rows=200, seed=0, split="held_out"))
    write_rows(folder / "prompts.jsonl", GENERATORS["prompts"](rows=300, seed=0))
    return folder


@pytest.fixture(scope="session")
def settings(world: Path) -> RunSettings:
    return RunSettings(base_model=BaseModelSource(path=str(world / "base")), seed=1, device="cpu")


@pytest.fixture(scope="session")
def stage_at(tmp_path_factory: pytest.TempPathFactory):
    """A function that makes a stage's folder by name."""
    root = tmp_path_factory.mktemp("stages")

    def make(name: str) -> StageDirectory:
        path = root / name
        path.mkdir(exist_ok=True)
        return StageDirectory(path, EventLog(path / "events.jsonl"))

    return make
