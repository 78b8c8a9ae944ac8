"""Fine-tuning on a dataset that a stage has made itself: what every data maker ends with.

Rejection sampling, Ghost Attention and context distillation each write dialogues to `dataset.jsonl`
and then train a policy on them, with a share of SFT dialogues mixed in.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llama2_chat.chat_format import build_chat_format
from llama2_chat.dialogue import Dialogue
from llama2_chat.jsonl import read_dialogues
from llama2_chat.models import load_policy, save_model, seed_everything
from llama2_chat.settings import PackedTraining, RunSettings
from llama2_chat.sft.data import encode_file, lengths_of, sequences_of
from llama2_chat.sft.trainer import train_sequences
from llama2_chat.stage import StageDirectory
from llama2_chat.tokenization import LossPolicy
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
        Metrics of the training, what the length policy did to either part and to each file of SFT dialogues
        (`sft_mix`), and the share that resulted.
    """
    gguf_file = settings.gguf_file_of(start)
    tokenizer = load_tokenizer(start, gguf_file)
    chat_format = build_chat_format(settings.chat_format, tokenizer)
    encode = partial(encode_file, chat_format=chat_format, max_tokens=training.sequence_length)
    made = encode(str(directory.dataset), read_dialogues(directory.dataset), loss_policy=loss_policy)
    sequences = made.sequences
    demonstrations = draw_demonstrations(sft_dialogues, sft_fraction, len(sequences), settings.seed)
    mixed_files = [
        encode(file, dialogues, loss_policy="all_answers")
        for file, dialogues in zip(sft_dialogues, demonstrations, strict=True)
    ]
    mixed_in = sequences_of(mixed_files)
    for file in (made, *mixed_files):
        file.announce(directory)
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
    adapter = directory.adapter_alone(training.lora)
    save_model(model, tokenizer, directory.model, settings=settings, card=card, adapter=adapter)
    return {
        "lengths": made.lengths.to_row(),
        "sft_lengths": lengths_of(mixed_files),
        "sft_mix": [file.to_row() for file in mixed_files],
        "sft_share": len(mixed_in) / max(1, len(mixed_in) + len(sequences)),
        **metrics,
    }


def draw_demonstrations(files: Sequence[str], fraction: float, made: int, seed: int) -> list[list[Dialogue]]:
    """SFT dialogues of each file, drawn from all without replacement, that make up `fraction` of the mix.

    The rest of the mix is `made` dialogues. Fewer where there are not that many; the share that results is recorded.
    """
    if fraction == 0:
        return [[] for _ in files]
    pool = [(number, one) for number, file in enumerate(files) for one in read_dialogues(Path(file))]
    wanted = round(made * fraction / (1 - fraction))
    drawn = random.Random(seed).sample(pool, min(wanted, len(pool)))
    return [[one for number, one in drawn if number == place] for place in range(len(files))]
