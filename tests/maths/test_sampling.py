"""Drawing tokens: the distribution, the nucleus, and independence from the rest of the batch."""

import torch

from llama2_chat.generation.sampling import draw, keep_nucleus, uniforms_for_prompt


def test_a_uniform_number_falls_into_its_tokens_interval() -> None:
    probabilities = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    logits = probabilities.log().repeat(6, 1)
    uniforms = torch.tensor([0.0, 0.1999, 0.2001, 0.6999, 0.7001, 0.999999])
    assert draw(logits, uniforms, temperature=1.0, top_p=1.0).tolist() == [0, 0, 1, 1, 2, 2]


def test_temperature_follows_its_definition() -> None:
    # p^(1/T) renormalised at T = 0.5: squares 0.04, 0.25, 0.09 of sum 0.38
    logits = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64).log()
    bounds = [0.04 / 0.38, 0.29 / 0.38]
    for uniform, token in ((bounds[0] - 1e-6, 0), (bounds[0] + 1e-6, 1), (bounds[1] + 1e-6, 2)):
        drawn = draw(logits, torch.tensor([uniform], dtype=torch.float64), temperature=0.5, top_p=1.0)
        assert drawn.item() == token


def test_temperature_zero_is_greedy() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    assert draw(logits, torch.tensor([0.999]), temperature=0.0, top_p=1.0).item() == 1


def test_nucleus_is_the_smallest_set_that_reaches_p() -> None:
    probabilities = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    assert (keep_nucleus(probabilities, 0.69) > 0).tolist() == [[False, True, False, True]]
    assert (keep_nucleus(probabilities, 0.71) > 0).tolist() == [[False, True, True, True]]
    assert (keep_nucleus(probabilities, 0.01) > 0).tolist() == [[False, True, False, False]]


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    for uniform in (0.0, 0.5, 1 - 1e-12):
        drawn = draw(logits, torch.tensor([uniform], dtype=torch.float64), temperature=1.0, top_p=1.0)
        assert drawn.item() == 1


def test_uniforms_depend_on_seed_and_prompt_and_not_on_the_number_of_samples() -> None:
    few, many = uniforms_for_prompt(1, [5, 6], 2, 7), uniforms_for_prompt(1, [5, 6], 9, 7)
    assert torch.equal(few, many[:2])
    assert not torch.equal(few, uniforms_for_prompt(2, [5, 6], 2, 7))
    assert not torch.equal(few, uniforms_for_prompt(1, [56], 2, 7))
    assert 0 <= float(many.min()) <= float(many.max()) < 1
