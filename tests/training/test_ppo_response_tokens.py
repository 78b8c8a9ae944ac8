"""Log-probabilities and values of packed responses against one sample at a time under the model's own forward."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import LlamaForSequenceClassification

from llama2_chat import logprobs
from llama2_chat.logprobs import response_logprobs
from llama2_chat.packed_attention import use_packed_attention
from llama2_chat.ppo.response_tokens import (
    pack_responses,
    policy_logprobs,
    response_mask,
    to_grid,
    token_values,
)
from llama2_chat.reward.pooling import row_layout

CPU = torch.device("cpu")


@pytest.fixture
def samples() -> tuple[list[list[int]], list[list[int]]]:
    rng = random.Random(0)
    prompts = [[1, *(rng.randrange(3, 50) for _ in range(rng.randrange(9)))] for _ in range(12)]
    responses = [[rng.randrange(3, 50) for _ in range(rng.randrange(1, 8))] for _ in range(12)]
    return prompts, responses


def flat(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor([value for row in rows for value in row])


@pytest.mark.parametrize("padding_id", [0, 2, 17])
def test_logprobs_equal_one_sample_at_a_time(tiny_llama, samples, padding_id: int) -> None:
    model = tiny_llama()
    prompts, responses = samples
    tokens = pack_responses(prompts, responses, padding_id=padding_id, device=CPU)
    assert len(tokens.input_ids) < len(prompts)
    assert tokens.targets.tolist() == [token for response in responses for token in response]
    with torch.no_grad():
        found = policy_logprobs(model, tokens)
        expected = []
        for prompt, response in zip(prompts, responses, strict=True):
            logits = model(torch.tensor([[*prompt, *response]])).logits[0]
            for place, token in enumerate(response, start=len(prompt) - 1):
                expected.append(torch.log_softmax(logits[place], -1)[token])
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-5)
    shared = flat(response_logprobs(model, prompts, responses, padding_id=padding_id))
    torch.testing.assert_close(found, shared, rtol=1e-5, atol=1e-5)


def test_one_row_holds_no_padding_and_says_the_same(tiny_llama, samples) -> None:
    model = tiny_llama()
    assert use_packed_attention(model)
    prompts, responses = samples
    rows = pack_responses(prompts, responses, padding_id=0, device=CPU)
    one = pack_responses(prompts, responses, padding_id=0, device=CPU, layout=row_layout(model))
    assert one.input_ids.shape == (1, sum(map(len, prompts + responses)))
    with torch.no_grad():
        torch.testing.assert_close(
            policy_logprobs(model, one), policy_logprobs(model, rows), rtol=1e-5, atol=1e-6
        )


def test_the_last_feed_forward_network_sees_response_tokens_alone(tiny_llama, samples) -> None:
    model = tiny_llama()
    prompts, responses = samples
    tokens = pack_responses(prompts, responses, padding_id=0, device=CPU)
    seen = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[:-1].numel()))
    policy_logprobs(model, tokens)
    assert seen == [tokens.input_ids.numel(), len(tokens.targets)]
    seen.clear()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    policy_logprobs(model, tokens)
    assert seen == [tokens.input_ids.numel()] * 2


def test_equal_pairs_are_computed_once_and_in_place(tiny_llama) -> None:
    # The last but one holds the tokens of the first, parted elsewhere; the last is the first again.
    prompts, responses = [[3, 4], [3, 4], [3], [3, 4]], [[5], [6, 7], [4, 5], [5]]
    model, rows = tiny_llama(), []
    model.register_forward_pre_hook(
        lambda _, args, given: rows.append(len(given["input_ids"])), with_kwargs=True
    )
    found = response_logprobs(model, prompts, responses, padding_id=0)
    assert sum(rows) == 3
    alone = [
        response_logprobs(model, [prompt], [response], padding_id=0)[0]
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    for together, expected in zip(found, alone, strict=True):
        assert together == pytest.approx(expected, rel=1e-6)
    assert found[0] is not found[3]


def test_a_value_is_read_before_its_token(tiny_llama, samples) -> None:
    config = tiny_llama().config
    config.num_labels = 1
    config.pad_token_id = 0
    torch.manual_seed(1)
    model = LlamaForSequenceClassification(config).eval()
    prompts, responses = samples
    with torch.no_grad():
        found = token_values(model, pack_responses(prompts, responses, padding_id=0, device=CPU))
        expected = []
        for prompt, response in zip(prompts, responses, strict=True):
            for length in range(len(response)):
                # The state before a token holds neither it nor what follows.
                hidden = model.model(torch.tensor([[*prompt, *response[:length]]])).last_hidden_state
                expected.append(model.score(hidden[0, -1]).squeeze())
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_the_grid_holds_each_response_in_its_row_and_lets_gradients_through() -> None:
    mask = response_mask([[5], [6, 7, 8], [9, 9]])
    assert mask.tolist() == [[True, False, False], [True, True, True], [True, True, False]]
    values = torch.arange(1.0, 7.0, requires_grad=True)
    grid = to_grid(values, mask)
    assert grid.tolist() == [[1, 0, 0], [2, 3, 4], [5, 6, 0]]
    (grid * torch.arange(9.0).view(3, 3)).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [0, 3, 4, 5, 6, 7]


def test_a_forward_pass_makes_no_more_logits_than_its_budget(tiny_llama, samples, monkeypatch) -> None:
    model, (prompts, responses) = tiny_llama(), samples
    whole = response_logprobs(model, prompts, responses, padding_id=0)
    budget = 40 * model.config.vocab_size
    monkeypatch.setattr(logprobs, "_LOGIT_BUDGET", budget)
    made: list[int] = []
    hook = model.lm_head.register_forward_hook(lambda _, __, logits: made.append(logits.numel()))
    parts = response_logprobs(model, prompts, responses, padding_id=0)
    hook.remove()
    assert len(made) >= 3
    assert max(made) <= budget
    torch.testing.assert_close(flat(parts), flat(whole), rtol=1e-5, atol=1e-6)
