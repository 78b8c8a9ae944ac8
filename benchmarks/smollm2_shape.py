"""Shapes that the benchmarks train and sample with random weights: SmolLM2-135M's, and a small Llama's."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig


def smollm2_shape(layers: int = 30) -> LlamaConfig:
    """Hidden size 576, 9 heads with 3 for keys and values, vocabulary 49,152, tied; 135M parameters at 30 layers."""
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        rope_theta=100000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )


def small_shape(**changes: Any) -> LlamaConfig:
    """A Llama of 5 million parameters: hidden size 256, 6 layers, vocabulary 2,048; with these values changed."""
    values = {
        "vocab_size": 2048,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
    }
    return LlamaConfig(**values | changes)
