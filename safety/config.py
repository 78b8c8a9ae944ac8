"""Configuration of safety context distillation (§4.2.4)."""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import Literal

from pydantic import Field, field_validator, model_validator

from llama2_chat.dialogue import RiskCategory, refuse_chat_tags
from llama2_chat.safety.preprompt import ADJECTIVES, ANSWER_TEMPLATES, PLACE, PREPROMPTS
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
    only_adversarial: bool = Field(
        True, description="false: prompts that are not tagged is_safety are distilled too, a control"
    )
    preprompts: list[str] = Field(
        default_factory=lambda: list(PREPROMPTS),
        min_length=1,
        description="Templates of the preprompt, one at random for each prompt, put before it as a system message",
    )
    adjectives: list[str] = Field(
        default_factory=lambda: list(ADJECTIVES),
        min_length=1,
        description="Two at a time, at random, joined by `and`, stand for {adjectives}",
    )
    category_templates: dict[RiskCategory, str] = Field(
        default_factory=lambda: dict(ANSWER_TEMPLATES),
        description="Answer templates, added to the preprompt where the prompt's risk category is known; a mapping of "
        "one's own takes the place of all, {} leaves them out",
    )
    compare_preprompts: bool = Field(
        False,
        description="Where an answer template is used, one more answer under the preprompt without it, which is scored "
        "for comparison and never trained on",
    )
    keep: Literal["better", "all"] = Field(
        "better",
        description="`better`: only where the safety score rises by more than min_rise; `all`: a control",
    )
    min_rise: float = Field(
        0.0,
        ge=0.0,
        description="Raw safety score (logits) by which the answer must exceed the one without preprompt",
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

    @field_validator("preprompts", "adjectives", "category_templates")
    @classmethod
    def _texts(cls, value: list[str] | dict[RiskCategory, str]) -> list[str] | dict[RiskCategory, str]:
        for text in value.values() if isinstance(value, dict) else value:
            refuse_chat_tags(text, "the text")
            if not text.strip():
                raise ValueError("a text is empty; write one or take it out")
        return value

    @field_validator("preprompts")
    @classmethod
    def _no_misspelt_place(cls, templates: list[str]) -> list[str]:
        for template in templates:
            for name in re.findall(r"\{(\w+)\}", template):
                if f"{{{name}}}" != PLACE and get_close_matches(
                    name.lower(), [PLACE.strip("{}")], cutoff=0.8
                ):
                    raise ValueError(f'"{template}" holds {{{name}}}; did you mean {PLACE}?')
        return templates

    @field_validator("adjectives")
    @classmethod
    def _each_once(cls, adjectives: list[str]) -> list[str]:
        words = [adjective.strip().casefold() for adjective in adjectives]
        if twice := sorted({word for word in words if words.count(word) > 1}):
            raise ValueError(f"{', '.join(twice)} stands more than once, and would be joined with itself")
        return adjectives

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> ContextDistillationConfig:
        for template in self.preprompts:  # a template's bracket and an adjective may make a tag
            for adjective in self.adjectives:
                refuse_chat_tags(template.replace(PLACE, adjective), f'"{template}" with "{adjective}"')
        if self.adjectives != list(ADJECTIVES) and not any(PLACE in text for text in self.preprompts):
            raise ValueError(
                f"adjectives are given, but no template of preprompts holds {PLACE}; add it to one"
            )
        if self.min_rise and self.keep == "all":
            raise ValueError("min_rise has no effect with keep: all; leave one of the two out")
        if self.compare_preprompts and not self.category_templates:
            raise ValueError(
                "compare_preprompts needs category_templates to compare with; give some or leave it out"
            )
        return self
