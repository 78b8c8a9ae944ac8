"""Training a small model on a few dialogues, and the loss from its definition."""

from __future__ import annotations

import json

import torch
from torch.nn import functional

from llama2_chat.sft.config import SftTraining
from llama2_chat.sft.trainer import train_sequences
from llama2_chat.tokenization import TokenizedDialogue


def loss_from_the_definition(model, dialogues: list[TokenizedDialogue]) -> float:
    """Mean over trained tokens of -log p(token | all before it), one dialogue at a time."""
    total, count = 0.0, 0
    with torch.no_grad():
        for dialogue in dialogues:
            logprobs = functional.log_softmax(
                model(input_ids=torch.tensor([dialogue.input_ids])).logits[0], -1
            )
            for position, (token, trained) in enumerate(
                zip(dialogue.input_ids, dialogue.loss_mask, strict=True)
            ):
                if trained:
                    total -= logprobs[position - 1, token].item()
                    count += 1
    return total / count


def train(model, dialogues, settings, directory, held_out=None, **changes):
    """`train_sequences` with a small batch; `changes` are keys of `training`."""
    values = {
        "learning_rate": 1e-3,
        "batch_size": 4,
        "epochs": 2,
        "sequence_length": 32,
        "checkpoint_steps": 3,
        **changes,
    }
    return train_sequences(
        model,
        dialogues,
        training=SftTraining(**values),
        settings=settings,
        directory=directory,
        padding_id=0,
        description="test",
        held_out=held_out,
    )


def records(directory) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in directory.metrics_file.read_text().splitlines()]
