"""Attention within the pieces of a packed row: whole dialogues, and branches that share the beginning of one.

The positions say what a row holds. Where they restart at 0 a dialogue begins (`packing.py`). Where they fall back to
p > 0 a branch begins: of what the token before it sees, it sees the first p tokens, and goes on from there, as the
second answer to a prompt does. So a prompt is computed once for all of its answers (`reward/pooling.py`).

On the CPU each piece is attended to on its own: transformers masks what lies outside a dialogue, but multiplies it all
the same: a row of 900 tokens costs 900² for every layer and head, where its sixteen dialogues of 55 tokens need a
sixteenth of that. Elsewhere `tree_mask` says the same as a mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

PACKED_ATTENTION = "llama2_chat_packed"
"""Name under which transformers knows the implementation."""

_FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Architectures whose only mask is the causal one and whose attention is given the positions."""


def use_packed_attention(model: PreTrainedModel) -> bool:
    """Let a model on the CPU compute packed rows dialogue by dialogue, if its architecture allows; say whether.

    Nothing changes in what the model computes, with a cache, a padding mask or gradient checkpointing neither.
    """
    if model.device.type != "cpu" or not has_plain_causal_attention(model.config):
        return False
    model.set_attn_implementation(PACKED_ATTENTION)
    return True


def has_plain_causal_attention(config: PretrainedConfig) -> bool:
    """Whether every layer attends to all that precedes and to nothing else, in an architecture that is known."""
    layer_types = getattr(config, "layer_types", None) or ["full_attention"]
    windowed = getattr(config, "sliding_window", None) is not None and config.model_type == "mistral"
    return (
        config.model_type in _FAMILIES
        and not windowed
        and set(layer_types) == {"full_attention"}
        and not getattr(config, "attention_dropout", 0.0)
    )


def shares_beginnings(model: PreTrainedModel) -> bool:
    """Whether the model can compute branches: causal attention over all that precedes, with positions that rotate."""
    implementations = (PACKED_ATTENTION, "sdpa", "eager")
    return has_plain_causal_attention(model.config) and model.config._attn_implementation in implementations


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of tokens with consecutive positions: a dialogue, or a branch of one."""

    length: int
    before: tuple[tuple[int, int], ...] = ()
    """What a branch sees besides itself: of which pieces how many of their first tokens, in order."""


def pieces_of(position_ids: Tensor) -> list[Piece]:
    """The pieces of all rows, row after row.

    A piece begins with its row and wherever a position does not follow the one before it, as transformers has it.

    Args:
        position_ids: (R, S); with branches, every row begins at 0.

    Raises:
        ValueError: a branch goes on from more tokens than there are before it.
    """
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids.diff(dim=-1) != 1
    starts = begins.flatten().nonzero().flatten().tolist()
    positions = position_ids.flatten()[starts].tolist()
    pieces: list[Piece] = []
    path: list[tuple[int, int]] = []  # what the last token sees
    for start, end, position in zip(starts, [*starts[1:], position_ids.numel()], positions, strict=True):
        path = [] if start % position_ids.shape[-1] == 0 else _first(path, position)
        pieces.append(Piece(end - start, tuple(path)))
        path.append((len(pieces) - 1, end - start))
    return pieces


def _first(path: list[tuple[int, int]], tokens: int) -> list[tuple[int, int]]:
    """The first tokens of a path through pieces."""
    kept, left = [], tokens
    for piece, length in path:
        if left > 0:
            kept.append((piece, min(length, left)))
            left -= length
    if left > 0:
        raise ValueError(f"a branch goes on from {tokens} tokens, before it are {tokens - left}")
    return kept


def has_branches(position_ids: Tensor) -> bool:
    """Whether any piece of rows (R, S) goes on from what stands before it."""
    falls = position_ids.diff(dim=-1) != 1
    return bool((falls & (position_ids[:, 1:] > 0)).any())


def tree_mask(position_ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """What each token may see, as transformers adds it to the scores of attention.

    A token sees an earlier one if no position from there on has fallen back to that one's or below.

    Args:
        position_ids: (R, S).

    Returns:
        (R, 1, S, S) of `dtype`: 0 where the token of the third axis sees that of the fourth, else the least number.
    """
    rows, length = position_ids.shape
    places = torch.arange(length, device=position_ids.device)
    earlier = places[:, None] < places[None, :]
    itself = places[:, None] == places[None, :]
    least = torch.finfo(dtype).min
    mask = torch.full((rows, 1, length, length), least, dtype=dtype, device=position_ids.device)
    for row, positions in enumerate(
        position_ids.int()
    ):  # one by one: what lies between takes thrice the mask's room
        lowest_since = positions.expand(length, length).masked_fill(~earlier, length).cummin(-1).values
        visible = itself | (earlier & (lowest_since > positions[:, None]))
        mask[row, 0].masked_fill_(visible.T, 0.0)
    return mask


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Causal attention within each piece: query (R, H, S, D), key and value (R, K, S, D), output (R, S, H, D)."""
    rows, heads, length, size = query.shape
    pieces: list[Piece] = []
    if attention_mask is None and position_ids is not None and key.shape[2] == length > 1:
        pieces = pieces_of(position_ids.expand(rows, length))
    if len(pieces) <= rows:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, position_ids=position_ids, **kwargs
        )
    # Laid end to end and split once: the gradients of slices would each be as large as the whole.
    queries, keys, values = (
        torch.split(
            t.transpose(0, 1).reshape(1, t.shape[1], rows * length, size), [p.length for p in pieces], dim=2
        )
        for t in (query, key, value)
    )
    attended = []
    for number, piece in enumerate(pieces):
        q, k, v, mask = queries[number], keys[number], values[number], None
        if piece.before:
            k = torch.cat([*(keys[other][:, :, :count] for other, count in piece.before), k], dim=2)
            v = torch.cat([*(values[other][:, :, :count] for other, count in piece.before), v], dim=2)
            shared = k.shape[2] - q.shape[2]
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(shared)
        attended.append(
            functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
            )
        )
    return torch.cat(attended, dim=2).transpose(1, 2).reshape(rows, length, heads, size), None


def _mask(*, attention_mask: Tensor | None, q_length: int, kv_length: int, **kwargs: Any) -> Tensor | None:
    """No mask for packed rows, of which transformers says that the causal mask alone will not do; else its own."""
    if attention_mask is None and not kwargs.get("allow_is_causal_skip", True) and q_length == kv_length > 1:
        return None
    mask: Tensor | None = sdpa_mask(
        attention_mask=attention_mask, q_length=q_length, kv_length=kv_length, **kwargs
    )
    return mask


AttentionInterface.register(PACKED_ATTENTION, _attend)
AttentionMaskInterface.register(PACKED_ATTENTION, _mask)
