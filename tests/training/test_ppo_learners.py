"""How PPO's models are trained: optimiser, clipping, dropout."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llama2_chat.ppo.config import PpoConfig, PpoTraining
from llama2_chat.ppo.experience import Experience, MicroBatch, Models
from llama2_chat.ppo.learners import build_learners, build_optimiser, disable_dropout
from llama2_chat.ppo.response_tokens import pack_responses
from llama2_chat.ppo.value_model import head_on

CPU = torch.device("cpu")
TOKENS = pack_responses([[1, 20, 33], [1, 7]], [[48, 5, 2], [9]], padding_id=0, device=CPU)
MASK = torch.tensor([[True, True, True], [True, False, False]])


def experience_of(advantage: float, target: float) -> Experience:
    zeros = torch.zeros(MASK.shape)
    return Experience(MASK, zeros, zeros, zeros, zeros + advantage, zeros + target)


def test_adamw_as_the_paper_sets_it(tiny_llama) -> None:
    model = tiny_llama()
    optimiser = build_optimiser(model, PpoTraining(), PpoTraining().learning_rate)
    matrices, vectors = optimiser.param_groups
    for group, decay in ((matrices, 0.1), (vectors, 0.0)):
        found = (group["lr"], group["betas"], group["eps"], group["weight_decay"])
        assert found == (1e-6, (0.9, 0.95), 1e-5, decay)
    assert all(p.dim() >= 2 for p in matrices["params"])
    assert all(p.dim() == 1 for p in vectors["params"])
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(model.parameters()))


def test_one_step_of_adamw_by_hand(tiny_llama) -> None:
    """Decay first, then g / (|g| + eps): the moments' corrections cancel in the first step."""
    model = tiny_llama()
    optimiser = build_optimiser(model, PpoTraining(), 0.01)
    norm, matrix = model.model.norm.weight, model.model.layers[0].mlp.up_proj.weight
    before = norm.detach().clone(), matrix.detach().clone()
    norm.grad, matrix.grad = torch.full_like(norm, 2e-5), torch.full_like(matrix, -1.0)
    optimiser.step()
    torch.testing.assert_close(norm.detach(), before[0] - 0.01 * 2 / 3, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        matrix.detach(), before[1] * (1 - 0.01 * 0.1) + 0.01 / (1 + 1e-5), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(("advantage", "target"), [(1e4, 1e-3), (1e-3, 1e4)])
def test_each_model_is_clipped_on_its_own(tiny_llama, advantage: float, target: float) -> None:
    """A gradient of one model that is far too large leaves the other's alone."""
    policy = tiny_llama()
    value = head_on(tiny_llama())
    nn.init.normal_(value.score.weight)
    config = PpoConfig(policy="-", helpfulness="-", prompts=["-"], value_clip_range=1e9)
    norms = {}
    for learner in build_learners(Models(policy, value, policy), config, None):

        def norm_of_step(*_, learner=learner, **__) -> None:
            grads = [p.grad for p in learner.model.parameters() if p.grad is not None]
            norms[learner.name] = torch.stack([g.norm() for g in grads]).norm().item()

        learner.optimiser.register_step_pre_hook(norm_of_step)
        part = MicroBatch(torch.tensor([0, 1]), TOKENS)
        measures = learner.step([part], experience_of(advantage, target))
        reported = measures[f"{learner.name}_grad_norm"]
        assert norms[learner.name] == pytest.approx(min(reported, 1.0), rel=1e-3)
    large, small = ("policy", "value") if advantage > target else ("value", "policy")
    assert norms[large] == pytest.approx(1.0, rel=1e-3)
    assert norms[small] > 0


def test_no_dropout_is_left(tiny_llama) -> None:
    config = tiny_llama().config
    config.attention_dropout = 0.5
    model = type(tiny_llama())(config)
    model.extra = nn.Dropout(0.5)
    disable_dropout(model)
    model.train()
    assert model.extra.p == 0.0
    ids = torch.tensor([[1, 5, 9, 30]])
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
