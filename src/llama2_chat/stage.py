"""What a stage is: a kind with a configuration, a function that runs it, and a folder that it writes.

A recipe's run and a single-stage command use this one mechanism. Kinds are named by strings and imported
when needed, so that reading a recipe imports no training code.
"""

from __future__ import annotations

import datetime
import importlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llama2_chat.distributed import is_main_process
from llama2_chat.errors import UserInputError, did_you_mean
from llama2_chat.files import remove
from llama2_chat.settings import LoraConfig, RowKind, RunSettings, StrictModel

_OPTIMISER_FILES = ("optimizer*", "scheduler.pt", "scaler.pt", "rng_state*.pth", "training_args.bin")
_PROGRESS = ("text", "best-*", *(f"checkpoint-*/{pattern}" for pattern in _OPTIMISER_FILES))
Metrics = dict[str, Any]
"""JSON values by name; a function of configuration, data and seed only (no times)."""

StageFunction = Callable[[Any, RunSettings, "StageDirectory"], Metrics]
"""`run_stage(config, settings, directory) -> metrics`. References in `config` and the path of
`settings.base_model` are absolute paths (or the base model's hub id)."""


class EventLog:
    """Appends what happens, with the time, to `events.jsonl`.

    Times, memory and rates belong here; `metrics.jsonl` holds only what is the same in every run.
    """

    def __init__(self, path: Path, **context: Any) -> None:
        """Append to `path`; `context` (for example the stage's name) is added to every line."""
        self.path = path
        self._context = context

    def within(self, **context: Any) -> EventLog:
        """The same log with more context on every line."""
        return EventLog(self.path, **{**self._context, **context})

    def write(self, event: str, **fields: Any) -> None:
        """Append one line: the time (UTC), the event's name, the context and `fields` (JSON values).

        Of several processes only the first writes.
        """
        if not is_main_process():
            return
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": now, "event": event, **self._context, **fields}, ensure_ascii=False)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # A killed run may have left half a line; a newline first keeps this one whole.
        start = "" if self._ends_in_whole_line() else "\n"
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(f"{start}{line}\n")

    def _ends_in_whole_line(self) -> bool:
        if not self.path.exists() or self.path.stat().st_size == 0:
            return True
        with self.path.open("rb") as stream:
            stream.seek(-1, 2)
            return stream.read(1) == b"\n"


@dataclass(frozen=True)
class StageDirectory:
    """Where one stage writes; the names are the same for every kind."""

    path: Path
    events: EventLog

    @property
    def config_file(self) -> Path:
        """The stage's own configuration, written by the pipeline before the stage starts."""
        return self.path / "config.yaml"

    @property
    def metrics_file(self) -> Path:
        """One line per logged step; only what is a function of configuration, data and seed."""
        return self.path / "metrics.jsonl"

    @property
    def model(self) -> Path:
        """The resulting model, a Hugging Face folder."""
        return self.path / "model"

    @property
    def adapter(self) -> Path:
        """The adapter of a stage that trained one; `model` holds it merged."""
        return self.path / "adapter"

    def adapter_alone(self, lora: LoraConfig | None) -> Path | None:
        """The adapter that goes into `model` in place of all weights; None where these do."""
        return self.adapter if lora is not None and lora.save == "adapter_only" else None

    @property
    def dataset(self) -> Path:
        """The dialogues that a data maker selected, or the pairs that it collected."""
        return self.path / "dataset.jsonl"

    @property
    def held_out(self) -> Path:
        """What a policy in training was found to be worth on held-out prompts, a line an evaluation."""
        return self.path / "held_out.jsonl"

    @property
    def samples(self) -> Path:
        """Everything that a data maker sampled, with scores; of PPO, what its evaluations did."""
        return self.path / "samples.jsonl"

    @property
    def asked(self) -> Path:
        """Lists of what to instruct, as a policy was asked for them, and what is left of its answers."""
        return self.path / "asked.jsonl"

    @property
    def instructions(self) -> Path:
        """The instructions put together from lists, as an instructions file."""
        return self.path / "instructions.jsonl"

    @property
    def temperature_samples(self) -> Path:
        """What a search for a sampling temperature sampled, with scores."""
        return self.path / "temperature_samples.jsonl"

    @property
    def temperature(self) -> Path:
        """What that search found."""
        return self.path / "temperature.json"

    @property
    def pool(self) -> Path:
        """Samples of this and of earlier iterations, scored by the same reward models."""
        return self.path / "pool.jsonl"

    @property
    def best_of(self) -> Path:
        """What the best of n samples is worth."""
        return self.path / "best_of.json"

    @property
    def answers(self) -> Path:
        """Held-out questions and a policy's answers to them in the course of its training."""
        return self.path / "answers.jsonl"

    @property
    def checkpoints(self) -> Path:
        """What an interrupted stage continues from: the last two, weights alone once it is done."""
        return self.path / "checkpoints"

    @property
    def tracking(self) -> Path:
        """Where a tracker that writes files puts them."""
        return self.path / "tracking"

    def warn(self, message: str) -> None:
        """Say what the user should know of and need not act on: a line on standard error and an event."""
        if is_main_process():
            print(f"{self.path.name}: {message}", file=sys.stderr, flush=True)
        self.events.write("warning", message=message)

    def drop_progress(self) -> None:
        """Remove from the checkpoints what only a stage that goes on needs; their weights stay."""
        for pattern in _PROGRESS:
            for path in self.checkpoints.glob(pattern):
                remove(path)

    @property
    def started_file(self) -> Path:
        """Written by the pipeline first: the fingerprint that everything else here belongs to."""
        return self.path / "started.json"

    @property
    def done_file(self) -> Path:
        """Written by the pipeline last: fingerprint, metrics, time taken."""
        return self.path / "done.json"


@dataclass(frozen=True)
class MadeData:
    """Rows that a stage leaves, beside its model if it makes one, for later stages to read."""

    file: str
    rows: RowKind


_DATA_MAKER = {"": MadeData("dataset.jsonl", "dialogues"), "samples": MadeData("samples.jsonl", "samples")}


@dataclass(frozen=True)
class StageKind:
    """One kind of stage: where its configuration class and its function are, and what it leaves."""

    name: str
    config_class: str
    run_function: str
    produces: Literal["policy", "reward_model"] | None = "policy"
    """None makes data alone."""
    makes: Mapping[str, MadeData] = field(default_factory=dict)
    """By part: recipes name the part "" by the stage's name alone, "samples" as `STAGE.samples`."""
    makes_base: bool = False
    """Starts from no model; a recipe's `base_model` may name such a stage."""
    many_processes: bool = False
    """Several processes may share the work (`distributed.py`)."""

    def data_names(self, stage: str) -> dict[str, MadeData]:
        """What recipes call the data that a stage of this kind and this name makes."""
        return {f"{stage}.{part}" if part else stage: made for part, made in self.makes.items()}

    def load_config_class(self) -> type[StrictModel]:
        """The pydantic class of the stage's mapping (imports no training code)."""
        return _load(self.config_class)  # type: ignore[no-any-return]

    def load_run_function(self) -> StageFunction:
        """The function that runs the stage; this is where torch gets imported."""
        return _load(self.run_function)  # type: ignore[no-any-return]


STAGE_KINDS: dict[str, StageKind] = {
    kind.name: kind
    for kind in (
        StageKind(
            "pretrain",
            "llama2_chat.pretrain.config:PretrainConfig",
            "llama2_chat.pretrain.train:run_stage",
            makes_base=True,
            many_processes=True,
        ),
        StageKind(
            "sft", "llama2_chat.sft.config:SftConfig", "llama2_chat.sft.train:run_stage", many_processes=True
        ),
        StageKind(
            "reward",
            "llama2_chat.reward.config:RewardConfig",
            "llama2_chat.reward.train:run_stage",
            produces="reward_model",
        ),
        StageKind(
            "preferences",
            "llama2_chat.preferences.config:PreferencesConfig",
            "llama2_chat.preferences.build:run_stage",
            produces=None,
            makes={
                "": MadeData("dataset.jsonl", "preferences"),
                "held_out": MadeData("held_out.jsonl", "preferences"),
                "samples": MadeData("samples.jsonl", "samples"),
            },
        ),
        StageKind(
            "rejection_sampling",
            "llama2_chat.rejection_sampling.config:RejectionSamplingConfig",
            "llama2_chat.rejection_sampling.build:run_stage",
            makes=_DATA_MAKER,
        ),
        StageKind(
            "ppo", "llama2_chat.ppo.config:PpoConfig", "llama2_chat.ppo.train:run_stage", many_processes=True
        ),
        StageKind(
            "ghost_attention",
            "llama2_chat.ghost_attention.config:GhostAttentionConfig",
            "llama2_chat.ghost_attention.build:run_stage",
            makes=_DATA_MAKER,
        ),
        StageKind(
            "context_distillation",
            "llama2_chat.safety.config:ContextDistillationConfig",
            "llama2_chat.safety.build:run_stage",
            makes=_DATA_MAKER,
        ),
    )
}
"""Every kind of stage by the name that recipes give it."""


def stage_kind(name: str) -> StageKind:
    """The kind of that name; `UserInputError` with the known ones otherwise."""
    if name not in STAGE_KINDS:
        raise UserInputError(
            f'kind "{name}" unknown{did_you_mean(name, STAGE_KINDS)}; one of {", ".join(STAGE_KINDS)}'
        )
    return STAGE_KINDS[name]


def _load(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)
