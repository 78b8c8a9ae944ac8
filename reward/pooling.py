"""A reward model's score is read at each dialogue's last real token, found by its length.

Never by searching for the padding id: with a tokenizer that pads with EOS, that search ends one token
early. The dialogues of a batch are packed into rows as long as the longest of them, isolated from each
other by positions that restart (see `llama2_chat.packing`), so hardly any padding is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llama2_chat.packing import best_fit_decreasing


@dataclass(frozen=True, slots=True)
class PackedDialogues:
    """N dialogues in R rows of S tokens: all int64.

    `input_ids` and `position_ids` (R, S); dialogue n ends at token `ends[n]` of row `rows[n]`.
    """

    input_ids: Tensor
    position_ids: Tensor
    rows: Tensor
    ends: Tensor


def pack_dialogues(dialogues: Sequence[Sequence[int]], padding_id: int) -> PackedDialogues:
    """Lay dialogues end to end into rows as long as the longest; what is left of a row is an isolated piece."""
    longest = max(len(dialogue) for dialogue in dialogues)
    bins = best_fit_decreasing([len(dialogue) for dialogue in dialogues], longest)
    ids = torch.full((len(bins), longest), padding_id)
    positions = torch.zeros((len(bins), longest), dtype=torch.long)
    rows, ends = torch.zeros(len(dialogues), dtype=torch.long), torch.zeros(len(dialogues), dtype=torch.long)
    for row, members in enumerate(bins):
        start = 0
        for index in members:
            end = start + len(dialogues[index])
            ids[row, start:end] = torch.tensor(dialogues[index])
            positions[row, start:end] = torch.arange(end - start)
            rows[index], ends[index] = row, end - 1
            start = end
        positions[row, start:] = torch.arange(longest - start)
    return PackedDialogues(ids, positions, rows, ends)


def scores_at_ends(
    model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, rows: Tensor, ends: Tensor
) -> Tensor:
    """The scalar head's output at each dialogue's last token, float32 (N,); arguments as in `PackedDialogues`."""
    hidden_RSH = model.base_model(
        input_ids=input_ids, position_ids=position_ids, use_cache=False
    ).last_hidden_state
    head: torch.nn.Module = model.score  # type: ignore[assignment]
    scores: Tensor = head(hidden_RSH[rows, ends]).squeeze(-1).float()
    return scores


def pool_at_ends(model: PreTrainedModel) -> None:
    """Make `model(input_ids=…, position_ids=…, rows=…, ends=…)` return the scores, so that wrappers (DDP, FSDP)
    see one forward."""

    def forward(
        self: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, rows: Tensor, ends: Tensor, **_: Any
    ) -> Tensor:
        return scores_at_ends(self, input_ids, position_ids, rows, ends)

    model.forward = MethodType(forward, model)


def unpool(model: PreTrainedModel) -> None:
    """Give the model its own forward back."""
    model.__dict__.pop("forward", None)
