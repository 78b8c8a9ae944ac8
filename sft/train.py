"""The `sft` stage: dialogues in, chat model out."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

from llama2_chat.chat_format import build_chat_format
from llama2_chat.jsonl import read_dialogues
from llama2_chat.model_card import model_card
from llama2_chat.models import load_policy, save_model, seed_everything
from llama2_chat.settings import RunSettings
from llama2_chat.sft.config import SftConfig
from llama2_chat.sft.trainer import train_sequences
from llama2_chat.stage import StageDirectory
from llama2_chat.tokenization import tokenize_dialogues
from llama2_chat.tokenizers import load_tokenizer


def run_stage(config: SftConfig, settings: RunSettings, directory: StageDirectory) -> dict[str, Any]:
    """Fine-tune `config.model` on the answers in `config.dialogues` and write `model/`.

    Returns:
        Metrics of the run, with what the length policy shortened and dropped.
    """
    gguf_file = settings.gguf_file_of(config.model)
    tokenizer = load_tokenizer(config.model, gguf_file)
    dialogues = chain.from_iterable(read_dialogues(Path(file)) for file in config.dialogues)
    sequences, lengths = tokenize_dialogues(
        dialogues,
        build_chat_format(settings.chat_format, tokenizer),
        config.loss_policy,
        config.training.sequence_length,
    )
    seed_everything(settings.seed)
    model = load_policy(config.model, settings, gguf_file=gguf_file)
    metrics = train_sequences(
        model,
        sequences,
        training=config.training,
        settings=settings,
        directory=directory,
        padding_id=tokenizer.padding_id,
        description=f"{directory.path.name}: sft",
    )
    save_model(model, tokenizer, directory.model, settings=settings, card=model_card("sft", config, settings))
    return {"lengths": lengths.to_row(), **metrics}
