"""A reward model's score is read at each dialogue's last real token, found by its length.

Never by searching for the padding id: with a tokenizer that pads with EOS, that search ends one token early.

What several dialogues begin with is computed once (`trees_of`): both answers of a pair, or all answers to a prompt,
follow the prompt in one row as branches (`llama2_chat.packed_attention`). Trees share rows, isolated from each
other, so hardly any padding is computed, or none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llama2_chat.packed_attention import PACKED_ATTENTION, has_branches, shares_beginnings, tree_mask
from llama2_chat.packing import best_fit_decreasing

LEAST_SHARED = 8
"""Fewer common tokens than this (the start of a chat format, say) are not worth a branch."""
LONGEST_TREE = 2048
"""Sharing makes no tree of more tokens: a mask over it has their square."""

Dialogues = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class PackedDialogues:
    """N dialogues in R rows of S tokens: all int64.

    `input_ids` and `position_ids` (R, S); dialogue n ends at token `ends[n]` of row `rows[n]`.
    """

    input_ids: Tensor
    position_ids: Tensor
    rows: Tensor
    ends: Tensor


@dataclass(frozen=True, slots=True)
class RowLayout:
    """How a model's rows are laid out."""

    share: bool
    """Whether it computes branches."""
    one_row: bool
    """Whether a row costs no more than its pieces, so that all go into one and none is padded."""


SEPARATE = RowLayout(share=False, one_row=False)
"""Every dialogue on its own; what any model can take."""


def row_layout(model: PreTrainedModel) -> RowLayout:
    """The best layout that the model's attention allows."""
    return RowLayout(
        share=shares_beginnings(model), one_row=model.config._attn_implementation == PACKED_ATTENTION
    )


@dataclass(frozen=True, slots=True)
class Branch:
    """Dialogue `number` from its token `start` on; it begins as the branch before it does."""

    number: int
    start: int


Tree = list[Branch]


def common_beginning(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences have in common before they first differ."""
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return min(len(one), len(other))


def trees_of(dialogues: Dialogues, *, share: bool = True) -> list[Tree]:
    """Dialogues grouped by what they begin with, or each on its own where `share` is False.

    A branch shares its first `start` tokens with the one before it in its tree, and has at least one of its own. The
    trees are a function of the dialogues alone and hold each of them once.
    """
    if not share:
        return [[Branch(number, 0)] for number in range(len(dialogues))]
    trees: list[Tree] = []
    size, before = 0, list[int]()
    # In this order a dialogue has most in common with the one before it.
    for number in sorted(range(len(dialogues)), key=lambda n: (dialogues[n], n)):
        ids = dialogues[number]
        start = min(common_beginning(before, ids), len(ids) - 1)
        if trees and start >= LEAST_SHARED and size + len(ids) - start <= LONGEST_TREE:
            trees[-1].append(Branch(number, start))
            size += len(ids) - start
        else:
            trees.append([Branch(number, 0)])
            size = len(ids)
        before = list(ids)
    return trees


def tree_size(tree: Tree, dialogues: Dialogues) -> int:
    """Tokens that are computed for a tree."""
    return sum(len(dialogues[branch.number]) - branch.start for branch in tree)


def pack_dialogues(
    dialogues: Dialogues,
    padding_id: int,
    layout: RowLayout = SEPARATE,
    *,
    trees: Sequence[Tree] | None = None,
) -> PackedDialogues:
    """Lay dialogues end to end into rows as long as the longest tree; what is left of a row is an isolated piece.

    Args:
        dialogues: At least one, each of at least one token.
        padding_id: Any id of the vocabulary; nothing sees it.
        trees: What `trees_of` made of the dialogues, where that is known already.
    """
    if trees is None:
        trees = trees_of(dialogues, share=layout.share)
    sizes = [tree_size(tree, dialogues) for tree in trees]
    width = sum(sizes) if layout.one_row else max(sizes)
    bins = best_fit_decreasing(sizes, width)
    ids = torch.full((len(bins), width), padding_id)
    positions = torch.zeros((len(bins), width), dtype=torch.long)
    rows, ends = torch.zeros(len(dialogues), dtype=torch.long), torch.zeros(len(dialogues), dtype=torch.long)
    for row, members in enumerate(bins):
        place = 0
        for branch in (branch for tree in members for branch in trees[tree]):
            tokens = dialogues[branch.number]
            end = place + len(tokens) - branch.start
            ids[row, place:end] = torch.tensor(tokens[branch.start :])
            positions[row, place:end] = torch.arange(branch.start, len(tokens))
            rows[branch.number], ends[branch.number] = row, end - 1
            place = end
        positions[row, place:] = torch.arange(width - place)
    return PackedDialogues(ids, positions, rows, ends)


def scores_at_ends(
    model: PreTrainedModel,
    input_ids: Tensor,
    position_ids: Tensor,
    rows: Tensor,
    ends: Tensor,
) -> Tensor:
    """The scalar head's output at each dialogue's last token, float32 (N,); arguments as in `PackedDialogues`."""
    layout = row_layout(model)
    masked = layout.share and not layout.one_row and has_branches(position_ids)
    mask = tree_mask(position_ids) if masked else None
    # Checkpointing computes the layers a second time, after this function has returned.
    recomputed = model.training and model.is_activation_checkpointing
    with (
        last_layer_at(model, position_ids.shape, rows, ends)
        if layout.share and not recomputed
        else nullcontext()
    ):
        hidden_RSH = model.base_model(
            input_ids=input_ids, attention_mask=mask, position_ids=position_ids, use_cache=False
        ).last_hidden_state
    head: torch.nn.Module = model.score  # type: ignore[assignment]
    scores: Tensor = head(hidden_RSH[rows, ends]).squeeze(-1).float()
    return scores


@contextmanager
def last_layer_at(model: PreTrainedModel, shape: torch.Size, rows: Tensor, ends: Tensor) -> Iterator[None]:
    """Compute the last layer's feed-forward network at these tokens alone, and 0 elsewhere: no other is read.

    Args:
        model: One whose layers have the names of a Llama's (`shares_beginnings`).
        shape: (R, S).
        rows, ends: int64 (N,), the tokens' places; no two are the same.
    """

    def select(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        return inputs[0][rows, ends]

    def spread(_: torch.nn.Module, __: tuple[Tensor, ...], output_NH: Tensor) -> Tensor:
        empty_RSH = output_NH.new_zeros(*shape, output_NH.shape[-1])
        return empty_RSH.index_put((rows, ends), output_NH)

    network: torch.nn.Module = model.base_model.layers[-1].mlp  # type: ignore[index,union-attr]
    hooks = (network.register_forward_pre_hook(select), network.register_forward_hook(spread))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


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
