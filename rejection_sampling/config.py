"""Configuration of rejection-sampling fine-tuning (§3.2.3)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from llama2_chat.settings import (
    DataReference,
    DialoguesReference,
    ModelReference,
    RewardReference,
    SamplesReference,
    ServedSamplingConfig,
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
    sampling: ServedSamplingConfig = ServedSamplingConfig(temperature=1.2)
    temperatures: list[Annotated[float, Field(ge=0.0)]] = Field(
        default_factory=list,
        description="Tried on `temperature_prompts` first; the one whose best of K scores highest replaces "
        "sampling.temperature. Empty: no search",
    )
    temperature_prompts: list[DataReference] = Field(
        default_factory=list, description="Held-out prompts that temperatures are compared on"
    )
    temperature_samples_per_prompt: int | None = Field(
        None, ge=1, description="Samples of each prompt at each temperature, K or more; default: K"
    )
    temperature_max_prompts: int | None = Field(
        None, ge=1, description="Use only the first so many of `temperature_prompts`; default: all"
    )
    safety_threshold: float = Field(0.15, gt=0.0, lt=1.0)
    select: Literal["best", "random"] = Field(
        "best", description="`random` keeps any sample: the control that shows what selection is worth"
    )
    when_all_unsafe: Literal["keep", "drop"] = Field(
        "keep",
        description="A prompt all of whose complete answers are unsafe, σ(safety score) < 0.5: `keep` trains on the "
        "best of them all the same, `drop` leaves the prompt out",
    )
    earlier_samples: list[SamplesReference] = Field(
        default_factory=list, description="Samples of earlier iterations, as `v1.samples`"
    )
    pool: Literal["last_iteration", "best_of_all", "top_k_mix"] = Field(
        "best_of_all",
        description="What is selected from: this iteration's samples alone, or with `earlier_samples` too, of which "
        "the best (`best_of_all`) or the `pool_top_k` best distinct answers (`top_k_mix`) of each prompt are kept",
    )
    pool_top_k: int = Field(2, ge=1, description="Answers kept of each prompt where pool is top_k_mix")
    start_from: Literal["base", "policy"] = Field("base", description="What the fine-tuning starts from")
    base: ModelReference = "base"
    sft_dialogues: list[DialoguesReference] = Field(
        default_factory=list,
        description="Mixed into the fine-tuning: data entries, or earlier stages, which stand for what they kept",
    )
    sft_fraction: float = Field(
        0.5, ge=0.0, lt=1.0, description="Share of SFT dialogues in the fine-tuning mix, if there are any"
    )
    iteration: int = Field(1, ge=1, description="Which RLHF version this is: 1 for V1")
    training: SftTraining = SftTraining()

    @field_validator("temperatures")
    @classmethod
    def _distinct(cls, temperatures: list[float]) -> list[float]:
        twice = sorted({value for value in temperatures if temperatures.count(value) > 1})
        if twice:
            raise ValueError(f"{', '.join(f'{value:g}' for value in twice)} stands there more than once")
        return temperatures

    @model_validator(mode="after")
    def _whole_search(self) -> RejectionSamplingConfig:
        if bool(self.temperatures) != bool(self.temperature_prompts):
            there, missing = ("temperatures", "temperature_prompts")[:: 1 if self.temperatures else -1]
            raise ValueError(f"{there} without {missing}: a search needs both; give both or neither")
        samples = self.temperature_samples_per_prompt
        if samples is not None and samples < self.samples_per_prompt:
            raise ValueError(
                f"temperature_samples_per_prompt is {samples}: from fewer than samples_per_prompt "
                f"({self.samples_per_prompt}) the best of so many cannot be estimated"
            )
        return self

    @property
    def kept_per_prompt(self) -> int:
        """Most answers of one prompt that are trained on."""
        return self.pool_top_k if self.pool == "top_k_mix" else 1

    @property
    def uses_earlier(self) -> bool:
        """Whether answers of earlier iterations are selected from."""
        return bool(self.earlier_samples) and self.pool != "last_iteration"
