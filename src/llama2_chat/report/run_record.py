"""Reading a run directory for its report: whatever is there, finished or not, and what could not be read.

A killed run may leave half a line, a stage without results, an evaluation of some policies. None of it is
an error here; what is missing is said in the report. Nothing of torch or of a stage's code is needed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from llama2_chat.errors import UserInputError
from llama2_chat.pipeline.references import references_in_mapping
from llama2_chat.pipeline.run_directory import FORMAT_VERSION, RunDirectory
from llama2_chat.pipeline.yaml_files import parse
from llama2_chat.stage import STAGE_KINDS

Row = dict[str, Any]

_SAMPLES_OF = ("ppo", "context_distillation")
"""Kinds whose own samples the report shows."""


@dataclass(frozen=True)
class StageInput:
    """One reference of a stage: the configuration field, what it names, and whether that is data."""

    field: str
    name: str
    is_data: bool
    is_reward_model: bool = False


@dataclass(frozen=True)
class StageRecord:
    """One stage as the recipe has it and as far as it came."""

    name: str
    kind: str
    number: int
    config: Mapping[str, Any]
    inputs: tuple[StageInput, ...]
    metrics: Mapping[str, Any]
    """As in `summary.json`, without kind and time; empty while the stage is not done."""
    seconds: float | None
    """None while the stage is not done."""
    series: list[Row]
    """Rows of `metrics.jsonl`, in order."""
    evaluations: list[Row] = field(default_factory=list)
    """Rows of `held_out.jsonl` of a PPO stage, in order."""
    samples: list[Row] = field(default_factory=list)
    """What the evaluations of a PPO stage sampled; what a context-distillation stage sampled."""

    @property
    def done(self) -> bool:
        """Whether the stage has ended."""
        return self.seconds is not None

    @property
    def makes_reward_model(self) -> bool:
        """Whether a reward model comes out."""
        return self.kind in STAGE_KINDS and STAGE_KINDS[self.kind].produces == "reward_model"

    @property
    def makes_policy(self) -> bool:
        """Whether a policy comes out, as from most kinds and from one that this version does not know."""
        return self.kind not in STAGE_KINDS or STAGE_KINDS[self.kind].produces == "policy"


@dataclass(frozen=True)
class RunRecord:
    """Everything that the report shows of one run."""

    path: Path
    recipe: Mapping[str, Any]
    summary: Mapping[str, Any]
    environment: Mapping[str, Any]
    events: list[Row]
    stages: list[StageRecord]
    evaluation: Mapping[str, Mapping[str, Any]]
    samples: Mapping[str, list[Row]]
    """Judged answers by policy."""
    data: Mapping[str, Mapping[str, Any]]
    """`data/NAME.json` of each prepared data entry."""
    missing: list[str] = field(default_factory=list)
    """What an unfinished or damaged run lacks, as sentences."""

    @property
    def name(self) -> str:
        """The recipe's name."""
        return str(self.recipe.get("name") or self.summary.get("recipe") or self.path.name)

    @property
    def seed(self) -> Any:
        """The recipe's seed."""
        return self.recipe.get("seed", self.summary.get("seed"))

    def stage(self, name: str) -> StageRecord | None:
        """The stage of that name."""
        return next((stage for stage in self.stages if stage.name == name), None)


def read_run(path: Path) -> RunRecord:
    """Read a run directory.

    Raises:
        UserInputError: it is not one, holds a sweep, or was made with another version of the format.
    """
    _check(path)
    missing: list[str] = []
    recipe = _recipe(path / "recipe.yaml", missing)
    summary = _json(path / "summary.json", missing) or {}
    environment = _json(path / "environment.json", missing) or {}
    version = environment.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise UserInputError(
            f"{path}: made with run directory format {version}, this version reads {FORMAT_VERSION}"
        )
    stages = _stages(path, recipe, summary, missing)
    undone = [stage.name for stage in stages if not stage.done]
    if undone:
        missing.append(f"Not done: {', '.join(undone)}.")
    evaluation = _evaluation(path, recipe, summary, missing)
    return RunRecord(
        path=path,
        recipe=recipe,
        summary=summary,
        environment=environment,
        events=_rows(path / "events.jsonl", missing),
        stages=stages,
        evaluation=evaluation,
        samples={name: _rows(path / "evaluation" / f"{name}.samples.jsonl", missing) for name in evaluation},
        data={
            file.stem: record
            for file in sorted(path.glob("data/*.json"))
            if (record := _json(file, missing)) is not None
        },
        missing=missing,
    )


def _check(path: Path) -> None:
    if not path.is_dir():
        raise UserInputError(f"{path}: no such run directory")
    if not (path / "recipe.yaml").is_file():
        runs = sorted(file.parent for file in path.glob("sweep/*/recipe.yaml"))
        if runs:
            raise UserInputError(
                f"{path}: holds a sweep; name one of its runs: {', '.join(str(run) for run in runs)}"
            )
        raise UserInputError(f"{path}: not a run directory (no recipe.yaml in it)")


def _recipe(file: Path, missing: list[str]) -> dict[str, Any]:
    """The resolved recipe as a mapping. It is not validated: a report needs no file that the recipe names."""
    try:
        value = parse(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserInputError(f"{file}: not valid YAML: {error}") from error
    if not isinstance(value, dict):
        raise UserInputError(f"{file}: a mapping is wanted, found {type(value).__name__}")
    return value


def _stages(
    path: Path, recipe: Mapping[str, Any], summary: Mapping[str, Any], missing: list[str]
) -> list[StageRecord]:
    stages = []
    configs = _mapping(recipe.get("stages"))
    run = RunDirectory(path, [str(name) for name in configs])
    for number, (name, config) in enumerate(configs.items(), start=1):
        config, folder = _mapping(config), run.stage(str(name)).path
        record = _mapping(_mapping(summary.get("stages")).get(name))
        done = _json(folder / "done.json", missing) if not record else None
        if done is not None:
            record = {"wall_seconds": done.get("wall_seconds"), **_mapping(done.get("metrics"))}
        kind = str(config.get("kind", record.get("kind", "")))
        stages.append(
            StageRecord(
                name=str(name),
                kind=kind,
                number=number,
                config=config,
                inputs=_inputs(kind, config),
                metrics={key: value for key, value in record.items() if key not in ("kind", "wall_seconds")},
                seconds=record.get("wall_seconds"),
                series=_rows(folder / "metrics.jsonl", missing),
                evaluations=_rows(folder / "held_out.jsonl", missing) if kind == "ppo" else [],
                samples=_rows(folder / "samples.jsonl", missing) if kind in _SAMPLES_OF else [],
            )
        )
    return stages


def _inputs(kind: str, config: Mapping[str, Any]) -> tuple[StageInput, ...]:
    if kind not in STAGE_KINDS:
        return ()
    found = references_in_mapping(STAGE_KINDS[kind].load_config_class(), config)
    return tuple(
        StageInput(
            referring.field, name, referring.kind == "data", is_reward_model=referring.kind == "reward_model"
        )
        for referring in found
        for name in referring.names
    )


def _evaluation(
    path: Path, recipe: Mapping[str, Any], summary: Mapping[str, Any], missing: list[str]
) -> dict[str, Mapping[str, Any]]:
    """By policy, base first, then in the stages' order."""
    evaluation: dict[str, Mapping[str, Any]] = dict(_mapping(summary.get("evaluation")))
    if not evaluation and recipe.get("evaluation"):
        for name in ("base", *_mapping(recipe.get("stages"))):
            stored = _json(path / "evaluation" / f"{name}.json", missing)
            if stored is not None and isinstance(stored.get("metrics"), dict):
                evaluation[name] = stored["metrics"]
        missing.append(
            "The evaluation is not finished; what is shown was measured before the run stopped."
            if evaluation
            else "The evaluation has not run yet."
        )
    return evaluation


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _json(file: Path, missing: list[str]) -> dict[str, Any] | None:
    if not file.exists():
        if file.name in ("summary.json", "environment.json"):
            missing.append(f"{file.name} is not there.")
        return None
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        missing.append(f"{file.name} cannot be read.")
        return None
    return value


def _rows(file: Path, missing: list[str]) -> list[Row]:
    """The objects of a JSONL file; lines that are none (half a line at a kill) are counted and left out."""
    rows, bad = [], 0
    for line in file.read_bytes().splitlines() if file.exists() else ():
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            bad += 1
    if bad:
        place = f"{file.parent.name}/{file.name}" if file.parent.name != "evaluation" else file.name
        lines = "1 line" if bad == 1 else f"{bad} lines"
        missing.append(f"{place}: {lines} could not be read and {'is' if bad == 1 else 'are'} left out.")
    return rows
