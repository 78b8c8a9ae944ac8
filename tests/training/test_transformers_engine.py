"""The sampling engine against transformers' own generate and against itself in other batches."""

from __future__ import annotations

import random
from itertools import chain
from typing import ClassVar

import pytest
import torch

from llama2_chat.generation import cohort, shared_decoding, transformers_engine
from llama2_chat.generation.transformers_engine import TransformersEngine
from llama2_chat.logprobs import response_logprobs
from llama2_chat.lora import merged_meanwhile, with_adapter
from llama2_chat.settings import LoraConfig, SamplingConfig

STOP = 2


@pytest.fixture
def prompts() -> list[list[int]]:
    rng = random.Random(1)
    return [[1] + [rng.randrange(3, 50) for _ in range(rng.randrange(1, 12))] for _ in range(13)]


@pytest.fixture(params=["cohorts", "growing cache"])
def way(request, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of sampling: by cohorts, and what architectures without plain causal attention get."""
    if request.param == "growing cache":
        monkeypatch.setattr(transformers_engine, "can_share_prompts", lambda model: False)
    return request.param


def engine(model) -> TransformersEngine:
    # The random model seldom stops: make the stop token likely enough that rows end at different steps.
    with torch.no_grad():
        model.lm_head.weight[STOP] += 0.02
    return TransformersEngine(model, stop_id=STOP, padding_id=0)


def test_greedy_equals_transformers_generate(tiny_llama, prompts, way) -> None:
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
def test_samples_depend_on_seed_and_prompt_not_on_the_batch(tiny_llama, prompts, way, budget: int) -> None:
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


def test_log_probabilities_are_the_models_at_temperature_one(tiny_llama, prompts, way) -> None:
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


def test_sample_frequencies_follow_the_model(tiny_llama, way) -> None:
    """Chi-squared of the pairs of a first and a second token against the product of their probabilities."""
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(8)  # far from uniform
        after_prompt = model(input_ids=torch.tensor([[1, 9]])).logits[0, -1].double().softmax(-1)
        ids = torch.tensor([[1, 9, token] for token in range(50)])
        after_first = model(input_ids=ids).logits[:, -1].double().softmax(-1)
    after_first[STOP] = torch.eye(50)[0]  # nothing follows it: counted as token 0
    count = 60_000
    (row,) = TransformersEngine(model, stop_id=STOP, padding_id=0).generate(
        [[1, 9]],
        samples_per_prompt=count,
        sampling=SamplingConfig(max_new_tokens=2, token_budget=30_000),
        seed=0,
    )
    pairs = torch.tensor([[*r.token_ids, 0][:2] for r in row])
    seen = torch.bincount(pairs[:, 0] * 50 + pairs[:, 1], minlength=2500).double()
    expected = (after_prompt[:, None] * after_first).flatten() * count
    common = expected >= 5
    seen = torch.cat([seen[common], seen[~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    assert len(seen) > 500
    statistic = ((seen - expected) ** 2 / expected).sum().item()
    degrees = len(seen) - 1
    assert abs(statistic - degrees) < 4 * (2 * degrees) ** 0.5  # mean and variance of chi-squared


def test_a_response_that_stops_ends_with_the_stop_token(tiny_llama, prompts, way) -> None:
    rows = engine(tiny_llama()).generate(
        prompts, samples_per_prompt=4, sampling=SamplingConfig(max_new_tokens=12), seed=0
    )
    for response in (r for row in rows for r in row):
        assert STOP not in response.token_ids[:-1]
        assert (response.token_ids[-1] == STOP) == (response.finish_reason == "stop")
        assert len(response.logprobs) == len(response.token_ids) <= 12


def test_both_ways_give_the_same_samples(tiny_llama, prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine(tiny_llama())
    sampling = SamplingConfig(temperature=1.3, top_p=0.95, max_new_tokens=14, token_budget=300)
    shared = made.generate(prompts, samples_per_prompt=4, sampling=sampling, seed=3)
    monkeypatch.setattr(transformers_engine, "can_share_prompts", lambda model: False)
    apart = made.generate(prompts, samples_per_prompt=4, sampling=sampling, seed=3)
    assert [[r.token_ids for r in row] for row in shared] == [[r.token_ids for r in row] for row in apart]
    for one, other in zip(chain(*shared), chain(*apart), strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


class Watched(cohort.Cohort):
    """Cohorts that tell what all of them hold whenever one begins."""

    everyone: ClassVar[list[cohort.Cohort]] = []
    most: ClassVar[int] = 0

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        Watched.everyone = [other for other in Watched.everyone if other.living] + [self]
        Watched.most = max(Watched.most, sum(other.held_tokens for other in Watched.everyone))


@pytest.mark.parametrize("budget", [150, 400, 1000])
def test_the_caches_stay_within_the_token_budget(
    tiny_llama, prompts, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    monkeypatch.setattr(shared_decoding, "Cohort", Watched)
    Watched.everyone, Watched.most = [], 0
    sampling = SamplingConfig(max_new_tokens=30, token_budget=budget)
    rows = engine(tiny_llama()).generate(prompts * 3, samples_per_prompt=6, sampling=sampling, seed=0)
    assert all(len(row) == 6 for row in rows)
    assert budget * 0.6 < Watched.most <= budget


def test_nothing_is_computed_for_what_has_ended_and_prompts_are_computed_once(tiny_llama, prompts) -> None:
    model = tiny_llama()
    shapes: list[torch.Size] = []
    model.model.embed_tokens.register_forward_pre_hook(lambda module, inputs: shapes.append(inputs[0].shape))
    sampling = SamplingConfig(max_new_tokens=40, token_budget=1500)
    rows = engine(model).generate(prompts, samples_per_prompt=5, sampling=sampling, seed=1)
    lengths = [len(r.token_ids) for row in rows for r in row]
    assert max(lengths) > 2 * min(lengths)
    assert sum(s[0] for s in shapes if s[1] == 1) == sum(lengths) - len(lengths)  # the last is never fed
    begun = [s for s in shapes if s[1] > 1]
    assert len(begun) > 1  # later prompts began in the place of what had ended
    assert sum(s[0] for s in begun) == len(prompts)


@pytest.mark.parametrize("limit", [1, 2])
def test_the_shortest_limits(tiny_llama, prompts, way, limit: int) -> None:
    rows = engine(tiny_llama()).generate(
        [*prompts, [1]], samples_per_prompt=3, sampling=SamplingConfig(max_new_tokens=limit), seed=0
    )
    responses = [r for row in rows for r in row]
    assert len(responses) == 42
    assert {len(r.token_ids) for r in responses} <= {1, limit}
    assert all((r.token_ids[-1] == STOP) == (r.finish_reason == "stop") for r in responses)


def test_a_model_that_always_stops_at_once(tiny_llama, prompts, way) -> None:
    model = tiny_llama()
    made = TransformersEngine(model, stop_id=STOP, padding_id=0)
    model.lm_head.register_forward_hook(
        lambda module, inputs, logits: logits.index_fill(-1, torch.tensor(STOP), 99)
    )
    rows = made.generate(prompts, samples_per_prompt=3, sampling=SamplingConfig(max_new_tokens=5), seed=0)
    assert [[r.token_ids for r in row] for row in rows] == [[[STOP]] * 3] * len(prompts)


def test_no_prompts_give_no_responses(tiny_llama, way) -> None:
    assert engine(tiny_llama()).generate([], samples_per_prompt=3, sampling=SamplingConfig(), seed=0) == []


def test_the_model_attends_as_before_afterwards(tiny_llama, prompts) -> None:
    model = tiny_llama("eager")
    ids = torch.tensor([prompts[0]])
    before = model(input_ids=ids).logits
    engine_of_it = TransformersEngine(model, stop_id=STOP, padding_id=0)
    engine_of_it.generate(prompts, samples_per_prompt=2, sampling=SamplingConfig(max_new_tokens=4), seed=0)
    assert model.config._attn_implementation == "eager"
    assert torch.equal(model(input_ids=ids).logits, before)


def test_an_adapter_is_merged_while_sampling_and_its_weights_are_the_same_afterwards(
    tiny_llama, prompts
) -> None:
    adapted = with_adapter(tiny_llama(), LoraConfig(rank=4), seed=0)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.2)
    before = {name: weight.clone() for name, weight in adapted.state_dict().items()}
    training = {name: weight.requires_grad for name, weight in adapted.named_parameters()}
    computed: list[str] = []
    for name, module in adapted.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_pre_hook(lambda module, inputs: computed.append("adapter"))
    made = TransformersEngine(adapted, stop_id=STOP, padding_id=0)
    sampling = SamplingConfig(max_new_tokens=8)
    rows = made.generate(prompts, samples_per_prompt=2, sampling=sampling, seed=0)
    assert not computed
    assert training == {name: weight.requires_grad for name, weight in adapted.named_parameters()}
    for name, weight in adapted.state_dict().items():
        assert torch.equal(weight, before[name]), name
    for prompt, row in zip(prompts, rows, strict=True):
        for response in row:
            logits = adapted(input_ids=torch.tensor([prompt + response.token_ids])).logits[0].log_softmax(-1)
            oracle = [logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(response.token_ids)]
            assert response.logprobs == pytest.approx(oracle, abs=1e-4)
    assert computed


def test_a_merged_adapter_keeps_the_weights_precision(tiny_llama, prompts) -> None:
    adapted = with_adapter(tiny_llama().to(torch.bfloat16), LoraConfig(rank=4), seed=0)
    weight = adapted.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
    with merged_meanwhile(adapted):
        assert weight.dtype == torch.bfloat16
    made = TransformersEngine(adapted, stop_id=STOP, padding_id=0)
    rows = made.generate(prompts, samples_per_prompt=2, sampling=SamplingConfig(max_new_tokens=4), seed=0)
    assert [len(row) for row in rows] == [2] * len(prompts)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_and_its_sums_as_on_other_devices(masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, 2, n, 8, generator=generator) for n in (5, 7, 7))
    mask = torch.zeros(3, 1, 1, 7)
    if masked:
        mask[1, ..., 4:] = torch.finfo(torch.float32).min
    found = cohort._attention(query, key, value, scale=0.3, mask=mask if masked else None)
    scores = (query.double() @ key.double().transpose(-1, -2)) * 0.3 + mask
    assert (found[0] - scores.softmax(-1) @ value.double()).abs().max() < 1e-6
    assert (found[1] - scores.logsumexp(-1)).abs().max() < 1e-6
    plain = cohort._by_definition(query, key, value, 0.3, mask if masked else None)
    for one, other in zip(found, plain, strict=True):
        assert (one - other).abs().max() < 1e-6


def test_prompts_of_different_length_are_computed_apart(tiny_llama, prompts, monkeypatch) -> None:
    """The same samples, in passes with less padding, and what is masked of the caches is 0."""
    made = engine(tiny_llama())
    sampling = SamplingConfig(temperature=1.0, max_new_tokens=9)
    together = made.generate(prompts, samples_per_prompt=2, sampling=sampling, seed=3)
    widths = []
    original = made.model.model.forward

    def watched(*arguments, **keywords):
        if keywords.get("past_key_values") is not None:
            widths.append(keywords["input_ids"].shape)
        return original(*arguments, **keywords)

    monkeypatch.setattr(made.model.model, "forward", watched)
    monkeypatch.setattr(cohort, "_LEAST_PREFILL_TOKENS", 1)
    apart = made.generate(prompts, samples_per_prompt=2, sampling=sampling, seed=3)
    assert [[r.token_ids for r in row] for row in apart] == [[r.token_ids for r in row] for row in together]
    assert len(widths) > 3
    computed, needed = sum(rows * width for rows, width in widths), sum(map(len, prompts))
    assert needed <= computed <= needed / 0.8


@pytest.mark.parametrize("least", [1, 512])
def test_passes_hold_every_prompt_once_and_keep_their_bound(least: int, monkeypatch) -> None:
    monkeypatch.setattr(cohort, "_LEAST_PREFILL_TOKENS", least)
    rng = random.Random(least)
    for _ in range(50):
        lengths = sorted(
            (rng.randint(1, 5000 if rng.random() < 0.1 else 400) for _ in range(30)), reverse=True
        )
        passes = list(cohort._passes(lengths))
        assert [place for start, end in passes for place in range(start, end)] == list(range(len(lengths)))
        for start, end in passes:
            assert end == start + 1 or max(lengths[start:end]) * (end - start) <= 4096
            if least == 1:
                assert min(lengths[start:end]) >= 0.8 * max(lengths[start:end])
    assert list(cohort._passes([8, 8, 8])) == [(0, 3)]
