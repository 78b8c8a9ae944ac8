"""Configuration of pretraining; the optimiser's defaults are the paper's (§2.2), its sizes a tiny model's."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from llama2_chat.settings import DataReference, PackedTraining, StrictModel


class Architecture(StrictModel):
    """A Llama decoder: RMSNorm before each block, SwiGLU, rotary positions, grouped-query attention.

    Source: §2.2; the first Llama paper for the feed-forward width of 8/3 of the hidden size.
    """

    hidden_size: int = Field(128, ge=8)
    layers: int = Field(4, ge=1)
    attention_heads: int = Field(4, ge=1)
    key_value_heads: int = Field(2, ge=1, description="Fewer than attention_heads: grouped-query attention")
    feed_forward_size: int | None = Field(None, ge=8, description="Default: 8/3 hidden_size, in steps of 8")
    context_length: int = Field(4096, ge=8)
    rope_theta: float = Field(10000.0, gt=0.0)
    norm_epsilon: float = Field(1e-5, gt=0.0)
    initializer_std: float = Field(0.02, gt=0.0)
    tie_embeddings: bool = False

    @model_validator(mode="after")
    def _heads_divide(self) -> Architecture:
        if self.hidden_size % (2 * self.attention_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of twice attention_heads "
                f"({self.attention_heads}), so that each head has an even size"
            )
        if self.attention_heads % self.key_value_heads:
            raise ValueError(
                f"key_value_heads {self.key_value_heads} must divide attention_heads {self.attention_heads}"
            )
        return self


class PretrainTraining(PackedTraining):
    """§2.2: AdamW 0.9/0.95, eps 1e-5, cosine to 10 % after 2,000 warm-up steps, decay 0.1, clipping 1.0."""

    learning_rate: float = Field(3e-4, gt=0.0)
    batch_size: int = Field(1024, ge=1, description="Packed rows per optimiser step")
    epochs: float = Field(1.0, gt=0.0)
    min_warmup_steps: int = Field(2000, ge=0)
    lora: None = Field(None, description="Always null: a model made from nothing has no weights to adapt")


class PretrainConfig(StrictModel):
    """A base model from scratch: its tokenizer and its weights, both learnt from `text`."""

    kind: Literal["pretrain"] = "pretrain"
    text: DataReference | Annotated[list[DataReference], Field(min_length=1)] = Field(
        description='JSONL with one document a line, {"text": "…"}; a list of several sources'
    )
    proportions: list[float] | None = Field(
        None,
        description="Share of all tokens seen that comes from each source, relative to the sum of the shares; "
        "default: every document once an epoch",
    )
    architecture: Architecture = Architecture()
    vocabulary_size: int = Field(
        32000, ge=300, description="Of the BPE tokenizer, bytes and <s> </s> included"
    )
    training: PretrainTraining = PretrainTraining()

    @property
    def sources(self) -> list[str]:
        """The sources of text, one or several."""
        return [self.text] if isinstance(self.text, str) else self.text

    @field_validator("proportions")
    @classmethod
    def _one_for_each_source(cls, found: list[float] | None, info: ValidationInfo) -> list[float] | None:
        if found is not None:
            text = info.data.get("text", found)
            sources = 1 if isinstance(text, str) else len(text)
            if len(found) != sources:
                raise ValueError(f"{len(found)} proportions for {sources} sources of text; give one for each")
            if not all(share >= 0 for share in found) or not any(found):
                raise ValueError(f"every proportion is a number from 0, at least one above 0; found {found}")
        return found

    @model_validator(mode="after")
    def _rows_fit_the_context(self) -> PretrainConfig:
        length, context = self.training.sequence_length, self.architecture.context_length
        if length > context:
            raise ValueError(
                f"training.sequence_length {length} exceeds architecture.context_length {context}; "
                "positions beyond it would be trained that the model does not claim to have"
            )
        return self
