"""The architecture of a base model from scratch: transformers' Llama, with weights from a seed."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llama2_chat.pretrain.config import Architecture


def feed_forward_size(architecture: Architecture) -> int:
    """The configured width, or 8/3 of the hidden size rounded up to a multiple of 8."""
    if architecture.feed_forward_size is not None:
        return architecture.feed_forward_size
    return -(-8 * architecture.hidden_size // 24) * 8


def new_model(
    architecture: Architecture, *, vocabulary_size: int, begin_id: int, end_id: int, seed: int
) -> LlamaForCausalLM:
    """An untrained model in float32; its weights are a function of the arguments.

    It has no padding id: Llama 2 has none, and what pads must never be what ends a sequence.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=architecture.hidden_size,
        intermediate_size=feed_forward_size(architecture),
        num_hidden_layers=architecture.layers,
        num_attention_heads=architecture.attention_heads,
        num_key_value_heads=architecture.key_value_heads,
        max_position_embeddings=architecture.context_length,
        rope_parameters={"rope_type": "default", "rope_theta": architecture.rope_theta},
        rms_norm_eps=architecture.norm_epsilon,
        initializer_range=architecture.initializer_std,
        tie_word_embeddings=architecture.tie_embeddings,
        bos_token_id=begin_id,
        eos_token_id=end_id,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)
