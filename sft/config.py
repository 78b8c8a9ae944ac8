"""Configuration of supervised fine-tuning; defaults are the paper's (§3.1)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llama2_chat.settings import DataReference, ModelReference, StrictModel, TrainingConfig


class SftTraining(TrainingConfig):
    """§3.1: cosine from 2e-5, weight decay 0.1, batch 64, sequence length 4096, 2 epochs."""

    learning_rate: float = Field(2e-5, gt=0.0)
    batch_size: int = Field(64, ge=1, description="Packed rows per optimiser step")
    epochs: float = Field(2.0, gt=0.0)


class SftConfig(StrictModel):
    """One supervised fine-tuning run."""

    kind: Literal["sft"] = "sft"
    model: ModelReference = "base"
    dialogues: list[DataReference] = Field(min_length=1)
    held_out: list[DataReference] = Field(
        default_factory=list, description="Dialogues that the loss is measured on, before and after"
    )
    loss_policy: Literal["all_answers", "last_answer"] = "all_answers"
    training: SftTraining = SftTraining()
