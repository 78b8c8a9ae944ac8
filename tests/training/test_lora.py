"""Low-rank adapters: what they train, that merging changes no output, that a resumed run ends the same."""

from __future__ import annotations

import json

import pytest
import small_sft
import torch

from llama2_chat.errors import UserInputError
from llama2_chat.lora import (
    adapter_disabled,
    load_trained_weights,
    merged,
    plain_model,
    save_trained_weights,
    share_frozen_weights,
    with_adapter,
)
from llama2_chat.settings import LoraConfig

LORA = {"rank": 4, "alpha": 8, "dropout": 0.1}


def train(model, dialogues, settings, directory, **changes):
    return small_sft.train(
        model, dialogues, settings, directory, **{"learning_rate": 1e-2, "lora": LORA, **changes}
    )


def weights(model) -> dict[str, bytes]:
    return {name: p.detach().numpy().tobytes() for name, p in model.named_parameters()}


def test_the_product_is_alpha_over_rank_times_b_a(tiny_llama) -> None:
    model = with_adapter(tiny_llama(), LoraConfig(rank=2, alpha=6, target_modules=["q_proj"]), 0)
    layer = plain_model(model).model.layers[0].self_attn.q_proj
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.nn.init.normal_(up)
    expected = layer.base_layer.weight + 6 / 2 * up @ down
    whole = merged(model)
    torch.testing.assert_close(whole.model.layers[0].self_attn.q_proj.weight, expected, rtol=1e-6, atol=1e-7)


def test_a_fresh_adapter_changes_nothing_and_is_all_that_is_trained(tiny_llama) -> None:
    ids = torch.tensor([[1, 7, 9, 30, 5]])
    plain, adapted = tiny_llama(), with_adapter(tiny_llama(), LoraConfig(rank=4), 0)
    assert torch.equal(adapted(input_ids=ids).logits, plain(input_ids=ids).logits)
    trained = {name: p.numel() for name, p in adapted.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    # Rank 4 on the seven linear layers of two blocks: 4 · (inputs + outputs) each; hidden 32, FFN 48, keys 16.
    sides = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
    assert sum(trained.values()) == 2 * sum(4 * (a + b) for a, b in sides)


def test_the_adapter_depends_on_the_seed_alone(tiny_llama) -> None:
    def adapter(seed: int) -> dict[str, bytes]:
        torch.rand(3)
        return weights(with_adapter(tiny_llama(), LoraConfig(), seed))

    assert adapter(1) == adapter(1)
    assert adapter(1) != adapter(2)


def with_random_adapter(model):
    """An adapter that changes what the model computes, as a fresh one does not."""
    adapted = with_adapter(model, LoraConfig(rank=4), 0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted


def test_a_merged_model_computes_what_the_adapted_one_did(tiny_llama) -> None:
    ids = torch.tensor([[1, 7, 9, 30, 5]])
    adapted = with_random_adapter(tiny_llama())
    before = adapted(input_ids=ids).logits
    whole = merged(adapted)
    assert type(whole) is type(tiny_llama())
    assert list(weights(whole)) == list(weights(tiny_llama()))
    assert all(parameter.requires_grad for parameter in whole.parameters())
    torch.testing.assert_close(whole(input_ids=ids).logits, before, rtol=1e-5, atol=1e-6)
    assert (before - tiny_llama()(input_ids=ids).logits).abs().max() > 1e-3


def test_without_lora_there_is_no_adapter(tiny_llama, dialogues, settings, stage_directory) -> None:
    model, directory = tiny_llama(), stage_directory()
    assert with_adapter(model, None, 0) is merged(model) is plain_model(model) is model
    train(model, dialogues, settings, directory, lora=None)
    assert not directory.adapter.exists()


def test_training_lowers_the_loss(tiny_llama, dialogues, settings, stage_directory) -> None:
    model = tiny_llama()
    # The head stands still, and as it is made it is too small for any hidden state to tell tokens apart.
    model.lm_head.weight.data *= 20
    lora = {"rank": 8, "alpha": 16}
    metrics = train(model, dialogues, settings, stage_directory(), lora=lora, epochs=8)
    assert metrics["loss_last"] < 0.6 * metrics["loss_first"]


def test_only_the_named_layers_change(tiny_llama, dialogues, settings, stage_directory) -> None:
    model = tiny_llama()
    train(
        model, dialogues, settings, stage_directory(), lora={**LORA, "target_modules": ["q_proj", "up_proj"]}
    )
    before, after = weights(tiny_llama()), weights(model)
    assert list(before) == list(after)
    changed = {name.rsplit(".", 2)[1] for name in before if before[name] != after[name]}
    assert changed == {"q_proj", "up_proj"}


def test_a_checkpoint_holds_the_adapter_alone(tiny_llama, dialogues, settings, stage_directory) -> None:
    directory = stage_directory()
    train(tiny_llama(), dialogues, settings, directory)
    kept = sorted(directory.checkpoints.glob("checkpoint-*"))
    assert len(kept) == 2
    for folder in kept:
        assert [file.name for file in folder.glob("*.safetensors")] == ["adapter_model.safetensors"]


@pytest.mark.parametrize("stop_after", [1, 4])
def test_interrupted_and_resumed_equals_uninterrupted_to_the_byte(
    tiny_llama, dialogues, settings, stage_directory, interrupted_after, stop_after: int
) -> None:
    """A run stopped by a signal and continued against one that ran through: weights and metrics."""
    whole, directory = tiny_llama(), stage_directory("whole")
    train(whole, dialogues, settings, directory)

    interrupted = stage_directory("interrupted")
    with interrupted_after(stop_after):
        train(tiny_llama(), dialogues, settings, interrupted)
    assert len(interrupted.metrics_file.read_text().splitlines()) == stop_after
    resumed = tiny_llama()
    train(resumed, dialogues, settings, interrupted)
    assert weights(resumed) == weights(whole)
    assert interrupted.metrics_file.read_bytes() == directory.metrics_file.read_bytes()


def test_activations_that_are_computed_again_give_the_same_run(
    tiny_llama, dialogues, settings, stage_directory
) -> None:
    kept, again = tiny_llama(), tiny_llama()
    lora = {**LORA, "dropout": 0.0}
    train(kept, dialogues, settings, stage_directory("kept"), lora=lora)
    train(again, dialogues, settings, stage_directory("again"), lora=lora, gradient_checkpointing=True)
    for name in ("kept", "again"):
        rows = [json.loads(line) for line in stage_directory(name).metrics_file.read_text().splitlines()]
        assert all(row["grad_norm"] > 0 for row in rows)
    for a, b in zip(kept.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_module_that_is_not_there_is_named(tiny_llama) -> None:
    with pytest.raises(UserInputError, match=r"target_modules: c_attn not in this LlamaForCausalLM.*q_proj"):
        with_adapter(tiny_llama(), LoraConfig(target_modules=["q_proj", "c_attn"]), 0)


def test_frozen_weights_are_shared_where_they_are_equal(tiny_llama) -> None:
    """By name, whatever wraps them: the first layer's are not equal, the adapter's are trained."""
    owner, model = tiny_llama().requires_grad_(False), with_adapter(tiny_llama(), LoraConfig(rank=2), 0)
    owner.model.layers[0].self_attn.q_proj.weight.data += 1.0
    logits = model(input_ids=torch.tensor([[1, 7, 9]])).logits
    shared = share_frozen_weights(model, owner)
    assert (
        shared
        == sum(p.numel() for p in owner.parameters()) - owner.model.layers[0].self_attn.q_proj.weight.numel()
    )
    assert share_frozen_weights(model, owner) == 0
    inner = plain_model(model)
    same = [
        a.base_layer.weight.data_ptr() == b.weight.data_ptr()
        for a, b in (
            (inner.model.layers[0].self_attn.q_proj, owner.model.layers[0].self_attn.q_proj),
            (inner.model.layers[1].self_attn.q_proj, owner.model.layers[1].self_attn.q_proj),
        )
    ]
    assert same == [False, True]
    assert torch.equal(model(input_ids=torch.tensor([[1, 7, 9]])).logits, logits)


def test_weights_in_training_are_never_shared(tiny_llama) -> None:
    assert share_frozen_weights(tiny_llama(), tiny_llama().requires_grad_(False)) == 0
    assert share_frozen_weights(tiny_llama().requires_grad_(False), tiny_llama()) == 0


def test_the_disabled_adapter_computes_the_base_to_the_bit(tiny_llama) -> None:
    ids = torch.tensor([[1, 7, 9, 30, 5]])
    adapted = with_random_adapter(tiny_llama())
    before = adapted(input_ids=ids).logits
    with adapter_disabled(adapted):
        assert torch.equal(adapted(input_ids=ids).logits, tiny_llama()(input_ids=ids).logits)
    assert torch.equal(adapted(input_ids=ids).logits, before)
    assert all(p.requires_grad == ("lora_" in name) for name, p in adapted.named_parameters())


def test_trained_weights_come_back_and_others_are_refused(tiny_llama, tmp_path) -> None:
    file = tmp_path / "adapter.safetensors"
    one, other = (with_adapter(tiny_llama(), LoraConfig(rank=4), seed) for seed in (1, 2))
    save_trained_weights(one, file)
    assert weights(one) != weights(other)
    load_trained_weights(other, file)
    assert weights(one) == weights(other)
    fewer = with_adapter(tiny_llama(), LoraConfig(rank=4, target_modules=["q_proj"]), 0)
    with pytest.raises(
        UserInputError, match=r"adapter\.safetensors: holds other weights than those in training"
    ):
        load_trained_weights(fewer, file)
