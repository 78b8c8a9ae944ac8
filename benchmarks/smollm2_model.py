"""SmolLM2-135M-Instruct and HH-RLHF as the benchmarks read them: where they lie, and what is said where they do not."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from transformers import PreTrainedModel

from llama2_chat.chat_format import ChatFormat, build_chat_format
from llama2_chat.models import load_policy
from llama2_chat.settings import BaseModelSource, RunSettings
from llama2_chat.tokenizers import ChatTokenizer, load_tokenizer

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def model_folder() -> Path:
    """The folder `make smollm2-135m` fills, in LLAMA2_CHAT_MODELS (default `models`)."""
    return Path(os.environ.get("LLAMA2_CHAT_MODELS", "models")) / "smollm2-135m"


def hh_rlhf(name: str) -> Path:
    """The file `NAME-base.jsonl.gz` in LLAMA2_CHAT_DATA; ends the process where it or the model is missing."""
    data = Path(os.environ.get("LLAMA2_CHAT_DATA", "../shared/data")) / "hh-rlhf" / f"{name}-base.jsonl.gz"
    if not data.exists() or not (model_folder() / GGUF).exists():
        sys.exit(f"needs {data} and {model_folder() / GGUF}; see the head of {Path(sys.argv[0]).name}")
    return data


def load_chat_format() -> tuple[ChatFormat, ChatTokenizer]:
    """The model's own chat template, and its tokenizer."""
    tokenizer = load_tokenizer(str(model_folder()), GGUF)
    return build_chat_format("tokenizer", tokenizer), tokenizer


def load_model() -> PreTrainedModel:
    """The model itself on the CPU, float32."""
    source = BaseModelSource(path=str(model_folder()), gguf_file=GGUF)
    settings = RunSettings(base_model=source, chat_format="tokenizer", device="cpu")
    return load_policy(model_folder(), settings, gguf_file=GGUF)
