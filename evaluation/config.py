"""Configuration of the evaluation that follows a run's stages."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from llama2_chat.settings import DataReference, ModelReference, RewardReference, SamplingConfig, StrictModel


class EvaluationConfig(StrictModel):
    """Every policy of the run, and the base, on the same held-out prompts with the same seed."""

    helpfulness: RewardReference | None = Field(
        None, description="Helpfulness reward model, or a custom reward; `prompts` need it"
    )
    safety: RewardReference | None = Field(None, description="Safety reward model, or a custom reward")
    independent: ModelReference | None = Field(
        None, description="A third reward model, trained on other data and never optimised against"
    )
    prompts: list[DataReference] = Field(default_factory=list, description="Held-out harmless prompts")
    greedy_prompts: list[DataReference] = Field(
        default_factory=list,
        description="Held-out harmless prompts that are answered once, greedily; default: `prompts`",
    )
    safety_prompts: list[DataReference] = Field(default_factory=list, description="Held-out unsafe prompts")
    borderline_prompts: list[DataReference] = Field(
        default_factory=list, description="Harmless prompts that look unsafe, for false refusals"
    )
    attribute_dialogues: list[DataReference] = Field(
        default_factory=list,
        description="Testbed dialogues that state something first and ask for it last, for recall",
    )
    recall_turns: list[Annotated[int, Field(ge=2)]] = Field(
        default=[2, 4, 6, 10, 20], min_length=1, description="Turns at which recall is measured"
    )
    samples_per_prompt: int = Field(8, ge=1, description="K of best-of-K on the harmless prompts")
    safety_samples_per_prompt: int = Field(1, ge=1)
    sampling: SamplingConfig = SamplingConfig(temperature=1.0)
    safety_threshold: float = Field(0.15, gt=0.0, lt=1.0)

    @model_validator(mode="after")
    def _something_to_measure(self) -> EvaluationConfig:
        if (self.prompts or self.greedy_prompts) and self.helpfulness is None:
            raise ValueError("prompts are scored by helpfulness: name that reward model")
        if self.helpfulness is not None and not self.prompts:
            raise ValueError("helpfulness scores answers to prompts: name a set of held-out harmless prompts")
        if not (self.prompts or self.safety_prompts or self.borderline_prompts or self.attribute_dialogues):
            raise ValueError("nothing to measure on: name prompts, safety_prompts or borderline_prompts")
        return self
