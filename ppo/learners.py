"""The models that PPO trains, each with its loss and its AdamW as §3.2.3 sets it.

Policy and value model have one each, or one together where the value model is a head on the policy's trunk.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import PreTrainedModel

from llama2_chat import distributed
from llama2_chat.errors import TrainingError
from llama2_chat.ppo.config import PpoConfig, PpoTraining
from llama2_chat.ppo.experience import Experience, MicroBatch, Models
from llama2_chat.ppo.losses import policy_loss, value_loss
from llama2_chat.ppo.measures import update_measures
from llama2_chat.ppo.response_tokens import (
    logprobs_and_values,
    policy_logprobs,
    shares_trunk,
    to_grid,
    token_values,
)
from llama2_chat.ppo.value_model import PolicyWithHead


class Learner(ABC):
    """A model, its optimiser, and one gradient step on a mini-batch."""

    name: str
    rate_setting: str

    def __init__(
        self,
        model: PreTrainedModel | PolicyWithHead,
        config: PpoConfig,
        learning_rate: float,
        autocast: torch.dtype | None,
    ) -> None:
        self.model: Any = model
        self.config, self.autocast = config, autocast
        self.optimiser = build_optimiser(model, config.training, learning_rate)
        disable_dropout(model)
        if config.training.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})

    @abstractmethod
    def loss(self, micro_batch: MicroBatch, experience: Experience) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over the micro-batch's response tokens, and what else is worth knowing of it."""

    def step(self, mini_batch: Sequence[MicroBatch], experience: Experience) -> dict[str, float]:
        """One step on the mean loss over all response tokens of the mini-batch together, of all processes.

        Returns:
            The loss, the gradient's norm before clipping, and what `loss` tells.

        Raises:
            TrainingError: the loss or the gradient is not finite; the model is as before.
        """
        measures: dict[str, float] = {}
        shares = shares_of_tokens(mini_batch)
        factor = distributed.gradient_factor(self.model)
        self.model.train()  # gradient checkpointing works in this mode alone
        for micro_batch, share in zip(mini_batch, shares, strict=True):
            with torch.autocast(
                self.model.device.type, dtype=self.autocast, enabled=self.autocast is not None
            ):
                loss, more = self.loss(micro_batch, experience)
            (loss * (share * factor)).backward()  # type: ignore[no-untyped-call]
            for name, value in {f"{self.name}_loss": loss, **more}.items():
                found = value.item()
                largest = name.endswith("_max")
                before = measures.get(name, 0.0)
                measures[name] = max(before, found) if largest else before + share * found
        measures = _of_all_processes(measures)
        distributed.sum_gradients(self.model)
        clipped = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.training.max_grad_norm)
        norm = distributed.whole(clipped).item()
        measures[f"{self.name}_grad_norm"] = norm
        if not (math.isfinite(measures[f"{self.name}_loss"]) and math.isfinite(norm)):
            raise TrainingError(
                f"the {self.name} loss became {measures[f'{self.name}_loss']} (gradient norm {norm}); "
                f"lower {self.rate_setting}"
            )
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.model.train(False)
        return measures


class PolicyLearner(Learner):
    """Clipped surrogate objective."""

    name = "policy"
    rate_setting = "training.learning_rate"

    def loss(self, micro_batch: MicroBatch, experience: Experience) -> tuple[Tensor, dict[str, Tensor]]:
        """See `llama2_chat.ppo.losses.policy_loss`."""
        said = distributed.run_as_forward(self.model, policy_logprobs, micro_batch.tokens)
        return _surrogate(said, micro_batch, experience, self.config)


class ValueLearner(Learner):
    """Clipped squared error."""

    name = "value"
    rate_setting = "training.value_learning_rate"

    def loss(self, micro_batch: MicroBatch, experience: Experience) -> tuple[Tensor, dict[str, Tensor]]:
        """See `llama2_chat.ppo.losses.value_loss`."""
        values = distributed.run_as_forward(self.model, token_values, micro_batch.tokens)
        return _squared_error(values, micro_batch, experience, self.config), {}


class SharedTrunkLearner(Learner):
    """Both losses on one trunk: clipped surrogate objective + `value_loss_weight` · clipped squared error."""

    name = "policy"
    rate_setting = "training.learning_rate or value_loss_weight"

    def __init__(
        self, models: Models, config: PpoConfig, learning_rate: float, autocast: torch.dtype | None
    ) -> None:
        self.models = models
        super().__init__(PolicyWithHead(models.policy, models.value), config, learning_rate, autocast)

    def loss(self, micro_batch: MicroBatch, experience: Experience) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum; both parts are told, the policy's under `surrogate_loss`."""
        logprobs, values = logprobs_and_values(self.models.policy, self.models.value, micro_batch.tokens)
        surrogate, measures = _surrogate(logprobs, micro_batch, experience, self.config)
        error = _squared_error(values, micro_batch, experience, self.config)
        measures |= {"surrogate_loss": surrogate, "value_loss": error}
        return surrogate + self.config.value_loss_weight * error, measures


def build_learners(models: Models, config: PpoConfig, autocast: torch.dtype | None) -> list[Learner]:
    """Policy, then value model; or one learner for both where they share a trunk."""
    rate = config.training.learning_rate
    if shares_trunk(models.policy, models.value):
        return [SharedTrunkLearner(models, config, rate, autocast)]
    value_rate = config.training.value_learning_rate or rate
    return [
        PolicyLearner(models.policy, config, rate, autocast),
        ValueLearner(models.value, config, value_rate, autocast),
    ]


def _surrogate(
    logprobs_N: Tensor, micro_batch: MicroBatch, experience: Experience, config: PpoConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    members, mask = micro_batch.members, experience.mask[micro_batch.members]
    logprobs, old_logprobs = to_grid(logprobs_N, mask), experience.logprobs[members]
    loss, clip_fraction = policy_loss(
        logprobs,
        old_logprobs,
        experience.advantages[members],
        response_mask=mask,
        clip_range=config.clip_range,
    )
    with torch.no_grad():
        update = update_measures(logprobs, old_logprobs, response_mask=mask)
    return loss, {"clip_fraction": clip_fraction, **update}


def _squared_error(
    values_N: Tensor, micro_batch: MicroBatch, experience: Experience, config: PpoConfig
) -> Tensor:
    members, mask = micro_batch.members, experience.mask[micro_batch.members]
    return value_loss(
        to_grid(values_N, mask),
        experience.values[members],
        experience.returns[members],
        response_mask=mask,
        clip_range=config.value_clip_range,
    )


def _of_all_processes(measures: dict[str, float]) -> dict[str, float]:
    """Sums over the processes, each of which has weighed its own; of a `_max` the largest."""
    sums = dict(zip(measures, distributed.total(list(measures.values())), strict=True))
    largest = [name for name in measures if name.endswith("_max")]
    found = distributed.gather_objects([measures[name] for name in largest])
    return sums | dict(zip(largest, map(max, zip(*found, strict=True)), strict=True))


def shares_of_tokens(mini_batch: Sequence[MicroBatch]) -> list[float]:
    """Of all response tokens of the mini-batch, in all processes, the share in each of this one's micro-batches."""
    counts = [0 if part.fills else len(part.tokens.targets) for part in mini_batch]
    (tokens,) = distributed.total([float(sum(counts))])
    return [count / tokens for count in counts]


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
        fused=True,  # one pass over the weights; a step of its own for each operation is memory traffic alone
    )


def disable_dropout(model: nn.Module) -> None:
    """A ratio compares two policies, not two dropout masks."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]
