"""The models that PPO holds: who is trained, who is asked, and which of them lie in the same memory."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from llama2_chat.lora import plain_model, share_frozen_weights, with_adapter
from llama2_chat.models import load_policy, sampling_dtype
from llama2_chat.ppo.config import PpoConfig
from llama2_chat.ppo.experience import Models
from llama2_chat.ppo.memory import CacheShape, MemoryPlan, count_weights, memory_plan
from llama2_chat.ppo.value_model import load_value_model
from llama2_chat.reward.scoring import RewardModel, RewardScorer
from llama2_chat.settings import RunSettings
from llama2_chat.stage import EventLog
from llama2_chat.tokenizers import ChatTokenizer


def load_models(
    config: PpoConfig,
    settings: RunSettings,
    tokenizer: ChatTokenizer,
    events: EventLog,
    *,
    policy: PreTrainedModel,
    scorer: RewardScorer,
) -> Models:
    """Policy, value model and reference, as few weights as can be.

    With an adapter the policy's weights stand still: under the disabled adapter they are the reference, unless
    `reference` names another model. Of the weights that stand still, those of the value model's trunk are the reward
    model's or the policy's own wherever they are equal.

    Args:
        policy: As it was loaded; with `training.lora` it gets its adapter here.
    """
    lora = config.training.lora
    adapted = with_adapter(policy, lora, settings.seed)
    start = config.reference or config.policy
    if lora is not None and start == config.policy:
        reference = adapted
    else:
        reference = load_policy(start, settings, gguf_file=settings.gguf_file_of(start))
        reference.requires_grad_(False)
    value = load_value_model(
        config,
        settings,
        tokenizer,
        events,
        policy=adapted,
        gguf_file=settings.gguf_file_of(config.policy),
    )
    judges = [judge.model for judge in scorer.models]
    for judge in judges:
        judge.requires_grad_(False)
    if lora is not None and config.value_head == "own":
        for owner in (*judges, adapted):
            share_frozen_weights(value, owner)
    return Models(adapted, value, reference)


def plan_memory(
    models: Models, scorer: RewardScorer, config: PpoConfig, settings: RunSettings, *, longest_prompt: int
) -> MemoryPlan:
    """What models and cache will take; the cache at the token budget, or at the whole batch where that is less.

    Args:
        longest_prompt: In tokens.
    """
    held: dict[str, Any] = {
        "policy": models.policy,
        "reference": models.reference,
        "value": models.value,
    }
    for name, judge in (("helpfulness", scorer.helpfulness), ("safety", scorer.safety)):
        if isinstance(judge, RewardModel):
            held[name] = judge.model
    parameters = {name: list(model.parameters()) for name, model in held.items()}
    if models.reference is models.policy:
        parameters["reference"] = [p for p in parameters["policy"] if not p.requires_grad]
    shape: Any = plain_model(models.policy).config
    heads = shape.num_attention_heads
    sampled = config.training.batch_size * (longest_prompt + config.sampling.max_new_tokens)
    cache = CacheShape(
        tokens=min(config.sampling.token_budget, sampled),
        layers=shape.num_hidden_layers,
        key_value_heads=getattr(shape, "num_key_value_heads", None) or heads,
        head_size=getattr(shape, "head_dim", None) or shape.hidden_size // heads,
        number_bytes=(sampling_dtype(settings) or torch.float32).itemsize,
    )
    return memory_plan(count_weights(parameters), cache, merged_weights=_adapted_weights(models.policy))


def _adapted_weights(policy: nn.Module) -> int:
    """Weights of the layers with an adapter, which sampling holds a second time with the adapter merged."""
    layers: list[Any] = [module for module in policy.modules() if isinstance(module, LoraLayer)]
    return sum(layer.get_base_layer().weight.numel() for layer in layers)
