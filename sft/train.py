"""The `sft` stage: dialogues in, chat model out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from llama2_chat.chat_format import ChatFormat, build_chat_format
from llama2_chat.dialogue import Dialogue
from llama2_chat.errors import UserInputError
from llama2_chat.jsonl import read_dialogues
from llama2_chat.model_card import model_card
from llama2_chat.models import load_policy, save_model, seed_everything
from llama2_chat.packing import pack
from llama2_chat.settings import RunSettings
from llama2_chat.sft.config import SftConfig
from llama2_chat.sft.held_out import HeldOut, Questions, questions_of
from llama2_chat.sft.mixing import mix
from llama2_chat.sft.trainer import train_sequences
from llama2_chat.stage import StageDirectory
from llama2_chat.tokenization import LengthReport, tokenize_dialogues
from llama2_chat.tokenizers import load_tokenizer


def run_stage(config: SftConfig, settings: RunSettings, directory: StageDirectory) -> dict[str, Any]:
    """Fine-tune `config.model` on the answers in `config.dialogues` and write `model/`.

    Returns:
        Metrics of the run, with the `mix` of the files, what the length policy shortened and dropped, and under
        `held_out` the loss on `config.held_out` before and after.
    """
    gguf_file = settings.gguf_file_of(config.model)
    tokenizer = load_tokenizer(config.model, gguf_file)
    chat_format = build_chat_format(settings.chat_format, tokenizer)
    length = config.training.sequence_length

    dialogues, parts = mix(config.dialogues, config.weights, settings.seed)
    sequences, lengths = tokenize_dialogues(dialogues, chat_format, config.loss_policy, length)
    unseen = list(chain.from_iterable(read_dialogues(Path(file)) for file in config.held_out))
    held_out, unseen_lengths = _held_out(config, unseen, chat_format, tokenizer.padding_id, directory)
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
        held_out=held_out,
    )
    if held_out is not None:
        metrics["held_out"]["lengths"] = unseen_lengths.to_row()
    save_model(model, tokenizer, directory.model, settings=settings, card=model_card("sft", config, settings))
    return {"mix": [part.to_row() for part in parts], "lengths": lengths.to_row(), **metrics}


def _held_out(
    config: SftConfig,
    dialogues: Sequence[Dialogue],
    chat_format: ChatFormat,
    padding_id: int,
    directory: StageDirectory,
) -> tuple[HeldOut | None, LengthReport]:
    """What the model is measured on, each dialogue for itself; None where nothing is held out.

    Raises:
        UserInputError: they hold no answer that the loss policy selects.
    """
    length = config.training.sequence_length
    tokenized, lengths = tokenize_dialogues(dialogues, chat_format, config.loss_policy, length)
    if not config.held_out:
        return None, lengths
    if not any(any(dialogue.loss_mask) for dialogue in tokenized):
        raise UserInputError(
            f"held_out: no answer to measure; the loss policy selects nothing in the {len(tokenized)} dialogues "
            f"that fit into {length} tokens"
        )
    questions = Questions(
        questions_of(dialogues, config.sample_prompts), chat_format, padding_id, directory.answers
    )
    held_out = HeldOut(
        pack(tokenized, length),
        padding_id,
        every=config.evaluation_steps,
        questions=questions if config.sample_prompts else None,
    )
    return held_out, lengths
