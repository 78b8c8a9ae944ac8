"""A policy measured on held-out dialogues: the loss that training minimises, where nothing is trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from llama2_chat import interruption
from llama2_chat.errors import UserInputError
from llama2_chat.models import sampling_dtype
from llama2_chat.packing import IGNORED, collate_rows, pack
from llama2_chat.settings import RunSettings
from llama2_chat.sft.trainer import trained_token_loss
from llama2_chat.tokenization import TokenizedDialogue


@torch.no_grad()
def held_out_metrics(
    model: PreTrainedModel,
    dialogues: Sequence[TokenizedDialogue],
    *,
    settings: RunSettings,
    sequence_length: int,
    padding_id: int,
) -> dict[str, Any]:
    """Over all tokens that the masks select: `loss` (nats a token), `perplexity`, `token_accuracy`, `trained_tokens`.

    Raises:
        UserInputError: the masks select nothing.
        Interrupted: a signal asked for the end.
    """
    autocast = sampling_dtype(settings)
    device = model.device
    loss, correct, count = 0.0, 0, 0
    for row in pack(dialogues, sequence_length):
        interruption.raise_if_requested()
        columns = {"input_ids": row.input_ids, "labels": row.labels, "position_ids": row.position_ids}
        batch = {name: tensor.to(device) for name, tensor in collate_rows([columns], padding_id).items()}
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            total, right = trained_token_loss(model, **batch)
        loss += total.item()
        correct += int(right)
        count += int((batch["labels"] != IGNORED).sum())
    if count == 0:
        raise UserInputError(
            f"held_out: no answer to measure; the loss policy selects nothing in the {len(dialogues)} dialogues "
            f"that fit into {sequence_length} tokens"
        )
    return {
        "loss": loss / count,
        "perplexity": math.exp(min(loss / count, 700.0)),
        "token_accuracy": correct / count,
        "trained_tokens": count,
    }
