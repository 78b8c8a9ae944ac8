"""Packing: several tokenised dialogues share one row, so that no token is spent on padding.

Attention stays inside each dialogue, unless it is told otherwise: positions restart at 0 where a new one begins, and
transformers derives the block-diagonal mask from them, or `packed_attention` the pieces. That holds only without a 2D
attention mask and without a cache, so rows are built and collated here and nowhere else.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from llama2_chat.tokenization import TokenizedDialogue

IGNORED = -100
"""Label of a token that is not trained, as torch's cross-entropy expects it."""


@dataclass(frozen=True, slots=True)
class PackedRow:
    """Dialogues laid end to end: token ids, labels (the id itself or `IGNORED`), positions."""

    input_ids: list[int]
    labels: list[int]
    position_ids: list[int]

    def to_columns(self) -> dict[str, list[int]]:
        """As a batch's collator and `datasets` take it."""
        return {"input_ids": self.input_ids, "labels": self.labels, "position_ids": self.position_ids}


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of indices into `lengths`, each at most `capacity` long in sum.

    Longest first, each into the fullest bin that still takes it; ties by index, so the result is a
    function of the lengths alone.

    Raises:
        ValueError: one length alone exceeds the capacity.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room left, bin), sorted
    for index in order:
        length = lengths[index]
        if length > capacity:
            raise ValueError(f"sequence {index} has {length} tokens, a row only {capacity}")
        place = bisect_left(free, (length, -1))
        if place == len(free):
            bins.append([index])
            insort(free, (capacity - length, len(bins) - 1))
        else:
            room, number = free.pop(place)
            bins[number].append(index)
            insort(free, (room - length, number))
    return bins


def pack(dialogues: Sequence[TokenizedDialogue], capacity: int, *, isolate: bool = True) -> list[PackedRow]:
    """Pack dialogues into rows of at most `capacity` tokens.

    Args:
        isolate: Restart the positions with every dialogue, so that it sees itself alone; else they run on through
            the row, and a dialogue sees those before it.
    """
    rows = []
    for members in best_fit_decreasing([len(d.input_ids) for d in dialogues], capacity):
        row = PackedRow([], [], [])
        for index in members:
            dialogue = dialogues[index]
            row.input_ids.extend(dialogue.input_ids)
            row.labels.extend(
                token if trained and position > 0 else IGNORED
                for position, (token, trained) in enumerate(
                    zip(dialogue.input_ids, dialogue.loss_mask, strict=True)
                )
            )
            first = 0 if isolate else len(row.position_ids)
            row.position_ids.extend(range(first, first + len(dialogue.input_ids)))
        rows.append(row)
    return rows


def collate_rows(rows: Sequence[Mapping[str, list[int]]], padding_id: int) -> dict[str, torch.Tensor]:
    """A batch of packed rows, padded on the right to the longest: int64 tensors (B, S).

    A row of one token trains nothing, since nothing comes before it: it is left out where there are others.

    Padding is one more isolated piece of its row (its positions restart at 0) with ignored labels,
    so it needs no attention mask.
    """
    rows = [row for row in rows if len(row["input_ids"]) > 1] or rows[:1]
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, filling: Sequence[int]) -> torch.Tensor:
        return torch.tensor([row[name] + list(filling[: longest - len(row[name])]) for row in rows])

    return {
        "input_ids": padded("input_ids", [padding_id] * longest),
        "labels": padded("labels", [IGNORED] * longest),
        "position_ids": padded("position_ids", range(longest)),
    }
