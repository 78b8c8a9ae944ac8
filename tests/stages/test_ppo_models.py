"""PPO with adapters and with a head on the policy's trunk: what is trained, what is held once, what comes out."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from pydantic import ValidationError
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from llama2_chat.files import sha256_of
from llama2_chat.models import load_policy, load_reward_model
from llama2_chat.ppo import learners, loop
from llama2_chat.ppo.config import PpoConfig
from llama2_chat.ppo.losses import policy_loss, value_loss
from llama2_chat.ppo.models import load_models
from llama2_chat.ppo.response_tokens import pack_responses, policy_logprobs, shares_trunk, token_values
from llama2_chat.ppo.train import run_stage
from llama2_chat.reward.scoring import RewardScorer
from llama2_chat.tokenizers import load_tokenizer

IDS = torch.tensor([[1, 20, 33, 48, 5, 2]])
LORA = {"rank": 4, "alpha": 8}
KINDS = {
    "adapter": {"training": {"lora": LORA}},
    "adapter-shared": {"training": {"lora": LORA}, "value_head": "shared"},
    "shared": {"value_head": "shared", "training": {"learning_rate": 1e-3}},
}
TOKENS = pack_responses([[1, 20, 33], [1, 7]], [[48, 5, 2], [9]], padding_id=0, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def ppo_config(ppo_config):
    """As in the other tests, at a learning rate that moves adapters."""

    def make(**changes) -> PpoConfig:
        return ppo_config(**changes | {"training": {"learning_rate": 1e-2, **changes.get("training", {})}})

    return make


@pytest.fixture(scope="module")
def runs(settings, stage_at, ppo_config):
    """Each kind's run, once."""
    done = {}

    def run(kind: str):
        if kind not in done:
            directory = stage_at(f"ppo-models-{kind}")
            done[kind] = directory, run_stage(ppo_config(**KINDS[kind]), settings, directory)
        return done[kind]

    return run


@pytest.fixture
def models_of(settings, stage_at, ppo_config):
    def make(**changes):
        config = ppo_config(**changes)
        policy = load_policy(config.policy, settings)
        scorer = RewardScorer.from_pretrained(config.helpfulness, config.safety, device="cpu")
        tokenizer = load_tokenizer(config.policy)
        events = stage_at("ppo-models-loaded").events
        return load_models(config, settings, tokenizer, events, policy=policy, scorer=scorer), scorer

    return make


def records(directory) -> list[dict]:
    return [json.loads(line) for line in directory.metrics_file.read_text().splitlines()]


def storages(*models: torch.nn.Module) -> set[int]:
    return {p.untyped_storage().data_ptr() for model in models for p in model.parameters()}


def test_the_model_folder_is_plain_and_the_adapter_lies_beside_it(runs, sft) -> None:
    directory, _ = runs("adapter")
    assert records(directory)[0]["kl_nats"] == 0.0
    assert records(directory)[-1]["kl_nats"] > 0.0
    assert records(directory)[-1]["explained_variance"] != 0.0
    assert not list(directory.model.glob("adapter*"))
    whole = AutoModelForCausalLM.from_pretrained(directory.model)
    base = AutoModelForCausalLM.from_pretrained(sft[0].model)
    plain = base(input_ids=IDS).logits
    adapted = peft.PeftModel.from_pretrained(base, directory.adapter)
    torch.testing.assert_close(
        whole(input_ids=IDS).logits, adapted(input_ids=IDS).logits, rtol=1e-4, atol=1e-5
    )
    assert (whole(input_ids=IDS).logits - plain).abs().max() > 0.01


def test_the_disabled_adapter_is_the_reference_to_the_bit_before_and_after_training(
    settings, stage_at, ppo_config, sft, monkeypatch
) -> None:
    """Against the model loaded on its own: at first, and when a run has moved the adapter."""
    with torch.no_grad():
        expected = policy_logprobs(load_policy(str(sft[0].model), settings), TOKENS)
    found, moved = [], []
    original = loop.PpoLoop.run

    def watched(self) -> dict:
        result = None
        for action in (lambda: None, lambda: original(self)):
            result = action()
            with torch.no_grad(), self.models.as_reference() as reference:
                found.append(policy_logprobs(reference, TOKENS))
            with torch.no_grad():
                moved.append(policy_logprobs(self.models.policy, TOKENS))
        return result

    monkeypatch.setattr(loop.PpoLoop, "run", watched)
    run_stage(
        ppo_config(training={"lora": LORA, "iterations": 2}), settings, stage_at("ppo-models-reference")
    )
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], expected)
    assert torch.equal(moved[0], expected)
    assert not torch.equal(moved[1], expected)


def test_every_weight_that_stands_still_is_held_once(models_of, sft, rewards) -> None:
    models, scorer = models_of(training={"lora": LORA})
    assert models.reference is models.policy
    adapter = 2 * 2 * 7  # A and B of seven layers in each of two blocks
    whole = len(list(load_like(sft).parameters()))
    assert len(storages(models.policy)) == whole + adapter
    # The value model adds its adapter and two heads: the trained one and the one that peft keeps beside it.
    assert (
        len(storages(models.value, scorer.helpfulness.model))
        == len(storages(scorer.helpfulness.model)) + adapter + 2
    )
    full, _ = models_of()
    assert not storages(full.policy) & storages(full.reference)
    assert not storages(full.policy, full.reference) & storages(full.value)


def load_like(sft):
    return AutoModelForCausalLM.from_pretrained(sft[0].model)


def test_another_reference_is_a_model_of_its_own(models_of, world, settings) -> None:
    models, _ = models_of(training={"lora": LORA}, reference=str(world / "base"))
    with torch.no_grad(), models.as_reference() as reference:
        expected = policy_logprobs(load_policy(world / "base", settings), TOKENS)
        assert torch.equal(policy_logprobs(reference, TOKENS), expected)
    assert not any(parameter.requires_grad for parameter in models.reference.parameters())
    same, _ = models_of(training={"lora": LORA}, reference=str(models.policy.get_base_model().name_or_path))
    assert same.reference is same.policy


@pytest.mark.parametrize("lora", [None, LORA])
def test_a_shared_trunk_is_held_once_and_its_head_says_0(models_of, lora) -> None:
    models, _ = models_of(training={"lora": lora}, value_head="shared")
    assert shares_trunk(models.policy, models.value)
    assert len(storages(models.policy, models.value)) == len(storages(models.policy)) + 1
    assert models.value.score.weight.requires_grad
    assert bool((token_values(models.value, TOKENS) == 0).all())


@pytest.mark.parametrize("lora", [None, LORA])
def test_the_first_values_of_an_own_trunk_are_0(models_of, rewards, settings, lora) -> None:
    """The trunk is the reward model's, its head is not."""
    models, _ = models_of(training={"lora": lora})
    assert bool((token_values(models.value, TOKENS) == 0).all())
    judge = load_reward_model(rewards["helpfulness"][0].model, settings)
    assert not bool((token_values(judge, TOKENS) == 0).any())
    inner = models.value if lora is None else models.value.get_base_model()
    hidden = [m.model(input_ids=IDS, use_cache=False).last_hidden_state for m in (inner, judge)]
    assert torch.equal(*hidden)


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_and_resumed_equals_uninterrupted_to_the_byte(
    settings, stage_at, runs, ppo_config, stopped_in_the_fourth_iteration, kind: str
) -> None:
    directory, (whole, metrics) = stage_at(f"ppo-models-{kind}-interrupted"), runs(kind)
    with stopped_in_the_fourth_iteration():
        run_stage(ppo_config(**KINDS[kind]), settings, directory)
    assert run_stage(ppo_config(**KINDS[kind]), settings, directory) == metrics
    assert directory.metrics_file.read_bytes() == whole.metrics_file.read_bytes()
    assert sha256_of(directory.model) == sha256_of(whole.model)
    if directory.adapter.exists():
        assert sha256_of(directory.adapter) == sha256_of(whole.adapter)


def test_checkpoints_hold_what_is_trained_alone(runs) -> None:
    def names(kind: str, model: str) -> set[str]:
        file = runs(kind)[0].checkpoints / "checkpoint-4" / f"{model}.safetensors"
        with safe_open(file, "pt") as opened:
            return set(opened.keys())

    of_policy, of_value = names("adapter", "policy"), names("adapter", "value")
    assert len(of_policy) == 2 * 2 * 7
    assert all("lora_" in name for name in of_policy)
    assert {name for name in of_value if "lora_" not in name} == {
        "base_model.model.score.modules_to_save.default.weight"
    }
    assert {name for name in names("adapter-shared", "policy") if "lora_" not in name} == {"score.weight"}
    assert not (runs("shared")[0].checkpoints / "checkpoint-4" / "value.safetensors").exists()


def test_the_shared_trunk_gets_the_weighted_sum_of_both_gradients(
    settings, stage_at, ppo_config, monkeypatch
) -> None:
    """One step's gradients against those of the two losses, each computed by itself from the definition."""
    compared = []
    original = learners.SharedTrunkLearner.step
    clip = torch.nn.utils.clip_grad_norm_

    def watched(self, mini_batch, experience):
        trained = [p for p in self.model.parameters() if p.requires_grad]
        (part,) = mini_batch
        mask = experience.mask[part.members]

        def of(values: torch.Tensor) -> torch.Tensor:
            return torch.zeros(mask.shape).masked_scatter(mask, values)

        surrogate, _ = policy_loss(
            of(policy_logprobs(self.models.policy, part.tokens)),
            experience.logprobs[part.members],
            experience.advantages[part.members],
            response_mask=mask,
            clip_range=0.2,
        )
        error = value_loss(
            of(token_values(self.models.value, part.tokens)),
            experience.values[part.members],
            experience.returns[part.members],
            response_mask=mask,
            clip_range=0.2,
        )
        first, second = (torch.autograd.grad(loss, trained, allow_unused=True) for loss in (surrogate, error))

        def seen(parameters, limit):
            for p, a, b in zip(trained, first, second, strict=True):
                zero = torch.zeros_like(p)
                expected = (zero if a is None else a) + 0.5 * (zero if b is None else b)
                torch.testing.assert_close(p.grad, expected, rtol=1e-5, atol=1e-6)
                compared.append((a is not None, b is not None))
            return clip(parameters, limit)

        monkeypatch.setattr(learners.nn.utils, "clip_grad_norm_", seen)
        return original(self, mini_batch, experience)

    monkeypatch.setattr(learners.SharedTrunkLearner, "step", watched)
    config = ppo_config(
        value_head="shared", value_loss_weight=0.5, training={"iterations": 2, "learning_rate": 1e-3}
    )
    directory = stage_at("ppo-models-gradients")
    run_stage(config, settings, directory)
    assert (False, True) in compared  # the head
    assert (True, True) in compared  # the trunk
    row = records(directory)[0]
    assert row["value_grad_norm"] is None
    assert row["policy_loss"] is not None
    assert row["value_loss"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_ratios_are_exactly_1(settings, stage_at, ppo_config, monkeypatch, kind: str) -> None:
    seen = []
    original = learners.policy_loss

    def watched(logprobs, old_logprobs, advantages, **rest):
        seen.append(torch.exp(logprobs - old_logprobs).detach())
        return original(logprobs, old_logprobs, advantages, **rest)

    monkeypatch.setattr(learners, "policy_loss", watched)
    changes = {
        **KINDS[kind],
        "training": {**KINDS[kind].get("training", {}), "iterations": 1, "micro_batch_size": 4},
    }
    run_stage(ppo_config(**changes), settings, stage_at(f"ppo-models-{kind}-ratios"))
    assert len(seen) == 4
    assert all(bool((ratios == 1).all()) for ratios in seen[:2])
    assert not all(bool((ratios == 1).all()) for ratios in seen[2:])


def test_the_plan_of_memory_is_an_event_and_is_printed(runs, ppo_config, settings, stage_at, capsys) -> None:
    directory = stage_at("ppo-models-plan")
    run_stage(ppo_config(training={"iterations": 1, "lora": LORA}), settings, directory)
    events = [json.loads(line) for line in directory.events.path.read_text().splitlines()]
    (plan,) = [event for event in events if event["event"] == "memory_plan"]
    rows = {row["model"]: row for row in plan["models"]}
    assert list(rows) == ["policy", "reference", "value", "helpfulness", "safety"]
    assert rows["reference"]["shares_with"] == ["policy"]
    assert (rows["reference"]["weights_mib"], rows["reference"]["trained"]) == (0.0, 0)
    assert rows["helpfulness"]["shares_with"] == ["value"]
    assert rows["safety"]["shares_with"] == []
    assert plan["cache_tokens"] < 65536
    assert "reference" in capsys.readouterr().err


def test_the_loss_of_a_shared_trunk_is_the_weighted_sum_of_its_parts(runs) -> None:
    for row in records(runs("shared")[0]):
        expected = row["surrogate_loss"] + 0.1 * row["value_loss"]  # value_loss_weight by default
        assert row["policy_loss"] == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert "surrogate_loss" not in records(runs("adapter")[0])[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"value": "somewhere"},
        {"training": {"value_learning_rate": 1e-5}},
        {"training": {"warmup_iterations": 2}},
    ],
)
def test_what_a_shared_trunk_cannot_do_is_refused(ppo_config, changes) -> None:
    with pytest.raises(ValidationError, match="has no trunk and no optimiser of its own"):
        ppo_config(value_head="shared", **changes)


def test_dropout_in_an_adapter_is_refused(ppo_config) -> None:
    with pytest.raises(ValidationError, match="PPO trains without it"):
        ppo_config(training={"lora": {**LORA, "dropout": 0.1}})
