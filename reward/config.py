"""Configuration of reward-model training; defaults are the paper's (§3.2.2)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from llama2_chat.dialogue import RATINGS
from llama2_chat.settings import ModelReference, PreferencesReference, StrictModel, TrainingConfig

_OTHER_SHARE = {"helpfulness": 0.5, "safety": 0.1}
"""§3.2.2: as much other data as helpfulness data; 10 % helpfulness data beside the safety data."""


def number_to_draw(own: float, share: float) -> int:
    """Other pairs that make up `share` of a set with `own` further ones: own · share / (1 - share), rounded."""
    return round(own * share / (1 - share))


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
    preferences: list[PreferencesReference] = Field(
        min_length=1, description="Pairs that are all trained on: those of the domain"
    )
    other_preferences: list[PreferencesReference] = Field(
        default_factory=list, description="Pairs of other domains, of which a share is drawn at random"
    )
    other_share: float | None = Field(
        None,
        gt=0.0,
        lt=1.0,
        description="Share of the whole training set that is drawn from other_preferences, uniformly over all their "
        "usable pairs; default 0.5 for helpfulness, 0.1 for safety",
    )
    held_out: list[PreferencesReference] = Field(
        default_factory=list, description="Pairs that accuracy is measured on, never trained on"
    )
    domain: Literal["helpfulness", "safety"]
    margin: Literal["none", "small", "large"] | dict[str, float] = Field(
        "small", description="Table 27, or a margin for each rating"
    )
    safety_loss_weight: float | None = Field(
        None, ge=0.0, description="Weight of the safety classification loss; default 1 for safety, else 0"
    )
    centering: float = Field(
        0.0,
        ge=0.0,
        description="Coefficient of the mean of (r_chosen + r_rejected)², which pulls scores towards 0; not in the "
        "paper",
    )
    training: RewardTraining = RewardTraining()

    @model_validator(mode="after")
    def _others_are_others(self) -> RewardConfig:
        if self.other_share is not None and not self.other_preferences:
            raise ValueError("other_share is a share of pairs of other files: name them in other_preferences")
        if twice := sorted(set(self.preferences) & set(self.other_preferences)):
            raise ValueError(
                f"{', '.join(twice)} is in preferences and in other_preferences; all of it is trained on already, "
                "so take it out of other_preferences"
            )
        return self

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
    def share_of_others(self) -> float | None:
        """The share in use; None where no others are named."""
        if not self.other_preferences:
            return None
        return _OTHER_SHARE[self.domain] if self.other_share is None else self.other_share

    @property
    def safety_weight(self) -> float:
        """The weight in use."""
        if self.safety_loss_weight is not None:
            return self.safety_loss_weight
        return 1.0 if self.domain == "safety" else 0.0
