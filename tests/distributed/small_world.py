"""A model, dialogues and a configuration small enough for two processes to train in a second."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from llama2_chat.jsonl import write_rows
from llama2_chat.pretrain.tokenizer import train_tokenizer

WORDS = ("red", "green", "blue", "one", "two", "three", "over", "under", "cat", "dog")


def make_world(folder: Path, *, tied: bool = False) -> Path:
    """Write a base model, dialogues of very unequal lengths and `config.yaml`; returns the configuration."""
    rng = random.Random(0)

    def words(most: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, most)))

    rows = []
    for _ in range(45):
        messages = []
        for _ in range(rng.randint(1, 3)):
            messages += [{"role": "user", "content": words(9)}, {"role": "assistant", "content": words(12)}]
        rows.append({"messages": messages})
    write_rows(folder / "dialogues.jsonl", rows[:36])
    write_rows(folder / "held_out.jsonl", rows[36:])
    tokenizer = train_tokenizer([words(40) for _ in range(300)], 300)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            initializer_range=0.1,
            tie_word_embeddings=tied,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    config: dict[str, Any] = {
        "kind": "sft",
        "base_model": "base",
        "device": "cpu",
        "seed": 3,
        "dialogues": ["dialogues.jsonl"],
        "held_out": ["held_out.jsonl"],
        "evaluation_steps": 2,
        "sample_prompts": 1,
        "report_to": ["tensorboard"],
        "training": {
            "learning_rate": 0.002,
            "batch_size": 8,
            "epochs": 2,
            "sequence_length": 96,
            "checkpoint_steps": 3,
        },
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return file
