"""Configuration of Ghost Attention (§3.3, A.3.5)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from llama2_chat.dialogue import refuse_chat_tags
from llama2_chat.ghost_attention.checks import parse_check
from llama2_chat.ghost_attention.starter import STARTER_LISTS
from llama2_chat.settings import (
    DataReference,
    DialoguesReference,
    ModelReference,
    RewardReference,
    SamplingConfig,
    StrictModel,
)
from llama2_chat.sft.config import SftTraining

VALUE = "{value}"


class InstructionList(StrictModel):
    """One group of instructions: a template, and the values that stand in it one at a time.

    The values are written down, or asked of the policy itself. In the groups `hobby`, `language` and `figure` what is
    left out is the starter's (`starter.py`).
    """

    template: str = Field("", description="The instruction, with {value} in it")
    short: str | None = Field(None, description="Its short form, with {value} in it")
    values: list[str] = Field(default_factory=list, description="What stands in the place of {value}")
    question: str | None = Field(
        None, description="Instead of values: what the policy is asked for a list of"
    )
    answers: int = Field(1, ge=1, description="How many answers to the question are sampled and put together")
    check: str | None = Field(None, description="The program that checks it, with or without {value}")

    @model_validator(mode="after")
    def _whole(self) -> InstructionList:
        if VALUE not in self.template or (self.short is not None and VALUE not in self.short):
            raise ValueError(
                f"template and short need {VALUE}, where a value is to stand, as in You enjoy {VALUE}.; the groups "
                f"{', '.join(STARTER_LISTS)} have a template of their own"
            )
        if bool(self.values) == (self.question is not None):
            raise ValueError("give either values or a question that asks the policy for them")
        forms = [form for form in (self.template, self.short) if form is not None]
        # Put together too: a template's bracket and a value may make a tag.
        whole = [form.replace(VALUE, value) for form in forms for value in self.values]
        for text in (*forms, self.question or "", *self.values, *whole):
            refuse_chat_tags(text, "the text")
        if any(not value.strip() for value in self.values):
            raise ValueError("values: one is empty; write what is to be kept or remove it")
        if self.question is not None and not self.question.strip():
            raise ValueError("question: is empty; write what the policy is asked, or give values")
        if self.check is not None:
            for value in self.values or ["en" if self.check.startswith("language:") else "1"]:
                parse_check(self.check.replace(VALUE, value))
        return self


class GhostAttentionConfig(StrictModel):
    """Sample dialogues with an instruction on every user turn; train with it on the first turn alone."""

    kind: Literal["ghost_attention"] = "ghost_attention"
    policy: ModelReference = Field(description="The latest RLHF model: sampled from, then fine-tuned")
    dialogues: list[DialoguesReference] = Field(
        min_length=1, description="Multi-turn dialogues: the user's side"
    )
    instructions: list[DataReference] = Field(
        default_factory=list, description="Files of what is to be kept throughout"
    )
    instruction_lists: dict[str, InstructionList] = Field(
        default_factory=dict,
        description="More of it by group, put together from a template and a list; the starter's groups: "
        + ", ".join(STARTER_LISTS),
    )
    history: Literal["resampled", "original"] = Field(
        "resampled", description="Whether the earlier answers are sampled too or stay the dialogue's own"
    )
    max_instructions: int = Field(2, ge=1, description="Instructions combined at random, one of a group each")
    short_fraction: float = Field(0.5, ge=0.0, le=1.0, description="Share of dialogues with short forms")
    place: Literal["first_user", "system"] = Field(
        "first_user",
        description="Where the instruction stands in the data: the first message or the system's",
    )
    keep_instruction: Literal["first_turn", "every_turn"] = Field(
        "first_turn", description="`every_turn` is the control without the drop: the data stay as sampled"
    )
    rows_per_dialogue: Literal["last", "every_answer"] = Field(
        "last", description="One training row of a dialogue, or one that ends with each of its answers"
    )
    loss_policy: Literal["last_answer", "all_answers"] = Field(
        "last_answer", description="`all_answers` is the control: nothing else differs"
    )
    check: Literal["none", "instructions", "testbed", "reward"] = Field(
        "none",
        description="Who says whether an answer follows: nobody, the instructions' programs, the testbed's oracle, "
        "or check_reward; what does not follow is not trained on",
    )
    check_reward: RewardReference | None = Field(
        None, description="For check: reward, a reward model or a custom reward"
    )
    check_threshold: float = Field(0.0, description="Raw score (logit) from which an answer follows")
    sampling: SamplingConfig = SamplingConfig(temperature=1.0)
    sft_dialogues: list[DialoguesReference] = Field(
        default_factory=list,
        description="Mixed into the fine-tuning: data entries, or earlier stages, which stand for what they kept",
    )
    sft_fraction: float = Field(
        0.5, ge=0.0, lt=1.0, description="Share of SFT dialogues in the fine-tuning mix, if there are any"
    )
    training: SftTraining = SftTraining()

    @field_validator("instruction_lists", mode="before")
    @classmethod
    def _from_starter(cls, lists: Any) -> Any:
        """Filled in here, the starter's values are in the resolved recipe too."""
        if not isinstance(lists, dict):
            return lists
        return {group: _filled_in(group, given) for group, given in lists.items()}

    @model_validator(mode="after")
    def _consistent(self) -> GhostAttentionConfig:
        if not self.instructions and not self.instruction_lists:
            raise ValueError(
                "instructions: nothing is to be kept; name a file here, or groups in instruction_lists"
            )
        if (self.check == "reward") != (self.check_reward is not None):
            raise ValueError("check_reward: belongs to check: reward; give both or neither")
        if self.check_threshold and self.check != "reward":
            raise ValueError(
                f"check_threshold: has no effect with check: {self.check}; leave it out or choose check: reward"
            )
        if any(not group.strip() for group in self.instruction_lists):
            raise ValueError("instruction_lists: a group has no name; give it one")
        if self.place == "system" and self.keep_instruction == "every_turn":
            raise ValueError(
                "place: with keep_instruction: every_turn the instruction stands in every user message; "
                "leave place out or choose keep_instruction: first_turn"
            )
        return self


def _filled_in(group: Any, given: Any) -> Any:
    if group not in STARTER_LISTS or not isinstance(given, dict):
        return given
    starter = STARTER_LISTS[group]
    filled: dict[str, Any] = {"template": starter.template, "short": starter.short}
    if "values" not in given and "question" not in given:
        filled["values"] = list(starter.values)
        if starter.check is not None:
            filled["check"] = starter.check
    own_wording = {"short": None} if "template" in given else {}
    return {**filled, **own_wording, **given}
