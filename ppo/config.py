"""Configuration of PPO; defaults are the paper's (§3.2.3) or, where it is silent, docs/deviations.md's."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from llama2_chat.ppo.watching_config import EarlyStopping, GuardsConfig, Stopping
from llama2_chat.settings import (
    DataReference,
    LoraConfig,
    ModelReference,
    RewardReference,
    SamplingConfig,
    StrictModel,
)

_SAMPLER_DIFFERENCE = {"float32": 0.01, "bfloat16": 0.1}
"""Mean distance, in nats a token, above which sampler and trainer are not taken for one and the same policy."""


class PpoTraining(StrictModel):
    """§3.2.3: AdamW 0.9/0.95, eps 1e-5, decay 0.1, clipping 1.0, constant 1e-6, batch 512, mini-batch 64."""

    iterations: int = Field(200, ge=1, description="Batches of responses; the paper runs 200 to 400")
    batch_size: int = Field(512, ge=1, description="Responses per iteration")
    mini_batch_size: int = Field(64, ge=1, description="Responses per gradient step")
    micro_batch_size: int | None = Field(None, ge=1, description="Responses per forward pass; default: all")
    epochs_per_batch: int = Field(1, ge=1, description="Passes over each batch")
    learning_rate: float = Field(1e-6, gt=0.0)
    value_learning_rate: float | None = Field(None, gt=0.0, description="Default: learning_rate")
    warmup_iterations: int = Field(
        0, ge=0, description="First iterations that train the value model alone; the policy stands still"
    )
    weight_decay: float = Field(0.1, ge=0.0)
    adam_beta1: float = Field(0.9, ge=0.0, lt=1.0)
    adam_beta2: float = Field(0.95, ge=0.0, lt=1.0)
    adam_epsilon: float = Field(1e-5, gt=0.0)
    max_grad_norm: float = Field(1.0, gt=0.0)
    checkpoint_iterations: int = Field(10, ge=1, description="Iterations between two checkpoints")
    gradient_checkpointing: bool = False
    lora: LoraConfig | None = Field(
        None,
        description="Train adapters of policy and value model; default: every weight",
    )

    @field_validator("lora")
    @classmethod
    def _no_dropout(cls, lora: LoraConfig | None) -> LoraConfig | None:
        if lora is not None and lora.dropout:
            raise ValueError(
                "dropout: PPO trains without it, a ratio compares two policies; write 0 or leave it out"
            )
        return lora

    @model_validator(mode="after")
    def _batches_divide(self) -> PpoTraining:
        if self.batch_size % self.mini_batch_size:
            raise ValueError(
                f"mini_batch_size {self.mini_batch_size} does not divide batch_size {self.batch_size}"
            )
        if self.micro_batch_size is not None and self.mini_batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size {self.micro_batch_size} does not divide "
                f"mini_batch_size {self.mini_batch_size}"
            )
        return self


class PpoConfig(StrictModel):
    """Maximise R̃_c(g | p) − β KL(π_θ ‖ π_0)."""

    kind: Literal["ppo"] = "ppo"
    policy: ModelReference
    reference: ModelReference | None = Field(None, description="π_0; default: the policy as it starts")
    helpfulness: RewardReference = Field(description="Helpfulness reward model, or a custom reward")
    safety: RewardReference | None = Field(
        None, description="Safety reward model, or a custom reward; without it R_c = R_h"
    )
    value: ModelReference | None = Field(
        None,
        description="Reward model that the value model starts from; default: `helpfulness`, or the policy where "
        "that is a custom reward",
    )
    value_head: Literal["own", "shared"] = Field(
        "own",
        description="A value model with a trunk of its own, or a scalar head on the policy's trunk, whose gradients "
        "come from both losses",
    )
    value_loss_weight: float = Field(
        0.1, gt=0.0, description="Of the value loss in the sum that `value_head: shared` trains on"
    )
    prompts: list[DataReference] = Field(min_length=1)
    sampling: SamplingConfig = SamplingConfig(temperature=1.0)
    safety_threshold: float = Field(0.15, gt=0.0, lt=1.0)
    kl_coefficient: float = Field(0.01, ge=0.0, description="β: 0.01 for 7B and 13B, 0.005 for 34B and 70B")
    clip_range: float = Field(0.2, gt=0.0)
    value_clip_range: float = Field(0.2, gt=0.0)
    discount: float = Field(1.0, gt=0.0, le=1.0, description="γ")
    gae_lambda: float = Field(0.95, ge=0.0, le=1.0, description="λ")
    kl_target: float | None = Field(
        None, gt=0.0, description="KL to π_0 in nats that β is adapted to; default: β stays as it is"
    )
    kl_horizon: int = Field(10000, ge=1, description="Responses in which β moves by the KL's relative error")
    whiten_scores: Literal["batch", "running", "none"] = Field(
        "batch", description="R̃_c = whiten(logit(R_c)) over each batch, by all batches so far, or not at all"
    )
    whiten_advantages: bool = True
    incomplete: Literal["lowest", "own"] = Field(
        "lowest",
        description="Score of a response that is cut off, empty or holds a chat tag: the lowest of its batch, "
        "or its own",
    )
    training: PpoTraining = PpoTraining()
    held_out: list[DataReference] = Field(
        default_factory=list, description="Prompts that the policy is judged on, never trained on"
    )
    independent: RewardReference | None = Field(
        None,
        description="Reward model on other data that judges held-out responses too; nothing is optimised against it",
    )
    evaluation_iterations: int = Field(
        10, ge=1, description="Iterations between two evaluations on held_out and two tables of samples"
    )
    early_stopping: Stopping | None = Field(
        None, description="Default: patience 5 where held_out is given; off runs all iterations"
    )
    keep: Literal["best", "last"] | None = Field(
        None,
        description="The policy that becomes the model: of the best evaluation, or the last; default: best where "
        "held_out is given",
    )
    guards: GuardsConfig = GuardsConfig()
    max_sampler_difference: float | None = Field(
        None,
        gt=0.0,
        description="Warn where log-probabilities of sampler and trainer differ by more nats a token, in the mean; "
        "default 0.01 in float32, 0.1 in bfloat16",
    )

    @field_validator("whiten_scores", mode="before")
    @classmethod
    def _whitened_over_what(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("no longer true or false; write batch for true, none for false")
        return value

    @model_validator(mode="after")
    def _beta_can_be_adapted(self) -> PpoConfig:
        if self.kl_target is None:
            return self
        if self.kl_coefficient == 0.0:
            raise ValueError(
                "kl_target adapts kl_coefficient, which 0 can never leave; give it a start above 0"
            )
        if self.training.batch_size >= 5 * self.kl_horizon:
            raise ValueError(
                f"kl_horizon {self.kl_horizon} is too short for batch_size {self.training.batch_size}: one iteration "
                "could take all of β away; it must be more than a fifth of the batch"
            )
        return self

    @model_validator(mode="after")
    def _shared_trunk(self) -> PpoConfig:
        if self.value_head == "own":
            return self
        given = [
            name
            for name, is_given in (
                ("value", self.value is not None),
                ("training.value_learning_rate", self.training.value_learning_rate is not None),
                ("training.warmup_iterations", self.training.warmup_iterations > 0),
            )
            if is_given
        ]
        if given:
            raise ValueError(
                f"value_head: shared has no trunk and no optimiser of its own, so {', '.join(given)} means nothing; "
                "leave it out, or write value_head: own"
            )
        return self

    @model_validator(mode="after")
    def _something_to_judge_on(self) -> PpoConfig:
        needing = [
            name
            for name, value in (
                ("independent", self.independent is not None),
                ("early_stopping", isinstance(self.early_stopping, EarlyStopping)),
                ("keep: best", self.keep == "best"),
            )
            if value
        ]
        if needing and not self.held_out:
            raise ValueError(
                f"{', '.join(needing)} needs prompts to judge the policy on: name them in held_out"
            )
        if twice := sorted(set(self.prompts) & set(self.held_out)):
            raise ValueError(
                f"{', '.join(twice)} is in prompts and in held_out; what is trained on says nothing of other prompts"
            )
        return self

    @property
    def stopping(self) -> EarlyStopping | None:
        """Early stopping as it is in use."""
        if self.early_stopping is None:
            return EarlyStopping() if self.held_out else None
        return self.early_stopping if isinstance(self.early_stopping, EarlyStopping) else None

    @property
    def keeps_best(self) -> bool:
        """Whether the policy of the best evaluation becomes the model."""
        return bool(self.held_out) and self.keep != "last"

    def sampler_bound(self, precision: str) -> float:
        """`max_sampler_difference` as it is in use."""
        return self.max_sampler_difference or _SAMPLER_DIFFERENCE[precision]
