"""The sampling engine against transformers' own generate and against itself in other batches."""

from __future__ import annotations

import random

import pytest
import torch

from llama2_chat.generation.transformers_engine import TransformersEngine
from llama2_chat.logprobs import response_logprobs
from llama2_chat.settings import SamplingConfig

STOP = 2


@pytest.fixture
def prompts() -> list[list[int]]:
    rng = random.Random(1)
    return [[1] + [rng.randrange(3, 50) for _ in range(rng.randrange(1, 12))] for _ in range(13)]


def engine(model) -> TransformersEngine:
    # The random model seldom stops: make the stop token likely enough that rows end at different steps.
    with torch.no_grad():
        model.lm_head.weight[STOP] += 0.02
    return TransformersEngine(model, stop_id=STOP, padding_id=0)


def test_greedy_equals_transformers_generate(tiny_llama, prompts) -> None:
    model = tiny_llama()
    ours = engine(model).generate(
        prompts, samples_per_prompt=1, sampling=SamplingConfig(temperature=0.0, max_new_tokens=15), seed=0
    )
    for prompt, (response,) in zip(prompts, ours, strict=True):
        theirs = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=15,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        assert response.token_ids == theirs


@pytest.mark.parametrize("budget", [1, 100, 400, 10**6])
def test_samples_depend_on_seed_and_prompt_not_on_the_batch(tiny_llama, prompts, budget: int) -> None:
    made = engine(tiny_llama())
    sampling = SamplingConfig(temperature=1.0, max_new_tokens=12, token_budget=budget)
    together = made.generate(prompts, samples_per_prompt=5, sampling=sampling, seed=7)
    assert [len(row) for row in together] == [5] * len(prompts)
    alone = [made.generate([p], samples_per_prompt=5, sampling=sampling, seed=7)[0] for p in prompts]
    assert [[r.token_ids for r in row] for row in together] == [[r.token_ids for r in row] for row in alone]
    finished = [r.finish_reason for row in together for r in row]
    assert {"stop", "length"} == set(finished)
    other = made.generate(prompts, samples_per_prompt=5, sampling=sampling, seed=8)
    assert [r.token_ids for r in other[0]] != [r.token_ids for r in together[0]]


def test_log_probabilities_are_the_models_at_temperature_one(tiny_llama, prompts) -> None:
    model = tiny_llama()
    sampling = SamplingConfig(temperature=0.7, top_p=0.9, max_new_tokens=9)
    rows = engine(model).generate(prompts, samples_per_prompt=3, sampling=sampling, seed=0)
    flat_prompts = [p for p, row in zip(prompts, rows, strict=True) for _ in row]
    flat = [response for row in rows for response in row]
    again = response_logprobs(model, flat_prompts, [r.token_ids for r in flat], padding_id=0)
    for prompt, response, values in zip(flat_prompts, flat, again, strict=True):
        assert len(values) == len(response.token_ids)
        logits = model(input_ids=torch.tensor([prompt + response.token_ids])).logits[0].log_softmax(-1)
        oracle = [logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(response.token_ids)]
        assert values == pytest.approx(oracle, abs=1e-5)
        assert response.logprobs == pytest.approx(oracle, abs=1e-5)


def test_sample_frequencies_follow_the_model(tiny_llama) -> None:
    model = tiny_llama()
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[1, 9]])).logits[0, -1].softmax(-1)
    (row,) = TransformersEngine(model, stop_id=STOP, padding_id=0).generate(
        [[1, 9]], samples_per_prompt=20_000, sampling=SamplingConfig(max_new_tokens=1), seed=0
    )
    counts = torch.bincount(torch.tensor([r.token_ids[0] for r in row]), minlength=50) / 20_000
    # The largest of 50 deviations of a frequency with standard error below sqrt(0.03 / 20000) = 0.0012.
    assert (counts - expected).abs().max() < 5e-3


def test_a_response_that_stops_ends_with_the_stop_token(tiny_llama, prompts) -> None:
    rows = engine(tiny_llama()).generate(
        prompts, samples_per_prompt=4, sampling=SamplingConfig(max_new_tokens=12), seed=0
    )
    for response in (r for row in rows for r in row):
        assert STOP not in response.token_ids[:-1]
        assert (response.token_ids[-1] == STOP) == (response.finish_reason == "stop")
        assert len(response.logprobs) == len(response.token_ids) <= 12
