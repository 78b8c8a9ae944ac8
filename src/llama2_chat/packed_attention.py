"""Attention on the CPU that computes nothing between the dialogues of a packed row.

transformers masks what lies outside a dialogue, but multiplies it all the same: a row of 900 tokens costs 900²
for every layer and head, where its sixteen dialogues of 55 tokens need a sixteenth of that. Here each dialogue is
attended to on its own. Where it begins is read from the positions, which restart there (`packing.py`).
"""

from __future__ import annotations

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
    if model.device.type != "cpu" or not _has_plain_causal_attention(model.config):
        return False
    model.set_attn_implementation(PACKED_ATTENTION)
    return True


def _has_plain_causal_attention(config: PretrainedConfig) -> bool:
    layer_types = getattr(config, "layer_types", None) or ["full_attention"]
    windowed = getattr(config, "sliding_window", None) is not None and config.model_type == "mistral"
    return (
        config.model_type in _FAMILIES
        and not windowed
        and set(layer_types) == {"full_attention"}
        and not getattr(config, "attention_dropout", 0.0)
    )


def piece_lengths(position_ids: Tensor) -> list[int]:
    """Lengths of the pieces of all rows, row after row.

    A piece begins with its row and wherever a position does not follow the one before it, as transformers has it.

    Args:
        position_ids: (R, S).
    """
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids.diff(dim=-1) != 1
    starts = begins.flatten().nonzero().flatten().tolist()
    return [end - start for start, end in zip(starts, [*starts[1:], position_ids.numel()], strict=True)]


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
    pieces: list[int] = []
    if attention_mask is None and position_ids is not None and key.shape[2] == length > 1:
        pieces = piece_lengths(position_ids.expand(rows, length))
    if len(pieces) <= rows:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, position_ids=position_ids, **kwargs
        )
    # Laid end to end and split once: the gradients of slices would each be as large as the whole.
    queries, keys, values = (
        torch.split(t.transpose(0, 1).reshape(1, t.shape[1], rows * length, size), pieces, dim=2)
        for t in (query, key, value)
    )
    attended = [
        functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        for q, k, v in zip(queries, keys, values, strict=True)
    ]
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
