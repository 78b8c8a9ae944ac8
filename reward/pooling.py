"""A reward model's score is read at the response's last real token, found by its length.

Never by searching for the padding id: with a tokenizer that pads with EOS, that search ends one token
early. Rows are padded on the right; causal attention keeps the padding out of the real tokens, so no
attention mask is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def pad_right(rows: Sequence[Sequence[int]], padding_id: int) -> tuple[Tensor, Tensor]:
    """Token ids (B, S) and lengths (B,), int64."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([list(row) + [padding_id] * (longest - len(row)) for row in rows])
    return ids, torch.tensor([len(row) for row in rows])


def scores_at_end(model: PreTrainedModel, input_ids: Tensor, lengths: Tensor) -> Tensor:
    """The scalar head's output at position `lengths - 1` of each right-padded row.

    Args:
        input_ids: int64 (B, S).
        lengths: int64 (B,), each at least 1.

    Returns:
        float32 (B,).
    """
    hidden_BSH = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    last_BH = hidden_BSH[torch.arange(len(lengths), device=hidden_BSH.device), lengths - 1]
    head: torch.nn.Module = model.score  # type: ignore[assignment]
    scores: Tensor = head(last_BH).squeeze(-1).float()
    return scores


def pool_by_length(model: PreTrainedModel) -> None:
    """Make `model(input_ids=…, lengths=…)` return the scores, so that wrappers (DDP, FSDP) see one forward."""

    def forward(self: PreTrainedModel, input_ids: Tensor, lengths: Tensor, **_: Any) -> Tensor:
        return scores_at_end(self, input_ids, lengths)

    model.forward = MethodType(forward, model)


def unpool(model: PreTrainedModel) -> None:
    """Give the model its own forward back."""
    model.__dict__.pop("forward", None)
