"""Drawing tokens: the distribution, the nucleus, and independence from the rest of the batch."""

import math

import pytest
import torch

from llama2_chat.generation import sampling
from llama2_chat.generation.sampling import draw, uniforms_for_prompt


def drawn(logits, uniforms, *, temperature: float = 1.0, top_p: float = 1.0) -> list:
    tokens, _ = draw(logits, uniforms, temperature=temperature, top_p=top_p)
    return tokens.tolist()


def test_a_uniform_number_falls_into_its_tokens_interval() -> None:
    logits = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64).log()
    uniforms = torch.tensor([[0.0, 0.1999, 0.2001, 0.6999, 0.7001, 0.999999]])
    assert drawn(logits, uniforms) == [[0, 0, 1, 1, 2, 2]]
    assert drawn(logits.repeat(6, 1), uniforms.T) == [[0], [0], [1], [1], [2], [2]]


@pytest.mark.parametrize("size", [3, 127, 128, 129, 256, 300, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_draws_invert_the_whole_cumulative_distribution(size: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn(4, size, generator=generator) * 3
    uniforms = torch.rand(4, 500, generator=generator, dtype=torch.float64)
    tokens, logprobs = draw(logits, uniforms, temperature=temperature, top_p=1.0)
    ends = torch.softmax(logits.double() / temperature, -1).cumsum(-1)
    expected = torch.searchsorted(ends, uniforms, right=True)
    # Where a number lies within rounding of a boundary either side is right.
    clear = (ends[:, None, :] - uniforms[:, :, None]).abs().amin(-1) > 1e-6
    assert clear.float().mean() > 0.99
    assert torch.equal(tokens[clear], expected[clear])
    oracle = torch.log_softmax(logits.double(), -1).gather(-1, tokens)
    assert (logprobs - oracle).abs().max() < 1e-5


def test_temperature_follows_its_definition() -> None:
    # p^(1/T) renormalised at T = 0.5: squares 0.04, 0.25, 0.09 of sum 0.38
    logits = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64).log()
    bounds = [0.04 / 0.38, 0.29 / 0.38]
    for uniform, token in ((bounds[0] - 1e-6, 0), (bounds[0] + 1e-6, 1), (bounds[1] + 1e-6, 2)):
        assert drawn(logits, torch.tensor([[uniform]], dtype=torch.float64), temperature=0.5) == [[token]]


def test_temperature_zero_is_greedy() -> None:
    tokens, logprobs = draw(
        torch.tensor([[0.0, 3.0, 1.0]]), torch.tensor([[0.999]]), temperature=0.0, top_p=1.0
    )
    assert tokens.tolist() == [[1]]
    assert logprobs.item() == pytest.approx(3 - math.log(1 + math.exp(3) + math.exp(1)), abs=1e-6)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.69, [1, 3]), (0.71, [1, 2, 3]), (0.01, [1]), (0.999, [0, 1, 2, 3])]
)
def test_nucleus_is_the_smallest_set_that_reaches_p(top_p: float, kept: list[int]) -> None:
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    uniforms = torch.linspace(0, 1, 2001, dtype=torch.float64)[None, :-1]
    tokens = torch.tensor(drawn(logits, uniforms, top_p=top_p))
    assert tokens.unique().tolist() == kept
    probabilities = logits.exp()[0, kept]
    shares = torch.stack([(tokens == token).float().mean() for token in kept])
    assert (shares - probabilities / probabilities.sum()).abs().max() < 1e-3


def test_a_nucleus_of_more_tokens_than_are_sorted_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 300, generator=generator) * torch.tensor([0.1, 0.5, 1, 2, 4, 8])[:, None]
    uniforms = torch.rand(6, 50, generator=generator, dtype=torch.float64)
    whole = drawn(logits, uniforms, top_p=0.8)  # 300 are sorted at once
    monkeypatch.setattr(sampling, "_NUCLEUS", 10)
    assert drawn(logits, uniforms, top_p=0.8) == whole
    assert len({token for row in whole[:2] for token in row}) > 20


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    logits = torch.full((1, 300), -torch.inf)
    logits[0, 140] = 0.0
    uniforms = torch.tensor([[0.0, 0.5, 1 - 1e-12, 1 - 2**-53]], dtype=torch.float64)
    for top_p in (1.0, 0.9):
        assert drawn(logits, uniforms, top_p=top_p) == [[140] * 4]


def test_uniforms_depend_on_seed_and_prompt_and_not_on_the_number_of_samples() -> None:
    few, many = uniforms_for_prompt(1, [5, 6], 2, 7), uniforms_for_prompt(1, [5, 6], 9, 7)
    assert torch.equal(few, many[:2])
    assert not torch.equal(few, uniforms_for_prompt(2, [5, 6], 2, 7))
    assert not torch.equal(few, uniforms_for_prompt(1, [56], 2, 7))
    assert 0 <= float(many.min()) <= float(many.max()) < 1
