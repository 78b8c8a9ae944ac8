"""Packing: several tokenised dialogues share one row, so that no token is spent on padding.

Attention stays inside each dialogue, unless it is told otherwise: positions restart at 0 where a new one begins, and
transformers derives the block-diagonal mask from them, or `packed_attention` the pieces. That holds only without a 2D
attention mask and without a cache, so rows are built and collated here and nowhere else.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar, overload

import numpy as np
import numpy.typing as npt
import torch

from llama2_chat.tokenization import TokenizedDialogue

_T = TypeVar("_T", covariant=True)

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


class LazySequence(Sequence[_T], Generic[_T]):
    """A sequence of `count` items, each made anew by `make(index)` when it is asked for; none is held."""

    def __init__(self, count: int, make: Callable[[int], _T]) -> None:
        self._places = range(count)
        self._make = make

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> _T: ...

    @overload
    def __getitem__(self, index: slice) -> list[_T]: ...

    def __getitem__(self, index: int | slice) -> _T | list[_T]:
        if isinstance(index, slice):
            return [self._make(place) for place in self._places[index]]
        return self._make(self._places[index])


def best_fit_decreasing(lengths: Sequence[int] | npt.NDArray[np.int64], capacity: int) -> list[array[int]]:
    """Bins of indices into `lengths`, each at most `capacity` long in sum.

    Longest first, each into the fullest bin that still takes it; ties by index, so the result is a
    function of the lengths alone.

    Raises:
        ValueError: one length alone exceeds the capacity.
    """
    # Arrays and views of them hold eight bytes a length, where lists of Python's integers hold forty.
    sizes = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    shortest = int(sizes.min(initial=capacity))
    bins: list[array[int]] = []
    free: list[tuple[int, int]] = []  # (room left, bin), sorted; without bins that can take nothing more
    for index, length in zip(order.data, sizes[order].data, strict=True):
        if length > capacity:
            raise ValueError(f"sequence {index} has {length} tokens, a row only {capacity}")
        place = bisect_left(free, (length, -1))
        if place == len(free):
            room, number = capacity, len(bins)
            bins.append(array("q"))
        else:
            room, number = free.pop(place)
        bins[number].append(index)
        if room - length >= shortest:
            insort(free, (room - length, number))
    return bins


def pack(
    dialogues: Sequence[TokenizedDialogue],
    capacity: int,
    *,
    isolate: bool = True,
    parts: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
) -> Sequence[PackedRow]:
    """Pack dialogues into rows of at most `capacity` tokens.

    What is held is where each dialogue goes; a row is made of its dialogues whenever it is asked for.

    Args:
        isolate: Restart the positions with every dialogue, so that it sees itself alone; else they run on through
            the row, and a dialogue sees those before it.
        parts: How many dialogues in turn make up each part; no row holds dialogues of two parts. Default: one part.
        lengths: Of the dialogues, where they are known; default: they are looked at.
    """
    sizes = np.fromiter(
        lengths if lengths is not None else (len(d.input_ids) for d in dialogues),
        np.int64,
        count=len(dialogues),
    )
    ends = np.cumsum([len(sizes)] if parts is None else parts)
    bins: list[tuple[int, array[int]]] = []
    for start, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True):
        bins += [(start, members) for members in best_fit_decreasing(sizes[start:end], capacity)]

    def row(number: int) -> PackedRow:
        start, members = bins[number]
        return _row([dialogues[start + index] for index in members], isolate)

    return LazySequence(len(bins), row)


def _row(dialogues: Sequence[TokenizedDialogue], isolate: bool) -> PackedRow:
    """Dialogues laid end to end."""
    row = PackedRow([], [], [])
    for dialogue in dialogues:
        row.input_ids.extend(dialogue.input_ids)
        row.labels.extend(
            token if trained and position > 0 else IGNORED
            for position, (token, trained) in enumerate(
                zip(dialogue.input_ids, dialogue.loss_mask, strict=True)
            )
        )
        first = 0 if isolate else len(row.position_ids)
        row.position_ids.extend(range(first, first + len(dialogue.input_ids)))
    return row


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
