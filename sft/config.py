"""Configuration of supervised fine-tuning; defaults are the paper's (§3.1)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from llama2_chat.settings import DialoguesReference, ModelReference, PackedTraining, StrictModel

MOST_REPEATS = 100
"""A weight above this, or a count of more passes over its file, is a slip of the pen."""


class SftTraining(PackedTraining):
    """§3.1: cosine from 2e-5, weight decay 0.1, batch 64, sequence length 4096, 2 epochs."""

    learning_rate: float = Field(2e-5, gt=0.0)
    batch_size: int = Field(64, ge=1, description="Packed rows per optimiser step")
    epochs: float = Field(2.0, gt=0.0)


class SftConfig(StrictModel):
    """One supervised fine-tuning run."""

    kind: Literal["sft"] = "sft"
    model: ModelReference = "base"
    dialogues: list[DialoguesReference] = Field(min_length=1)
    weights: list[float] | None = Field(
        None, description="How often each file's dialogues occur: 0.5 a random half, 2 twice; default once"
    )
    counts: list[Annotated[int, Field(ge=0)] | None] | None = Field(
        None, description="Instead of weights: how many dialogues to draw from each file; null takes all"
    )
    held_out: list[DialoguesReference] = Field(
        default_factory=list, description="Dialogues that the loss is measured on, before and after"
    )
    evaluation_steps: int | None = Field(
        None,
        ge=1,
        description="Optimiser steps between two measurements on held_out in the course of training",
    )
    sample_prompts: int = Field(
        0, ge=0, description="Held-out questions that are answered, greedily, at each of these measurements"
    )
    loss_policy: Literal["all_answers", "last_answer"] = "all_answers"
    training: SftTraining = SftTraining()

    @model_validator(mode="after")
    def _something_to_measure_on(self) -> SftConfig:
        if self.evaluation_steps is not None and not self.held_out:
            raise ValueError("evaluation_steps needs dialogues to measure on: name them in held_out")
        if self.sample_prompts and self.evaluation_steps is None:
            raise ValueError("sample_prompts are answered every evaluation_steps, which is not set")
        return self

    @field_validator("weights")
    @classmethod
    def _one_for_each_file(cls, weights: list[float] | None, info: ValidationInfo) -> list[float] | None:
        if weights is not None:
            files = len(info.data.get("dialogues", weights))
            if len(weights) != files:
                raise ValueError(f"{len(weights)} weights for {files} files of dialogues; give one for each")
            if not all(0 <= weight <= MOST_REPEATS for weight in weights) or not any(weights):
                raise ValueError(f"every weight is from 0 to {MOST_REPEATS}, at least one above 0")
        return weights

    @field_validator("counts")
    @classmethod
    def _one_count_for_each_file(
        cls, counts: list[int | None] | None, info: ValidationInfo
    ) -> list[int | None] | None:
        if counts is not None:
            files = len(info.data.get("dialogues", counts))
            if info.data.get("weights") is not None:
                raise ValueError("weights are given too; give one of the two")
            if len(counts) != files:
                raise ValueError(f"{len(counts)} counts for {files} files of dialogues; give one for each")
            if not any(count is None or count > 0 for count in counts):
                raise ValueError("every count is 0; give at least one above 0, or null for a whole file")
        return counts
