"""Configuration of safety context distillation (§4.2.4)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from llama2_chat.dialogue import refuse_chat_tags
from llama2_chat.settings import (
    DataReference,
    DialoguesReference,
    ModelReference,
    RewardReference,
    SamplingConfig,
    StrictModel,
)
from llama2_chat.sft.config import SftTraining


class ContextDistillationConfig(StrictModel):
    """Answer adversarial prompts under a safety preprompt, fine-tune on the answers without it."""

    kind: Literal["context_distillation"] = "context_distillation"
    policy: ModelReference = Field(description="Sampled from, then fine-tuned")
    safety: RewardReference = Field(
        description="Safety reward model, or a custom reward: it decides which answers are kept"
    )
    prompts: list[DataReference] = Field(
        min_length=1, description="Adversarial prompts; rows that are not tagged is_safety are passed over"
    )
    preprompt: str = Field(
        "You are a {adjectives} assistant.", description="Put before the prompt as a system message"
    )
    adjectives: list[str] = Field(
        default_factory=lambda: ["safe", "responsible", "respectful", "wise"],
        min_length=1,
        description="Two at a time, at random, joined by `and`, stand for {adjectives}",
    )
    category_templates: dict[Literal["illicit", "hateful", "unqualified_advice"], str] = Field(
        default_factory=dict, description="Added to the preprompt where the prompt's risk category is known"
    )
    keep: Literal["better", "all"] = Field(
        "better", description="`better`: only where the safety score is above the answer's without preprompt"
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

    @field_validator("preprompt", "adjectives", "category_templates")
    @classmethod
    def _no_chat_tags(cls, value: str | list[str] | dict[str, str]) -> str | list[str] | dict[str, str]:
        texts = [value] if isinstance(value, str) else value.values() if isinstance(value, dict) else value
        for text in texts:
            refuse_chat_tags(text, "the text")
        return value
