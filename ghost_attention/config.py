"""Configuration of Ghost Attention (§3.3, A.3.5)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llama2_chat.settings import (
    DataReference,
    DialoguesReference,
    ModelReference,
    SamplingConfig,
    StrictModel,
)
from llama2_chat.sft.config import SftTraining


class GhostAttentionConfig(StrictModel):
    """Sample dialogues with an instruction on every user turn; train with it on the first turn alone."""

    kind: Literal["ghost_attention"] = "ghost_attention"
    policy: ModelReference = Field(description="The latest RLHF model: sampled from, then fine-tuned")
    dialogues: list[DialoguesReference] = Field(
        min_length=1, description="Multi-turn dialogues: the user's side"
    )
    instructions: list[DataReference] = Field(min_length=1, description="What is to be kept throughout")
    history: Literal["resampled", "original"] = Field(
        "resampled", description="Whether the earlier answers are sampled too or stay the dialogue's own"
    )
    max_instructions: int = Field(2, ge=1, description="Instructions combined at random, one of a group each")
    short_fraction: float = Field(0.5, ge=0.0, le=1.0, description="Share of dialogues with short forms")
    loss_policy: Literal["last_answer", "all_answers"] = Field(
        "last_answer", description="`all_answers` is the control: nothing else differs"
    )
    sampling: SamplingConfig = SamplingConfig(temperature=1.0)
    sft_dialogues: list[DialoguesReference] = Field(
        default_factory=list,
        description="Mixed into the fine-tuning: data entries, or earlier stages, which stand for what they kept",
    )
    sft_fraction: float = Field(
        0.5, ge=0.0, lt=1.0, description="Share of SFT dialogues in the fine-tuning mix, if there are any"
    )
    training: SftTraining = SftTraining()
