"""The architecture: parameters counted by hand, the forward pass against one written from the papers."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import LlamaForCausalLM

from llama2_chat.pretrain.config import Architecture, PretrainConfig
from llama2_chat.pretrain.model import feed_forward_size, new_model

SMALL = Architecture(hidden_size=32, layers=2, attention_heads=4, key_value_heads=2, context_length=64)


def build(architecture: Architecture, seed: int = 0) -> LlamaForCausalLM:
    return new_model(architecture, vocabulary_size=300, begin_id=1, end_id=2, seed=seed)


def test_parameters_are_those_of_the_architecture() -> None:
    # per layer: q and o 32x32, k and v 32x16 (2 of 4 heads, 8 wide), feed-forward 3 of 32x88, 2 norms
    assert feed_forward_size(SMALL) == 88  # 8/3 x 32 = 85.3, in steps of 8
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 88 + 2 * 32
    expected = 2 * layer + 32 + 2 * 300 * 32  # last norm, embeddings and head
    assert sum(p.numel() for p in build(SMALL).parameters()) == expected
    tied = build(SMALL.model_copy(update={"tie_embeddings": True}))
    assert sum(p.numel() for p in tied.parameters()) == expected - 300 * 32
    assert not [name for name, _ in tied.named_parameters() if "bias" in name]


@pytest.mark.parametrize(("hidden", "expected"), [(96, 256), (128, 344), (4096, 10928)])
def test_feed_forward_width(hidden: int, expected: int) -> None:
    assert feed_forward_size(Architecture(hidden_size=hidden, attention_heads=2)) == expected


def test_weights_are_a_function_of_the_seed() -> None:
    one, same, other = (build(SMALL, seed).state_dict() for seed in (1, 1, 2))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one[name], other[name])
    assert one[name].std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True},
        {"key_value_heads": 4},
        {"key_value_heads": 1, "feed_forward_size": 24},
        {"rope_theta": 100.0, "norm_epsilon": 0.1},
    ],
)
def test_forward_is_that_of_the_papers(changes: dict[str, object]) -> None:
    # Wide weights, or attention would be near uniform and a wrong rotation would hardly show.
    architecture = Architecture(**{**SMALL.model_dump(), "initializer_std": 0.3, **changes})
    model = build(architecture).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
        ids = torch.randint(0, 300, (24,), generator=generator)
        found = model(input_ids=ids[None]).logits[0].double()
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    expected = llama_from_the_papers(ids, weights, architecture)
    assert expected.std() > 1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def llama_from_the_papers(ids: Tensor, weights: dict[str, Tensor], of: Architecture) -> Tensor:
    """Logits (S, V), token by token and head by head, in float64."""
    size = of.hidden_size // of.attention_heads
    group = of.attention_heads // of.key_value_heads
    x_SC = weights["model.embed_tokens.weight"][ids]
    for layer in range(of.layers):

        def w(name: str, layer: int = layer) -> Tensor:
            return weights[f"model.layers.{layer}.{name}.weight"]

        h_SC = rms_norm(x_SC, w("input_layernorm"), of.norm_epsilon)
        q, k, v = (h_SC @ w(f"self_attn.{name}_proj").T for name in "qkv")
        heads = []
        for head in range(of.attention_heads):
            mine = slice(head * size, (head + 1) * size)
            shared = slice(head // group * size, (head // group + 1) * size)
            q_SD, k_SD = rotated(q[:, mine], of.rope_theta), rotated(k[:, shared], of.rope_theta)
            out = []
            for t in range(len(ids)):
                scores = torch.stack([q_SD[t] @ k_SD[s] / math.sqrt(size) for s in range(t + 1)])
                out.append(torch.softmax(scores, 0) @ v[: t + 1, shared])
            heads.append(torch.stack(out))
        x_SC = x_SC + torch.cat(heads, 1) @ w("self_attn.o_proj").T
        h_SC = rms_norm(x_SC, w("post_attention_layernorm"), of.norm_epsilon)
        gate = h_SC @ w("mlp.gate_proj").T
        x_SC = x_SC + (gate / (1 + torch.exp(-gate)) * (h_SC @ w("mlp.up_proj").T)) @ w("mlp.down_proj").T
    head_VC = weights["model.embed_tokens.weight" if of.tie_embeddings else "lm_head.weight"]
    return rms_norm(x_SC, weights["model.norm.weight"], of.norm_epsilon) @ head_VC.T


def rms_norm(x_SC: Tensor, gain_C: Tensor, epsilon: float) -> Tensor:
    return gain_C * x_SC / torch.sqrt((x_SC**2).mean(1, keepdim=True) + epsilon)


def rotated(x_SD: Tensor, theta: float) -> Tensor:
    """Places i and i + D/2 are one complex number, turned by position · theta^(-2i/D)."""
    half = x_SD.shape[1] // 2
    angles = torch.arange(len(x_SD)).double()[:, None] * theta ** (-torch.arange(half).double() / half)
    turned = torch.complex(x_SD[:, :half], x_SD[:, half:]) * torch.exp(1j * angles)
    return torch.cat([turned.real, turned.imag], 1)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 36, "attention_heads": 8}, "hidden_size 36 must be a multiple"),
        ({"attention_heads": 4, "key_value_heads": 3}, "key_value_heads 3 must divide attention_heads 4"),
        ({"layers": 0}, "greater than or equal to 1"),
        ({"depth": 3}, "Extra inputs are not permitted"),
    ],
)
def test_impossible_architectures_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Architecture(**sizes)


def test_rows_longer_than_the_context_are_refused() -> None:
    with pytest.raises(
        ValidationError, match=r"sequence_length 4096 exceeds architecture\.context_length 64"
    ):
        PretrainConfig(text="text.jsonl", architecture=SMALL)
