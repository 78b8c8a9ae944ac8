"""The `sft` stage: dialogues in, chat model out."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from llama2_chat.chat_format import build_chat_format
from llama2_chat.jsonl import read_dialogues
from llama2_chat.model_card import model_card
from llama2_chat.models import load_policy, save_model, seed_everything
from llama2_chat.settings import RunSettings
from llama2_chat.sft.config import SftConfig
from llama2_chat.sft.data import encode_file, lengths_of, sequences_of
from llama2_chat.sft.held_out import held_out_metrics
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
    unseen = [encode(file, read_dialogues(Path(file))) for file in config.held_out]
    for file in (*trained, *unseen):
        file.announce(directory)
    seed_everything(settings.seed)
    model = load_policy(config.model, settings, gguf_file=gguf_file)
    measure = partial(
        held_out_metrics, settings=settings, sequence_length=length, padding_id=tokenizer.padding_id
    )
    before = measure(model, sequences_of(unseen)) if config.held_out else None
    metrics = train_sequences(
        model,
        sequences_of(trained),
        training=config.training,
        settings=settings,
        directory=directory,
        padding_id=tokenizer.padding_id,
        description=f"{directory.path.name}: sft",
    )
    if before is not None:
        after = measure(model, sequences_of(unseen))
        files = [file.to_row() for file in unseen]
        metrics["held_out"] = {
            "lengths": lengths_of(unseen),
            "files": files,
            "before": before,
            "after": after,
        }
    save_model(model, tokenizer, directory.model, settings=settings, card=model_card("sft", config, settings))
    used = sum(len(part.used) for part in parts)
    rows = [part.to_row(used) | file.to_row() for part, file in zip(parts, trained, strict=True)]
    return {"mix": rows, "lengths": lengths_of(trained), **metrics}
