"""Fine-tuning on a dataset that a stage has made itself: what every data maker ends with.

Rejection sampling, Ghost Attention and context distillation each write dialogues to `dataset.jsonl`
and then train a policy on them, with a share of SFT dialogues mixed in.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from llama2_chat.chat_format import build_chat_format
from llama2_chat.dialogue import Dialogue
from llama2_chat.jsonl import read_dialogues
from llama2_chat.models import load_policy, save_model, seed_everything
from llama2_chat.settings import PackedTraining, RunSettings
from llama2_chat.sft.trainer import train_sequences
from llama2_chat.stage import StageDirectory
from llama2_chat.tokenization import LossPolicy, tokenize_dialogues
from llama2_chat.tokenizers import load_tokenizer


def fine_tune(
    start: str,
    settings: RunSettings,
    directory: StageDirectory,
    *,
    training: PackedTraining,
    loss_policy: LossPolicy,
    sft_dialogues: Sequence[str],
    sft_fraction: float,
    card: str,
) -> dict[str, Any]:
    """Train the policy at `start` on `dataset.jsonl` and write `model/`.

    Args:
        loss_policy: For the made dialogues; SFT dialogues are trained on all their answers.
        sft_dialogues: Files to mix from.
        sft_fraction: Share of SFT dialogues in the mix.

    Returns:
        Metrics of the training, what the length policy did to either part, and the share that resulted.
    """
    gguf_file = settings.gguf_file_of(start)
    tokenizer = load_tokenizer(start, gguf_file)
    chat_format = build_chat_format(settings.chat_format, tokenizer)
    capacity = training.sequence_length
    sequences, lengths = tokenize_dialogues(
        read_dialogues(directory.dataset), chat_format, loss_policy, capacity
    )
    demonstrations = draw_demonstrations(sft_dialogues, sft_fraction, len(sequences), settings.seed)
    mixed_in, mixed_lengths = tokenize_dialogues(demonstrations, chat_format, "all_answers", capacity)
    seed_everything(settings.seed)
    model = load_policy(start, settings, gguf_file=gguf_file)
    metrics = train_sequences(
        model,
        [*sequences, *mixed_in],
        training=training,
        settings=settings,
        directory=directory,
        padding_id=tokenizer.padding_id,
        description=f"{directory.path.name}: fine-tuning",
    )
    save_model(model, tokenizer, directory.model, settings=settings, card=card)
    return {
        "lengths": lengths.to_row(),
        "sft_lengths": mixed_lengths.to_row(),
        "sft_share": len(mixed_in) / max(1, len(mixed_in) + len(sequences)),
        **metrics,
    }


def draw_demonstrations(files: Sequence[str], fraction: float, made: int, seed: int) -> list[Dialogue]:
    """SFT dialogues, drawn without replacement, that make up `fraction` of the mix with `made` dialogues.

    Fewer where there are not that many; the share that results is recorded.
    """
    if not files or fraction == 0:
        return []
    pool = list(chain.from_iterable(read_dialogues(Path(file)) for file in files))
    wanted = round(made * fraction / (1 - fraction))
    return random.Random(seed).sample(pool, min(wanted, len(pool)))
