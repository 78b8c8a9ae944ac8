"""The two models that PPO trains, each with its loss and its AdamW as §3.2.3 sets it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import PreTrainedModel

from llama2_chat.errors import TrainingError
from llama2_chat.ppo.config import PpoConfig, PpoTraining
from llama2_chat.ppo.experience import Experience, MicroBatch
from llama2_chat.ppo.losses import policy_loss, value_loss
from llama2_chat.ppo.measures import update_measures
from llama2_chat.ppo.response_tokens import policy_logprobs, to_grid, token_values


class Learner(ABC):
    """A model, its optimiser, and one gradient step on a mini-batch."""

    name: str
    rate_setting: str

    def __init__(
        self, model: PreTrainedModel, config: PpoConfig, learning_rate: float, autocast: torch.dtype | None
    ) -> None:
        self.model, self.config, self.autocast = model, config, autocast
        self.optimiser = build_optimiser(model, config.training, learning_rate)
        disable_dropout(model)
        if config.training.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[no-untyped-call]

    @abstractmethod
    def loss(self, micro_batch: MicroBatch, experience: Experience) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over the micro-batch's response tokens, and what else is worth knowing of it."""

    def step(self, mini_batch: Sequence[MicroBatch], experience: Experience) -> dict[str, float]:
        """One step on the mean loss over all response tokens of the mini-batch together.

        Returns:
            The loss, the gradient's norm before clipping, and what `loss` tells.

        Raises:
            TrainingError: the loss or the gradient is not finite; the model is as before.
        """
        measures: defaultdict[str, float] = defaultdict(float)
        tokens = sum(len(micro_batch.tokens.targets) for micro_batch in mini_batch)
        self.model.train()  # gradient checkpointing works in this mode alone
        for micro_batch in mini_batch:
            share = len(micro_batch.tokens.targets) / tokens
            with torch.autocast(
                self.model.device.type, dtype=self.autocast, enabled=self.autocast is not None
            ):
                loss, more = self.loss(micro_batch, experience)
            (loss * share).backward()  # type: ignore[no-untyped-call]
            for name, value in {f"{self.name}_loss": loss, **more}.items():
                found = value.item()
                largest = name.endswith("_max")
                measures[name] = max(measures[name], found) if largest else measures[name] + share * found
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.training.max_grad_norm).item()
        measures[f"{self.name}_grad_norm"] = norm
        if not (math.isfinite(measures[f"{self.name}_loss"]) and math.isfinite(norm)):
            raise TrainingError(
                f"the {self.name} loss became {measures[f'{self.name}_loss']} (gradient norm {norm}); "
                f"lower {self.rate_setting}"
            )
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.model.train(False)
        return dict(measures)


class PolicyLearner(Learner):
    """Clipped surrogate objective."""

    name = "policy"
    rate_setting = "training.learning_rate"

    def loss(self, micro_batch: MicroBatch, experience: Experience) -> tuple[Tensor, dict[str, Tensor]]:
        """See `llama2_chat.ppo.losses.policy_loss`."""
        members, mask = micro_batch.members, experience.mask[micro_batch.members]
        logprobs = to_grid(policy_logprobs(self.model, micro_batch.tokens), mask)
        old_logprobs = experience.logprobs[members]
        loss, clip_fraction = policy_loss(
            logprobs,
            old_logprobs,
            experience.advantages[members],
            response_mask=mask,
            clip_range=self.config.clip_range,
        )
        with torch.no_grad():
            update = update_measures(logprobs, old_logprobs, response_mask=mask)
        return loss, {"clip_fraction": clip_fraction, **update}


class ValueLearner(Learner):
    """Clipped squared error."""

    name = "value"
    rate_setting = "training.value_learning_rate"

    def loss(self, micro_batch: MicroBatch, experience: Experience) -> tuple[Tensor, dict[str, Tensor]]:
        """See `llama2_chat.ppo.losses.value_loss`."""
        members, mask = micro_batch.members, experience.mask[micro_batch.members]
        loss = value_loss(
            to_grid(token_values(self.model, micro_batch.tokens), mask),
            experience.values[members],
            experience.returns[members],
            response_mask=mask,
            clip_range=self.config.value_clip_range,
        )
        return loss, {}


def build_optimiser(model: nn.Module, training: PpoTraining, learning_rate: float) -> AdamW:
    """AdamW at a constant learning rate; matrices decay, biases and norms' gains do not.

    Source: §3.2.3; what decays is transformers' rule, as in the other stages.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=learning_rate,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
    )


def disable_dropout(model: nn.Module) -> None:
    """A ratio compares two policies, not two dropout masks."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]
