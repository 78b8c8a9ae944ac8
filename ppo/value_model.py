"""The value model: a reward model's trunk, or the policy's own, under a scalar head read at every response token."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from llama2_chat.lora import plain_model, with_adapter
from llama2_chat.models import load_reward_model, reward_model_from_policy
from llama2_chat.ppo.config import PpoConfig
from llama2_chat.settings import RunSettings
from llama2_chat.stage import EventLog
from llama2_chat.tokenizers import ChatTokenizer, load_tokenizer, same_tokens


def load_value_model(
    config: PpoConfig,
    settings: RunSettings,
    tokenizer: ChatTokenizer,
    events: EventLog,
    *,
    policy: PreTrainedModel,
    gguf_file: str | None = None,
) -> PreTrainedModel:
    """A model with one scalar output that reads the policy's token ids and at first says 0 everywhere.

    With `value_head: shared` it is a head on the trunk of `policy`. Else it has a trunk of its own, with an adapter
    where the policy trains one: that of `config.value`, by default the helpfulness reward model. Where that one was
    trained with other tokens, the policy's ids mean nothing to it: then it is a copy of the policy's, and a warning
    says so. So it is where `helpfulness` is a custom reward, which has no trunk to lend.

    The head starts at 0, the mean of whitened scores. A reward model's own head has been trained at the last
    token alone and on another scale; in the middle of a response it says nothing yet, loudly.
    """
    if config.value_head == "shared":
        return head_on(policy)
    source = config.value or config.helpfulness
    if isinstance(source, str) and same_tokens(tokenizer, load_tokenizer(source)):
        model = load_reward_model(source, settings)
    else:
        why = (
            f"{source} has another tokenizer than the policy"
            if isinstance(source, str)
            else "helpfulness is a custom reward"
        )
        events.write(
            "warning",
            message=f"value: {why}, so the value model starts from the policy's trunk; name a reward model of the "
            "policy's own tokenizer in `value`, or give it time with training.warmup_iterations",
        )
        model = reward_model_from_policy(config.policy, settings, gguf_file=gguf_file)
    head: nn.Module = model.score  # type: ignore[assignment]
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    return with_adapter(model, config.training.lora, settings.seed)


def head_on(policy: PreTrainedModel) -> PreTrainedModel:
    """A scalar head that says 0 on the very trunk of a policy, adapter included: no weight of it is copied."""
    inner: Any = plain_model(policy)
    config = copy.deepcopy(inner.config)
    config.num_labels, config.architectures = 1, None
    with torch.device("meta"):  # its own trunk goes at once, so it takes no memory
        model: Any = AutoModelForSequenceClassification.from_config(  # type: ignore[no-untyped-call]
            config, attn_implementation="sdpa"
        )
    setattr(model, model.base_model_prefix, inner.base_model)
    model.score = nn.Linear(config.hidden_size, 1, bias=False, device=inner.device)
    nn.init.zeros_(model.score.weight)
    model.train(False)
    return model  # type: ignore[no-any-return]


class PolicyWithHead(nn.Module):
    """A policy and the scalar head on its trunk, as one model to an optimiser and a checkpoint."""

    def __init__(self, policy: PreTrainedModel, value: PreTrainedModel) -> None:
        super().__init__()
        self.policy = policy
        self.score: nn.Module = value.score  # type: ignore[assignment]

    @property
    def device(self) -> torch.device:
        """The policy's."""
        return self.policy.device

    def gradient_checkpointing_enable(self, *arguments: Any) -> None:
        """The policy's."""
        self.policy.gradient_checkpointing_enable(*arguments)  # type: ignore[no-untyped-call]
