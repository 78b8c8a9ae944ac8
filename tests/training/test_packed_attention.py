"""Attention piece by piece: equal to transformers' own masked attention, wherever a model may meet it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from llama2_chat.packed_attention import PACKED_ATTENTION, pieces_of, use_packed_attention

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 64,
}
PIECES = [[5, 1, 6], [12], [4, 8]]


def a_model(family: str = "llama", **options: object) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES, **options)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


@pytest.fixture
def packed() -> tuple[Tensor, Tensor]:
    """Rows of several pieces: ids and positions, (3, 12) each."""
    ids = torch.randint(0, 50, (3, 12), generator=torch.Generator().manual_seed(1))
    return ids, torch.stack([torch.cat([torch.arange(n) for n in row]) for row in PIECES])


@pytest.fixture
def dense_products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many queries each product of attention had."""
    seen: list[int] = []
    original = torch.nn.functional.scaled_dot_product_attention

    def recorded(query: Tensor, *args: object, **kwargs: object) -> Tensor:
        seen.append(query.shape[2])
        return original(query, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    return seen


def loss_and_gradients(
    model: PreTrainedModel, ids: Tensor, positions: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_lengths_of_the_pieces(packed: tuple[Tensor, Tensor]) -> None:
    pieces = pieces_of(packed[1])
    assert [piece.length for piece in pieces] == [5, 1, 6, 12, 4, 8]
    assert not any(piece.before for piece in pieces)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_loss_and_gradients_equal_the_masked_attention(family: str, packed: tuple[Tensor, Tensor]) -> None:
    """Against transformers' block-diagonal mask and against every piece computed alone."""
    model = a_model(family, **({"sliding_window": None} if family == "mistral" else {}))
    loss, gradients = loss_and_gradients(model, *packed)
    assert use_packed_attention(model)
    ours, own_gradients = loss_and_gradients(model, *packed)
    torch.testing.assert_close(ours, loss, rtol=1e-6, atol=1e-6)
    assert own_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(own_gradients[name], gradient, rtol=1e-5, atol=1e-6)
    ids, positions = packed
    with torch.no_grad():
        together = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        for row, pieces in enumerate(PIECES):
            alone = [model(input_ids=piece[None]).logits[0] for piece in ids[row].split(pieces)]
            torch.testing.assert_close(together[row], torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_nothing_between_the_pieces_is_computed(
    packed: tuple[Tensor, Tensor], dense_products: list[int]
) -> None:
    model = a_model()
    assert use_packed_attention(model)
    with torch.no_grad():
        model(input_ids=packed[0], position_ids=packed[1], use_cache=False)
    assert dense_products == [5, 1, 6, 12, 4, 8] * 2


def test_gradient_checkpointing_recomputes_the_same(packed: tuple[Tensor, Tensor]) -> None:
    model = a_model()
    assert use_packed_attention(model)
    _, plain = loss_and_gradients(model, *packed)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    _, recomputed = loss_and_gradients(model, *packed)
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient)


def test_padding_and_cache_are_as_before(packed: tuple[Tensor, Tensor]) -> None:
    """Left-padded prompts, then one token after the other: the same logits as with transformers' own attention."""
    model, ids = a_model(), packed[0]
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    def prefill_and_two_steps() -> list[Tensor]:
        with torch.no_grad():
            output = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True)
            logits, cache, longer, at = [output.logits[mask.bool()]], output.past_key_values, mask, positions
            for token in (7, 9):
                longer = torch.cat([longer, torch.ones(3, 1, dtype=torch.long)], dim=1)
                at = at[:, -1:] + 1
                step = model(
                    input_ids=torch.full((3, 1), token),
                    attention_mask=longer,
                    position_ids=at,
                    past_key_values=cache,
                )
                logits.append(step.logits)
        return logits

    theirs = prefill_and_two_steps()
    assert use_packed_attention(model)
    for one, other in zip(prefill_and_two_steps(), theirs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("family", "options"),
    [("mistral", {"sliding_window": 4}), ("llama", {"attention_dropout": 0.1}), ("gpt2", {})],
)
def test_other_attention_stays_as_it_is(family: str, options: dict[str, object]) -> None:
    model = a_model(family, **options)
    assert not use_packed_attention(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_saved_model_does_not_name_it(tmp_path: object) -> None:
    model = a_model()
    assert use_packed_attention(model)
    assert model.config._attn_implementation == PACKED_ATTENTION
    model.save_pretrained(str(tmp_path))
    saved, _ = PretrainedConfig.get_config_dict(str(tmp_path))
    assert PACKED_ATTENTION not in str(saved)
    assert LlamaForCausalLM.from_pretrained(str(tmp_path)).config._attn_implementation == "sdpa"
    assert isinstance(model.config, LlamaConfig)
