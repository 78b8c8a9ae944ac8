"""The recipe: one YAML file that names a base model, data and an ordered graph of stages.

Everything wrong with a recipe is reported at once.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from llama2_chat.errors import MissingFileError, RecipeError, did_you_mean
from llama2_chat.evaluation.config import EvaluationConfig
from llama2_chat.pipeline.custom_rewards import anchored, custom_reward_problems
from llama2_chat.pipeline.data_entries import DataEntry, validated_entries
from llama2_chat.pipeline.iterations import Expansion, expansion
from llama2_chat.pipeline.problems import validated
from llama2_chat.pipeline.reference_checks import (
    base_problems,
    base_stage,
    kind_of,
    model_problems,
    reference_problems,
)
from llama2_chat.pipeline.sampling_backends import sampling_problems
from llama2_chat.pipeline.yaml_files import apply_overrides, read_mapping
from llama2_chat.settings import RunSettings, StrictModel
from llama2_chat.stage import STAGE_KINDS

_SECTIONS = ("data", "stages", "iterations", "evaluation")
_RESERVED_STAGE_NAMES = ("base", "evaluation")


class RecipeHead(RunSettings):
    """The keys of a recipe beside data, stages and evaluation."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Also the default run folder's name"
    )
    sweep: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(
        default_factory=dict, description="Dotted key: values; the recipe runs once for each"
    )

    @field_validator("base_model", mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @field_validator("models", mode="before")
    @classmethod
    def _paths_alone(cls, value: Any) -> Any:
        return {k: cls._path_alone(v) for k, v in value.items()} if isinstance(value, Mapping) else value


@dataclass(frozen=True)
class Recipe:
    """A validated recipe; `folder` is what its relative paths start from."""

    head: RecipeHead
    data: dict[str, DataEntry]
    stages: dict[str, StrictModel]
    evaluation: EvaluationConfig | None
    folder: Path
    source: str
    base_stage: str | None
    """The stage that makes the base model, if `base_model` names one."""

    @property
    def settings(self) -> RunSettings:
        """The keys that every stage gets."""
        return RunSettings(**{name: getattr(self.head, name) for name in RunSettings.model_fields})

    def kind_of(self, stage: str) -> str:
        """The kind of a stage."""
        kind: str = self.stages[stage].kind  # type: ignore[attr-defined]
        return kind

    def to_mapping(self) -> dict[str, Any]:
        """The resolved recipe: every default written out, paths absolute. It gives the same run anywhere."""
        mapping = self.head.model_dump(mode="json")
        mapping["data"] = {
            name: entry.model_dump(mode="json", by_alias=True) for name, entry in self.data.items()
        }
        mapping["stages"] = {name: stage.model_dump(mode="json") for name, stage in self.stages.items()}
        mapping["evaluation"] = None if self.evaluation is None else self.evaluation.model_dump(mode="json")
        for holder in (mapping["base_model"], *mapping["models"].values(), *mapping["data"].values()):
            if holder.get("path") is not None and (self.folder / holder["path"]).exists():
                holder["path"] = str((self.folder / holder["path"]).resolve())
        if self.base_stage is not None:
            mapping["base_model"]["path"] = self.base_stage
        return mapping


def packaged_recipes() -> dict[str, Path]:
    """Recipes that come with the package, by name."""
    root = Path(str(importlib.resources.files("llama2_chat.recipes")))
    return {file.parent.name: file for file in sorted(root.glob("*/recipe.yaml"))}


def find_recipe(recipe: str) -> Path:
    """The file of a recipe given as a path or a packaged name.

    Raises:
        MissingFileError: it is neither.
    """
    file = Path(recipe)
    if file.is_dir() and (file / "recipe.yaml").is_file():
        return file / "recipe.yaml"
    if file.is_file():
        return file
    packaged = packaged_recipes()
    if recipe in packaged:
        return packaged[recipe]
    raise MissingFileError(
        f"{recipe}: neither a file nor a packaged recipe{did_you_mean(recipe, packaged)}; "
        f"packaged are {', '.join(packaged)}"
    )


def load_recipe(recipe: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and validate a recipe.

    Raises:
        RecipeError: with everything that is wrong.
        UserInputError: the file is missing or no YAML mapping.
    """
    file = find_recipe(recipe)
    mapping = apply_overrides(read_mapping(file), overrides)
    return validate_recipe(mapping, folder=file.parent.resolve(), source=str(file))


def validate_recipe(mapping: Mapping[str, Any], *, folder: Path, source: str) -> Recipe:
    """Check a recipe's mapping; see `load_recipe`. Its `iterations` are written out as stages first."""
    problems: list[str] = []
    expanded = _expanded(mapping, folder, problems)
    whole, mapping = not problems, expanded.recipe
    rest = {key: value for key, value in mapping.items() if key not in _SECTIONS}
    head = validated(RecipeHead, rest, "", problems, elsewhere=_SECTIONS)
    data = validated_entries(mapping.get("data") or {}, folder, problems)
    stages = {name: anchored(s, folder) for name, s in _stages(mapping.get("stages"), problems).items()}
    for name, stage in stages.items():
        problems += [
            *custom_reward_problems(stage, f"stages.{name}"),
            *sampling_problems(stage, f"stages.{name}"),
        ]
    evaluation = None
    if mapping.get("evaluation") is not None:
        evaluation = validated(EvaluationConfig, mapping["evaluation"], "evaluation", problems)
        if evaluation is not None:
            evaluation = anchored(evaluation, folder)
            problems += custom_reward_problems(evaluation, "evaluation")
    # The evaluation may name stages that broken iterations did not make.
    problems += [p for p in reference_problems(mapping, folder) if whole or not p.startswith("evaluation.")]
    problems += base_problems(mapping, folder)
    problems += model_problems(mapping, folder)
    if problems or head is None:
        raise RecipeError(source, expanded.located(problems))
    return Recipe(head, data, stages, evaluation, folder, source, base_stage(mapping))


def _expanded(mapping: Mapping[str, Any], folder: Path, problems: list[str]) -> Expansion:
    try:
        return expansion(mapping, folder)
    except RecipeError as error:
        problems += error.problems
        return Expansion({key: value for key, value in mapping.items() if key != "iterations"})


def _stages(value: Any, problems: list[str]) -> dict[str, StrictModel]:
    if not isinstance(value, Mapping) or not value:
        problems.append("stages: a mapping of names to stages is wanted, with at least one")
        return {}
    stages: dict[str, StrictModel] = {}
    for name, mapping in value.items():
        key = f"stages.{name}"
        kind = kind_of(mapping)
        if (
            not isinstance(name, str)
            or not name.replace("-", "_").isidentifier()
            or name in _RESERVED_STAGE_NAMES
        ):
            reserved = " or ".join(f"`{word}`" for word in _RESERVED_STAGE_NAMES)
            problems.append(f"{key}: a stage's name is letters, digits, - and _, and not {reserved}")
        elif not isinstance(mapping, Mapping):
            problems.append(f"{key}: a mapping is wanted, found {mapping!r}")
        elif "kind" not in mapping:
            hint = did_you_mean(name, [str(other) for other in value if other != name])
            problems.append(f"{key}.kind: required, but missing{hint}; one of {', '.join(STAGE_KINDS)}")
        elif kind is None:
            given = str(mapping.get("kind"))
            hint = did_you_mean(given, STAGE_KINDS)
            problems.append(f'{key}.kind: "{given}" unknown{hint}; one of {", ".join(STAGE_KINDS)}')
        else:
            made = validated(STAGE_KINDS[kind].load_config_class(), mapping, key, problems)
            if made is not None:
                stages[name] = made
    return stages
