"""Two tiny random policies and a random reward model, alone and as a run; nothing is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from fake_runs import cli  # noqa: F401
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from llama2_chat.models import save_model
from llama2_chat.pretrain.tokenizer import train_tokenizer
from llama2_chat.settings import BaseModelSource, RunSettings
from llama2_chat.testbed.generators import GENERATORS
from llama2_chat.tokenizers import HuggingFaceTokenizer

POLICIES = ("base", "sft", "v1")
MAX_TOKENS = 96


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two policies, a helpfulness and a safety reward model; `ppo` has not run yet."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("chat")
    texts = [row["text"] for row in GENERATORS["pretraining_text"](rows=400, seed=0)]
    tokenizer = HuggingFaceTokenizer(train_tokenizer(texts, 400))
    config = {
        "vocab_size": tokenizer.vocab_size,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.padding_id,
    }
    settings = RunSettings(base_model=BaseModelSource(path="base"), device="cpu")
    places = {
        "base": folder / "base",
        "sft": folder / "run/stages/01-sft/model",
        "helpfulness_rm": folder / "run/stages/02-helpfulness_rm/model",
        "safety_rm": folder / "run/stages/03-safety_rm/model",
        "v1": folder / "run/stages/04-v1/model",
    }
    for seed, (name, place) in enumerate(places.items()):
        torch.manual_seed(seed)
        if name.endswith("_rm"):
            model = LlamaForSequenceClassification(LlamaConfig(**config, num_labels=1))
        else:
            model = LlamaForCausalLM(LlamaConfig(**config))
        save_model(model, tokenizer, place, settings=settings, card="")
    recipe = {
        "name": "small",
        "seed": 0,
        "base_model": {"path": str(folder / "base"), "gguf_file": None},
        "chat_format": "llama2",
        "precision": "float32",
        "device": "cuda",
        "stages": {
            "sft": {"kind": "sft"},
            "helpfulness_rm": {"kind": "reward", "domain": "helpfulness"},
            "safety_rm": {"kind": "reward", "domain": "safety"},
            "v1": {"kind": "rejection_sampling"},
            "ppo": {"kind": "ppo"},
        },
        "evaluation": {"helpfulness": "helpfulness_rm", "safety": "safety_rm", "safety_threshold": 0.2},
    }
    (folder / "run" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "run"
