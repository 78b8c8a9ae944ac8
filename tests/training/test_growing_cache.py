"""The cache with room holds what transformers' own holds, whatever is done to it."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from llama2_chat.generation.growing_cache import growing_cache


@pytest.mark.parametrize("room", [0, 3, 40])
def test_it_equals_the_dynamic_cache(tiny_llama, room: int) -> None:
    model = tiny_llama()
    ours, theirs = growing_cache(model.config, room), DynamicCache(config=model.config)
    torch.manual_seed(1)

    def feed(rows: int, tokens: int) -> None:
        ids = torch.randint(3, 50, (rows, tokens))
        with torch.no_grad():
            one, other = (model(input_ids=ids, past_key_values=c, use_cache=True) for c in (ours, theirs))
        assert torch.equal(one.logits, other.logits)
        assert ours.get_seq_length() == theirs.get_seq_length()
        for mine, his in zip(ours.layers, theirs.layers, strict=True):
            assert torch.equal(mine.keys, his.keys)
            assert torch.equal(mine.values, his.values)

    feed(2, 5)
    feed(2, 1)
    for cache in (ours, theirs):
        cache.batch_repeat_interleave(3)
    feed(6, 1)
    feed(6, 4)
    for cache in (ours, theirs):
        cache.batch_select_indices(torch.tensor([0, 3, 5]))
    for _ in range(5):
        feed(3, 1)


def test_appending_within_the_room_copies_nothing_that_is_held(tiny_llama) -> None:
    model = tiny_llama()
    cache = growing_cache(model.config, room=4)
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 5, 6]]), past_key_values=cache, use_cache=True)
        places = [layer.keys.data_ptr() for layer in cache.layers]
        for token in range(4):
            model(input_ids=torch.tensor([[7 + token]]), past_key_values=cache, use_cache=True)
            assert [layer.keys.data_ptr() for layer in cache.layers] == places
        model(input_ids=torch.tensor([[3]]), past_key_values=cache, use_cache=True)
    assert [layer.keys.data_ptr() for layer in cache.layers] != places
    assert cache.get_seq_length() == 8


def test_tensors_are_taken_over_with_their_free_columns(tiny_llama) -> None:
    model = tiny_llama()
    ids = torch.tensor([[1, 5, 6, 9, 12]])
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=True)
        cache = growing_cache(model.config, room=2)
        for layer, made in zip(cache.layers, whole.past_key_values.layers, strict=True):
            keys, values = (
                torch.nn.functional.pad(x[:, :, :4], (0, 0, 0, 3)) for x in (made.keys, made.values)
            )
            layer.hold(keys, values, 4)
        last = model(input_ids=ids[:, 4:], past_key_values=cache, use_cache=True)
    torch.testing.assert_close(last.logits[:, -1], whole.logits[:, -1], rtol=1e-5, atol=1e-6)
