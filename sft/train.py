"""The `sft` stage: dialogues in, chat model out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from llama2_chat.chat_format import build_chat_format
from llama2_chat.errors import UserInputError
from llama2_chat.jsonl import read_dialogues
from llama2_chat.model_card import model_card
from llama2_chat.models import load_policy, save_model, seed_everything
from llama2_chat.packing import pack
from llama2_chat.settings import RunSettings
from llama2_chat.sft.config import SftConfig
from llama2_chat.sft.data import EncodedFile, encode_file, lengths_of, sequences_of
from llama2_chat.sft.held_out import HeldOut, Questions, questions_of
from llama2_chat.sft.mixing import mix
from llama2_chat.sft.trainer import train_sequences
from llama2_chat.stage import StageDirectory
from llama2_chat.tokenizers import load_tokenizer


def run_stage(config: SftConfig, settings: RunSettings, directory: StageDirectory) -> dict[str, Any]:
    """Fine-tune `config.model` on the answers in `config.dialogues` and write `model/`.

    Returns:
        Metrics of the run, with the `mix` of the files and what the length policy shortened and dropped, of each file
        and in all (`lengths`), and under `held_out` the loss on `config.held_out` before and after.
    """
    gguf_file = settings.gguf_file_of(config.model)
    tokenizer = load_tokenizer(config.model, gguf_file)
    chat_format = build_chat_format(settings.chat_format, tokenizer)
    length = config.training.sequence_length

    parts = mix(config.dialogues, weights=config.weights, counts=config.counts, seed=settings.seed)
    encode = partial(encode_file, chat_format=chat_format, loss_policy=config.loss_policy, max_tokens=length)
    trained = [encode(part.file, part.used) for part in parts]
    held_out_dialogues = [list(read_dialogues(Path(file))) for file in config.held_out]
    unseen = [
        encode(file, dialogues) for file, dialogues in zip(config.held_out, held_out_dialogues, strict=True)
    ]
    for file in (*trained, *unseen):
        file.announce(directory)
    if not any(file.trained_tokens for file in trained):
        raise UserInputError(
            f"dialogues: nothing to train on; in the {len(sequences_of(trained))} dialogues that fit into "
            f"training.sequence_length ({length}) the loss policy selects no answer"
        )
    questions = Questions(
        questions_of(chain.from_iterable(held_out_dialogues), config.sample_prompts, chat_format, length),
        chat_format,
        tokenizer.padding_id,
        directory.answers,
    )
    held_out = _held_out(config, unseen, questions) if unseen else None
    seed_everything(settings.seed)
    model = load_policy(config.model, settings, gguf_file=gguf_file)
    metrics = train_sequences(
        model,
        sequences_of(trained),
        training=config.training,
        settings=settings,
        directory=directory,
        padding_id=tokenizer.padding_id,
        description=f"{directory.path.name}: sft",
        held_out=held_out,
    )
    if held_out is not None:
        metrics["held_out"] |= {"lengths": lengths_of(unseen), "files": [file.to_row() for file in unseen]}
    save_model(
        model,
        tokenizer,
        directory.model,
        settings=settings,
        card=model_card("sft", config, settings),
        adapter=directory.adapter_alone(config.training.lora),
    )
    used = sum(len(part.used) for part in parts)
    rows = [part.to_row(used) | file.to_row() for part, file in zip(parts, trained, strict=True)]
    return {"mix": rows, "lengths": lengths_of(trained), **metrics}


def _held_out(config: SftConfig, files: Sequence[EncodedFile], questions: Questions) -> HeldOut:
    """What the model is measured on.

    Raises:
        UserInputError: it holds no answer that the loss policy selects.
    """
    length = config.training.sequence_length
    sequences = sequences_of(files)
    if not any(any(sequence.loss_mask) for sequence in sequences):
        raise UserInputError(
            f"held_out: no answer to measure; the loss policy selects nothing in the {len(sequences)} dialogues "
            f"that fit into {length} tokens"
        )
    return HeldOut(
        pack(sequences, length),
        questions.padding_id,
        every=config.evaluation_steps,
        questions=questions if config.sample_prompts else None,
    )
