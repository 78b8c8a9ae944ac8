"""Configuration of reward-model training; defaults are the paper's (§3.2.2)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from llama2_chat.dialogue import RATINGS
from llama2_chat.settings import DataReference, ModelReference, StrictModel, TrainingConfig


class RewardTraining(TrainingConfig):
    """§3.2.2: 1 epoch, 1e-5 (5e-6 for 70B), cosine to 10 %, warm-up 3 % and at least 5 steps, 512 pairs."""

    learning_rate: float = Field(1e-5, gt=0.0)
    batch_size: int = Field(512, ge=1, description="Pairs per optimiser step")
    epochs: float = Field(1.0, gt=0.0)
    warmup_ratio: float = Field(0.03, ge=0.0, le=1.0)
    min_warmup_steps: int = Field(5, ge=0)


class RewardConfig(StrictModel):
    """One reward model."""

    kind: Literal["reward"] = "reward"
    model: ModelReference = Field(description="Chat checkpoint that the reward model starts from")
    preferences: list[DataReference] = Field(min_length=1)
    held_out: list[DataReference] = Field(
        default_factory=list, description="Pairs that accuracy is measured on, never trained on"
    )
    domain: Literal["helpfulness", "safety"]
    margin: Literal["none", "small", "large"] | dict[str, float] = Field(
        "small", description="Table 27, or a margin for each rating"
    )
    safety_loss_weight: float | None = Field(
        None, ge=0.0, description="Weight of the safety classification loss; default 1 for safety, else 0"
    )
    training: RewardTraining = RewardTraining()

    @field_validator("margin")
    @classmethod
    def _ratings_known(cls, margin: str | dict[str, float]) -> str | dict[str, float]:
        if isinstance(margin, dict):
            unknown = sorted(set(margin) - set(RATINGS))
            if unknown:
                raise ValueError(f"ratings {unknown} unknown; one of {', '.join(RATINGS)}")
            if set(margin) != set(RATINGS):
                raise ValueError(f"a margin table needs all of {', '.join(RATINGS)}")
        return margin

    @property
    def safety_weight(self) -> float:
        """The weight in use."""
        if self.safety_loss_weight is not None:
            return self.safety_loss_weight
        return 1.0 if self.domain == "safety" else 0.0
