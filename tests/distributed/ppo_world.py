"""A policy, two reward models, prompts and a configuration small enough for two processes to do PPO in a second."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
import yaml
from small_world import WORDS, make_world
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForSequenceClassification

from llama2_chat.jsonl import write_rows
from llama2_chat.tokenizers import load_tokenizer

SAMPLING = {"max_new_tokens": 20, "temperature": 1.0}


def make_ppo_world(folder: Path, *, tied: bool = False, **training: Any) -> Path:
    """Write what PPO starts from and `ppo.yaml`; returns the configuration.

    The end token's row of the head lies along the mean state, so that some responses come to their end.
    """
    make_world(folder, tied=tied)
    policy = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    with torch.no_grad():
        states = policy.base_model(torch.randint(3, 300, (8, 40))).last_hidden_state
        mean = states.mean((0, 1))
        policy.get_output_embeddings().weight[2] = 2.0 * mean / mean.square().sum()
    policy.save_pretrained(folder / "base")
    tokenizer = load_tokenizer(folder / "base")
    for number, name in enumerate(("helpfulness", "safety")):
        torch.manual_seed(number)
        config = AutoConfig.from_pretrained(folder / "base", num_labels=1, pad_token_id=0)
        config.tie_word_embeddings = False
        LlamaForSequenceClassification(config).save_pretrained(folder / name)
        tokenizer.save(folder / name)
    rng = random.Random(0)
    texts = [" ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 12))) for _ in range(14)]
    rows = [
        {"prompt": [{"role": "user", "content": text}], "is_safety": number % 4 == 0}
        for number, text in enumerate([*texts, texts[0]])
    ]
    write_rows(folder / "prompts.jsonl", rows)
    write_rows(
        folder / "unseen_prompts.jsonl",
        [{"prompt": [{"role": "user", "content": f"{text} {texts[0]}"}]} for text in texts[:5]],
    )
    config_file = folder / "ppo.yaml"
    values = {
        "kind": "ppo",
        "base_model": "base",
        "policy": "base",
        "helpfulness": "helpfulness",
        "safety": "safety",
        "prompts": ["prompts.jsonl"],
        "held_out": ["unseen_prompts.jsonl"],
        "evaluation_iterations": 2,
        "device": "cpu",
        "seed": 3,
        "sampling": SAMPLING,
        "kl_coefficient": 0.05,
        "kl_target": 0.5,
        "kl_horizon": 100,
        "whiten_scores": "running",
        "training": {
            "iterations": 3,
            "batch_size": 15,
            "mini_batch_size": 5,
            "epochs_per_batch": 2,
            "learning_rate": 1e-3,
            **training,
        },
    }
    config_file.write_text(yaml.safe_dump(values))
    return config_file
