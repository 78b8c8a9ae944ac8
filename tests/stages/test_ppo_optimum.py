"""PPO's own loop in a world whose optimum is known in closed form: it ends there, whitened or not, behind the gate."""

from __future__ import annotations

import bandit
import pytest
import torch
from bandit import TWO_TOKENS, Bandit, distance

from llama2_chat.ppo import loop

TOLERANCE = 0.02
"""Total variation between PPO's policy and the optimum."""
BETA = 1.5
SEEDS = (1, 3, 5)
"""The first three with which every mistake below moves the optimum by two tolerances or more."""

one_now_the_others_in_the_long_run = pytest.mark.parametrize(
    "seed", [SEEDS[0], *(pytest.param(seed, marks=pytest.mark.long) for seed in SEEDS[1:])]
)


@pytest.fixture(autouse=True)
def one_call_for_all_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "sample_batch", bandit.sample_batch)


@one_now_the_others_in_the_long_run
def test_ppo_ends_at_the_optimum_under_the_kl_penalty(seed: int, tmp_path) -> None:
    world = Bandit(seed)
    found = world.train(tmp_path, kl_coefficient=BETA, whiten_scores="none")
    assert distance(found, world.optimum(BETA)) < TOLERANCE


@one_now_the_others_in_the_long_run
def test_with_whitening_it_ends_where_the_policy_is_optimal_for_its_own_whitened_scores(
    seed: int, tmp_path
) -> None:
    world = Bandit(seed)
    found = world.train(tmp_path, kl_coefficient=BETA)
    assert distance(found, world.whitened_optimum(BETA)[0]) < TOLERANCE


@pytest.mark.long
def test_with_two_tokens_the_first_is_paid_for_what_it_leads_to(tmp_path) -> None:
    """The score stands at the last token alone. A model this small learns the 21 responses less exactly."""
    world = Bandit(0, TWO_TOKENS)
    best = world.optimum(BETA)
    assert distance(world.start, best) > 0.3
    assert distance(world.optimum(1.5 * BETA), best) > 0.12
    assert distance(world.train(tmp_path, kl_coefficient=BETA, whiten_scores="none"), best) < 0.05


@pytest.mark.parametrize("seed", SEEDS)
def test_the_optimum_is_the_optimum(seed: int) -> None:
    """Its value is beta log Z, which no other policy reaches; whitened, its own spread leads back to it."""
    world = Bandit(seed)
    assert torch.allclose(world.start.sum(1), torch.ones(2, dtype=torch.float64), atol=1e-6)
    best = world.optimum(BETA)
    log_z = (world.start.log() + world.rewards / BETA).logsumexp(1).mean()
    assert world.objective(best, BETA) == pytest.approx(BETA * float(log_z), abs=1e-5)
    generator = torch.Generator().manual_seed(seed)
    for amount in (0.01, 0.3):
        noise = amount * torch.randn(best.shape, generator=generator, dtype=torch.float64)
        assert world.objective((best.log() + noise).softmax(1), BETA) < world.objective(best, BETA)
    whitened, spread = world.whitened_optimum(BETA)
    assert world.spread(whitened) == pytest.approx(spread, rel=1e-9)
    assert distance(whitened, world.optimum(BETA, (world.rewards - 1.7) / spread)) < 1e-9


@pytest.mark.parametrize("seed", SEEDS)
def test_what_a_mistake_would_lead_to_is_far_from_the_optimum(seed: int) -> None:
    """So that the tests above can tell: a wrong beta, sign, gate or whitening moves the optimum by many tolerances."""
    world, ungated = Bandit(seed), Bandit(seed, threshold=1e-9)
    plain, (whitened, _) = world.optimum(BETA), world.whitened_optimum(BETA)
    mistaken = {
        "no step at all": distance(world.start, plain),
        "no step at all, whitened": distance(world.start, whitened),
        "beta times 1.5": distance(world.optimum(1.5 * BETA), plain),
        "beta times 1.5, whitened": distance(world.whitened_optimum(1.5 * BETA)[0], whitened),
        "the KL term's sign": distance(world.optimum(-BETA), plain),
        "1 added to the variance": distance(world.whitened_optimum(BETA, eps=1.0)[0], whitened),
        "no gate by threshold": distance(ungated.optimum(BETA), plain),
        "no gate by threshold, whitened": distance(ungated.whitened_optimum(BETA)[0], whitened),
    }
    assert {name: far for name, far in mistaken.items() if far < 2 * TOLERANCE} == {}
