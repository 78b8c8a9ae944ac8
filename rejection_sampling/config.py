"""Configuration of rejection-sampling fine-tuning (§3.2.3)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llama2_chat.settings import (
    DataReference,
    DialoguesReference,
    ModelReference,
    RewardReference,
    SamplesReference,
    SamplingConfig,
    StrictModel,
)
from llama2_chat.sft.config import SftTraining


class RejectionSamplingConfig(StrictModel):
    """Sample K answers to each prompt, keep the best by R_c, fine-tune on them."""

    kind: Literal["rejection_sampling"] = "rejection_sampling"
    policy: ModelReference = Field(description="The model that is sampled from: the most recent one")
    helpfulness: RewardReference = Field(description="Helpfulness reward model, or a custom reward")
    safety: RewardReference | None = Field(
        None, description="Safety reward model, or a custom reward; without it R_c = R_h"
    )
    prompts: list[DataReference] = Field(min_length=1)
    samples_per_prompt: int = Field(10, ge=1, description="K")
    sampling: SamplingConfig = SamplingConfig(temperature=1.2)
    safety_threshold: float = Field(0.15, gt=0.0, lt=1.0)
    select: Literal["best", "random"] = Field(
        "best", description="`random` keeps any sample: the control that shows what selection is worth"
    )
    start_from: Literal["base", "policy"] = Field("base", description="What the fine-tuning starts from")
    base: ModelReference = "base"
    sft_dialogues: list[DialoguesReference] = Field(
        default_factory=list,
        description="Mixed into the fine-tuning: data entries, or earlier stages, which stand for what they kept",
    )
    sft_fraction: float = Field(
        0.5, ge=0.0, lt=1.0, description="Share of SFT dialogues in the fine-tuning mix, if there are any"
    )
    earlier_samples: list[SamplesReference] = Field(default_factory=list, description="Of earlier versions")
    iteration: int = Field(1, ge=1, description="Which RLHF version this is: 1 for V1")
    training: SftTraining = SftTraining()
