"""Configuration of collecting preference pairs from the latest policies (§3.2.1)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from llama2_chat.settings import CallableSource, DataReference, ModelReference, SamplingConfig, StrictModel

PAPER_HELD_OUT = 1000
"""§3.2.1: pairs of each batch that no reward model is trained on."""
LARGEST_DEFAULT_SHARE = 0.1


class TestbedOptions(StrictModel):
    """How sure the simulated annotator is."""

    __test__ = False  # no class of tests, whatever pytest makes of the name

    noise: float = Field(0.1, ge=0.0, description="Standard deviation of its error on a score difference")


class TestbedAnnotator(StrictModel):
    """The test world's simulated annotator, who knows the truth and errs by a known amount."""

    __test__ = False

    testbed: TestbedOptions


class CallableAnnotator(CallableSource):
    """A Python function of one's own that annotates.

    It gets a list of `{"prompt": [{"role", "content"}, …], "answers": [a, b]}` and returns a list with, for each,
    `{"preferred": 0 or 1, "rating"?, "safe"?: [bool, bool]}`.
    """


class FileAnnotator(StrictModel):
    """A file that people fill: one line for each line of the stage's `to_annotate.jsonl`."""

    file: str = Field(min_length=1, description="JSONL, relative to this file; it need not be there yet")


def _written_as(value: Any) -> str:
    """Which of the three a value is meant to be, so that only that one's problems are reported."""
    if isinstance(value, CallableAnnotator) or (isinstance(value, dict) and "callable" in value):
        return "a function"
    if isinstance(value, FileAnnotator) or (isinstance(value, dict) and "file" in value):
        return "a file"
    return "the testbed"


Annotator = Annotated[
    Annotated[TestbedAnnotator, Tag("the testbed")]
    | Annotated[CallableAnnotator, Tag("a function")]
    | Annotated[FileAnnotator, Tag("a file")],
    Discriminator(_written_as),
]


class PreferencesConfig(StrictModel):
    """Two answers to each prompt, of different variants, and an annotator's choice between them."""

    kind: Literal["preferences"] = "preferences"
    policies: list[ModelReference] = Field(min_length=1, description="Model variants that answer")
    temperatures: list[Annotated[float, Field(ge=0.0)]] = Field(
        default=[0.8, 1.0, 1.2],
        min_length=1,
        description="The two answers differ in policy, temperature or both, drawn at random",
    )
    prompts: list[DataReference] = Field(min_length=1)
    max_prompts: int | None = Field(
        None, ge=2, description="Draw so many prompts at random, others in each iteration; default: all"
    )
    sampling: SamplingConfig = Field(
        SamplingConfig(), description="Of every answer; its temperature is one of temperatures"
    )
    domain: Literal["helpfulness", "safety"]
    annotator: Annotator = Field(description="Who chooses: {testbed: {}}, {callable: …} or {file: …}")
    held_out: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0.0, lt=1.0)] | None = Field(
        None,
        description="About how many pairs, or which share of them, go into held_out.jsonl, chosen by the first user "
        f"message; default {PAPER_HELD_OUT}, but at most {LARGEST_DEFAULT_SHARE:g} of the prompts",
    )
    iteration: int = Field(1, ge=1, description="Which RLHF version the pairs are collected for: 1 for V1")

    @field_validator("policies", "temperatures")
    @classmethod
    def _each_once(cls, values: list[Any]) -> list[Any]:
        if twice := sorted({value for value in values if values.count(value) > 1}):
            raise ValueError(f"{', '.join(map(str, twice))} stands twice; name each once")
        return values

    @field_validator("sampling")
    @classmethod
    def _temperature_elsewhere(cls, sampling: SamplingConfig) -> SamplingConfig:
        if sampling.temperature != SamplingConfig().temperature:
            raise ValueError("sampling.temperature has no effect here; give temperatures, a list")
        return sampling

    @model_validator(mode="after")
    def _two_variants(self) -> PreferencesConfig:
        if len(self.policies) * len(self.temperatures) < 2:
            raise ValueError(
                "one policy at one temperature gives no two variants; name another in policies or in temperatures"
            )
        return self

    def held_out_share(self, prompts: int) -> float:
        """The share of first user messages that is held out of a batch of so many prompts."""
        if isinstance(self.held_out, float):
            return self.held_out
        if self.held_out is not None:
            return self.held_out / prompts
        return min(PAPER_HELD_OUT / prompts, LARGEST_DEFAULT_SHARE)
