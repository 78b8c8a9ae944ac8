"""Configuration vocabulary that recipes and single-stage configurations share.

Pydantic models only: nothing here imports torch, so `llama2-chat validate` answers at once.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

DEVICE_PATTERN = r"^(auto|cpu|cuda(:\d+)?)$"


class StrictModel(BaseModel):
    """A configuration mapping: an unknown key or an infinite number is an error, nothing changes afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


RowKind = Literal["dialogues", "preferences", "samples"]
"""What stages make for later ones, beside models."""


@dataclass(frozen=True)
class Reference:
    """Marks a configuration field that names an earlier stage's model (or the base), or a data set.

    `rows` says what a data set holds, where an earlier stage may have made it.
    """

    kind: Literal["model", "data"]
    rows: RowKind | None = None


ModelReference = Annotated[str, Reference("model")]
"""In a recipe: `base` or the name of an earlier stage. In a single-stage configuration: a model folder."""

DataReference = Annotated[str, Reference("data")]
"""In a recipe: the name of an entry of `data`. In a single-stage configuration: a JSONL file."""

DialoguesReference = Annotated[str, Reference("data", "dialogues")]
PreferencesReference = Annotated[str, Reference("data", "preferences")]
SamplesReference = Annotated[str, Reference("data", "samples")]
"""Like `DataReference`; in a recipe also what an earlier stage made: `STAGE` is its dataset, `STAGE.PART` another of
its files (`StageKind.makes`)."""


class CallableSource(StrictModel):
    """A Python function of one's own in place of a reward model.

    It gets a list of dialogues, each a list of `{"role", "content"}` that ends with the assistant's answer, and returns
    a list of raw scores (logits), one for each.
    """

    callable: str = Field(description="module:function, as in my_rewards:brevity")
    folder: str | None = Field(
        None, description="Where the module is, before the Python path; default: the folder of this file"
    )

    @field_validator("callable")
    @classmethod
    def _module_and_function(cls, name: str) -> str:
        module, _, function = name.partition(":")
        if not (function.isidentifier() and all(part.isidentifier() for part in module.split("."))):
            raise ValueError("module:function is wanted, as in my_rewards:brevity")
        return name

    @property
    def module(self) -> str:
        """Before the colon."""
        return self.callable.partition(":")[0]

    @property
    def function(self) -> str:
        """After it."""
        return self.callable.partition(":")[2]


class UrlSource(StrictModel):
    """A server that speaks `POST /v1/score`, as `llama2-chat serve` does, in place of a reward model."""

    url: str = Field(description="Where the server is, without /v1/score")
    api_key_env: str | None = Field(
        None, description="Environment variable with the key, sent as `Authorization: Bearer`"
    )
    batch_size: int = Field(32, ge=1, description="Dialogues in one request")
    parallel_requests: int = Field(4, ge=1, le=64)
    timeout_seconds: float = Field(60.0, gt=0.0, description="How long one answer is waited for")
    retries: int = Field(5, ge=0, le=100, description="Further tries where the server is busy or away")

    @field_validator("url")
    @classmethod
    def _an_address_alone(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("an address that begins with http:// or https:// is wanted")
        if parts.username is not None or parts.password is not None:
            raise ValueError("no key in the address: name the variable that holds it in api_key_env")
        if parts.query or parts.fragment or parts.path.rstrip("/").endswith("/v1/score"):
            raise ValueError("the server's address alone is wanted; /v1/score is added to it")
        return url


def _written_as(value: Any) -> str:
    """Which of the three a value is meant to be, so that only that one's problems are reported."""
    if isinstance(value, UrlSource) or (isinstance(value, dict) and "url" in value):
        return "a URL"
    return "a function" if isinstance(value, CallableSource | dict) else "a name"


RewardReference = Annotated[
    Annotated[ModelReference, Tag("a name")]
    | Annotated[CallableSource, Tag("a function")]
    | Annotated[UrlSource, Tag("a URL")],
    Discriminator(_written_as),
]
"""The name of a reward model's stage (in a single-stage configuration: its folder), or a custom reward."""


Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]
"""Experiment trackers by transformers' names; tensorboard writes into the stage's folder."""


class BaseModelSource(StrictModel):
    """Where the base model comes from: a folder, a hub id, or a folder with a GGUF file in it."""

    path: str = Field(description="Model folder (relative to the recipe's file) or hub id")
    gguf_file: str | None = Field(None, description="Name of a GGUF file inside the folder")


class RunSettings(StrictModel):
    """The recipe-level keys that every stage needs."""

    base_model: BaseModelSource
    models: dict[str, BaseModelSource] = Field(
        default_factory=dict,
        description="Further models by name, each written as base_model is; a name may stand wherever a policy may",
    )
    chat_format: Literal["llama2", "tokenizer"] = "llama2"
    seed: int = Field(0, ge=0, lt=2**32)
    precision: Literal["float32", "bfloat16"] = "float32"
    device: str = Field("auto", pattern=DEVICE_PATTERN)
    report_to: list[Tracker] = Field(
        default_factory=list, description="Trackers that training's loss, rate and gradient norm also go to"
    )

    @field_validator("report_to")
    @classmethod
    def _installed(cls, trackers: list[Tracker]) -> list[Tracker]:
        for name in trackers:
            if importlib.util.find_spec(name) is None:
                raise ValueError(f"{name} is not installed; pip install {name}, or leave it out")
        return trackers

    def gguf_file_of(self, path: str) -> str | None:
        """The GGUF file to load from the model folder `path`, where that is the base's or a named model's."""
        sources = (self.base_model, *self.models.values())
        return next((source.gguf_file for source in sources if source.path == path), None)

    def with_paths(self, base: str, models: Mapping[str, str]) -> RunSettings:
        """The same settings with these folders."""
        moved = {
            name: source.model_copy(update={"path": models[name]}) for name, source in self.models.items()
        }
        base_model = self.base_model.model_copy(update={"path": base})
        return self.model_copy(update={"base_model": base_model, "models": moved})


class VllmConfig(StrictModel):
    """vLLM's server, in an environment of its own (`make vllm-env`)."""

    python: str = Field(
        ".venv-vllm/bin/python",
        description="The interpreter of vLLM's environment, from the current folder",
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="Of weights and arithmetic; default: the run's precision"
    )
    max_model_len: int | None = Field(
        None,
        ge=2,
        description="Most tokens of a prompt and its response together; default: the model's context",
    )
    kv_cache_gib: float = Field(4.0, gt=0.0, description="Memory of the key/value cache")
    start_seconds: float = Field(900.0, gt=0.0, description="How long the start is waited for")
    timeout_seconds: float = Field(
        3600.0, gt=0.0, description="How long the samples of one prompt are waited for"
    )

    @property
    def interpreter(self) -> Path:
        """Not resolved: in a virtual environment it is a link, and where the link lies is what counts."""
        return Path(self.python).expanduser().absolute()

    def missing_environment(self) -> str | None:
        """What is wrong where there is no such interpreter, and what to do."""
        if self.interpreter.is_file():
            return None
        return (
            f"no interpreter {self.interpreter}; `make vllm-env` builds vLLM's environment into .venv-vllm, and this "
            "key names its interpreter"
        )


class SamplingConfig(StrictModel):
    """How responses are sampled from a policy."""

    backends: ClassVar[tuple[str, ...]] = ("transformers",)
    """Those that the stage can sample with."""

    temperature: float = Field(1.0, ge=0.0, description="0 is greedy decoding")
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    max_new_tokens: int = Field(512, ge=1)
    token_budget: int = Field(
        65536,
        ge=1,
        description="Most tokens (prompt + response, over all rows) held in one batch's cache; not for vllm",
    )
    backend: Literal["transformers", "vllm"] = Field(
        "transformers", description="The model in this process, or a vLLM server (rejection_sampling alone)"
    )
    vllm: VllmConfig | None = Field(None, description="Settings of the backend vllm")

    @field_validator("backend")
    @classmethod
    def _can_serve(cls, backend: str) -> str:
        if backend not in cls.backends:
            raise ValueError(
                f"{backend} samples for rejection_sampling alone; here the model must be in this process: "
                f"{' or '.join(cls.backends)}, or leave the key out"
            )
        return backend

    @model_validator(mode="after")
    def _room_for_a_prompt(self) -> SamplingConfig:
        if self.vllm is not None and self.backend != "vllm":
            raise ValueError("vllm: its settings are given, but backend is transformers; write backend: vllm")
        longest = self.vllm.max_model_len if self.vllm is not None else None
        if longest is not None and longest <= self.max_new_tokens:
            raise ValueError(
                f"vllm.max_model_len {longest} leaves no room for a prompt and max_new_tokens {self.max_new_tokens}"
            )
        return self


class ServedSamplingConfig(SamplingConfig):
    """Sampling for which the model need not be in this process."""

    backends: ClassVar[tuple[str, ...]] = ("transformers", "vllm")


class LoraConfig(StrictModel):
    """Train a low-rank adapter instead of the weights: W + alpha / rank · B A, with B and A of this rank."""

    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="On the adapter's input, in training")
    target_modules: list[str] = Field(
        default=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        min_length=1,
        description="Last names of the linear layers that get an adapter; default: all of a Llama's blocks",
    )
    save: Literal["merged", "adapter_only"] = Field(
        "merged",
        description="What model/ holds: all weights, or the adapter and where its base is, which saves disk",
    )


class TrainingConfig(StrictModel):
    """Optimiser, schedule and batch of one training run; each stage sets the paper's values as defaults."""

    learning_rate: float = Field(gt=0.0)
    batch_size: int = Field(ge=1, description="Sequences (pairs, for a reward model) per optimiser step")
    micro_batch_size: int | None = Field(None, ge=1, description="Sequences per forward pass; default: all")
    epochs: float = Field(gt=0.0)
    max_steps: int | None = Field(None, ge=1, description="Stop after this many optimiser steps")
    sequence_length: int = Field(4096, ge=8, description="Most tokens in one sequence")
    weight_decay: float = Field(0.1, ge=0.0)
    adam_beta1: float = Field(0.9, ge=0.0, lt=1.0)
    adam_beta2: float = Field(0.95, ge=0.0, lt=1.0)
    adam_epsilon: float = Field(1e-5, gt=0.0)
    max_grad_norm: float = Field(1.0, gt=0.0)
    min_learning_rate_ratio: float = Field(0.1, ge=0.0, le=1.0, description="Cosine ends at this share")
    warmup_ratio: float = Field(0.0, ge=0.0, le=1.0, description="Share of the steps with rising rate")
    min_warmup_steps: int = Field(0, ge=0)
    checkpoint_steps: int = Field(100, ge=1, description="Optimiser steps between two checkpoints")
    gradient_checkpointing: bool = False
    lora: LoraConfig | None = Field(
        None,
        description="Train an adapter; default: train every weight, as the paper does",
    )


class PackedTraining(TrainingConfig):
    """Training on text that is packed into rows."""

    isolate: bool = Field(
        True, description="A dialogue sees nothing of its row's others; false: it sees those before it"
    )
