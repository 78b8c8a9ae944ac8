"""The plan of memory against arithmetic by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llama2_chat.ppo.memory import CacheShape, ModelWeights, count_weights, memory_plan

NO_CACHE = CacheShape(tokens=0, layers=1, key_value_heads=1, head_size=1, number_bytes=4)


def test_the_plan_by_hand() -> None:
    million = 1024 * 1024
    models = [
        # 6 Mi weights of 4 bytes: 24 MiB; 2 Mi of them trained: 8 MiB of gradients, 16 of AdamW's two moments.
        ModelWeights("policy", 6 * million, 2 * million, 6 * million, 2 * million, 4, "float32"),
        ModelWeights("reference", 4 * million, 0, 0, 0, 4, "float32", ("policy",)),
        # 3 Mi weights of 2 bytes, nothing trained.
        ModelWeights("helpfulness", 3 * million, 0, 3 * million, 0, 2, "bfloat16"),
    ]
    # Keys and values of 1,024 tokens, 2 layers, 4 heads of 8 numbers of 2 bytes: 2 · 1024 · 2 · 4 · 8 · 2 = 256 KiB.
    cache = CacheShape(tokens=1024, layers=2, key_value_heads=4, head_size=8, number_bytes=2)
    plan = memory_plan(models, cache, merged_weights=million // 2)
    found = [(row.weights_mib, row.gradients_mib, row.optimiser_mib, row.total_mib) for row in plan.rows]
    assert found == [(24, 8, 16, 48), (0, 0, 0, 0), (6, 0, 0, 6)]
    assert (plan.merged_mib, plan.cache_mib) == (2, 0.25)
    assert plan.total_mib == 48 + 6 + 2 + 0.25
    assert plan.to_event()["total_mib"] == 56.2
    lines = plan.to_lines()
    assert "frozen" in lines[3]
    assert lines[3].endswith("shared with policy")
    assert lines[-1].split() == ["sum", "56.2"]


def test_weights_that_two_models_hold_are_counted_once() -> None:
    trunk, other = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    head = nn.Linear(4, 1, bias=False)
    frozen = nn.Linear(4, 4, bias=False).requires_grad_(False)
    policy, value, judge = count_weights(
        {
            "policy": [*trunk.parameters(), *frozen.parameters()],
            "value": [*trunk.parameters(), *head.parameters()],
            "judge": list(other.requires_grad_(False).parameters()),
        }
    )
    assert (policy.parameters, policy.trained, policy.held, policy.held_trained) == (32, 16, 32, 16)
    assert (value.parameters, value.trained, value.held, value.held_trained) == (20, 20, 4, 4)
    assert value.shares_with == ("policy",)
    assert (judge.held, judge.held_trained, judge.shares_with) == (16, 0, ())
    plan = memory_plan([policy, value, judge], NO_CACHE)
    # 32 + 4 + 16 weights, gradients and two moments of 16 + 4, four bytes each.
    assert plan.total_mib * 2**20 == 4 * (52 + 3 * 20)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_the_type_of_the_weights_counts(dtype: torch.dtype, size: int) -> None:
    (model,) = count_weights({"policy": list(nn.Linear(8, 8, bias=False, dtype=dtype).parameters())})
    assert memory_plan([model], NO_CACHE).rows[0].weights_mib * 2**20 == 64 * size
    assert model.dtype == str(dtype).removeprefix("torch.")
