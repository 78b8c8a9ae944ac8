"""The recipe: one YAML file that names a base model, data and an ordered graph of stages.

Everything wrong with a recipe is reported at once.
"""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError, field_validator

from llama2_chat.errors import MissingFileError, RecipeError, did_you_mean
from llama2_chat.evaluation.config import EvaluationConfig
from llama2_chat.pipeline.problems import validation_problems
from llama2_chat.pipeline.references import Referring, references_in_mapping
from llama2_chat.pipeline.yaml_files import apply_overrides, read_mapping
from llama2_chat.settings import RunSettings, StrictModel
from llama2_chat.stage import STAGE_KINDS


class FileData(StrictModel):
    """A JSONL file of the toolkit's own formats."""

    path: str


class ImportedData(StrictModel):
    """A file of another format, imported when the run needs it."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    format: Literal["hh-rlhf"] = Field(alias="import")
    path: str
    kind: Literal["dialogues", "preferences", "prompts"]
    domain: Literal["helpfulness", "safety"] | None = None
    offset: int = Field(0, ge=0, description="Skip this many usable rows, for example those of another entry")
    limit: int | None = Field(None, ge=1, description="Take at most this many usable rows")


class GeneratedData(StrictModel):
    """Rows that the testbed generates from the recipe's seed."""

    testbed: str = Field(description="Name of a generator")
    rows: int = Field(ge=1)
    split: Literal["train", "held_out"] = "train"
    options: dict[str, Any] = Field(default_factory=dict)

    @field_validator("testbed")
    @classmethod
    def _generator_known(cls, name: str) -> str:
        from llama2_chat.testbed.generators import GENERATORS

        if name not in GENERATORS:
            raise ValueError(
                f'generator "{name}" unknown{did_you_mean(name, GENERATORS)}; one of {", ".join(GENERATORS)}'
            )
        return name


DataEntry = FileData | ImportedData | GeneratedData


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


@dataclass(frozen=True)
class Recipe:
    """A validated recipe; `folder` is what its relative paths start from."""

    head: RecipeHead
    data: dict[str, DataEntry]
    stages: dict[str, StrictModel]
    evaluation: EvaluationConfig | None
    folder: Path
    source: str

    @property
    def settings(self) -> RunSettings:
        """The keys that every stage gets."""
        return RunSettings(**{name: getattr(self.head, name) for name in RunSettings.model_fields})

    def to_mapping(self) -> dict[str, Any]:
        """The resolved recipe, every default written out."""
        return {
            **self.head.model_dump(mode="json"),
            "data": {name: entry.model_dump(mode="json", by_alias=True) for name, entry in self.data.items()},
            "stages": {name: stage.model_dump(mode="json") for name, stage in self.stages.items()},
            "evaluation": None if self.evaluation is None else self.evaluation.model_dump(mode="json"),
        }


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
    """
    file = find_recipe(recipe)
    mapping = apply_overrides(read_mapping(file), overrides)
    return validate_recipe(mapping, folder=file.parent.resolve(), source=str(file))


def validate_recipe(mapping: Mapping[str, Any], *, folder: Path, source: str) -> Recipe:
    """Check a recipe's mapping; see `load_recipe`."""
    problems: list[str] = []
    sections = {"data", "stages", "evaluation"}
    head = _validated(
        RecipeHead, {k: v for k, v in mapping.items() if k not in sections}, "", problems, sections
    )
    data = _data(mapping.get("data") or {}, folder, problems)
    stages = _stages(mapping.get("stages"), problems)
    evaluation = None
    if mapping.get("evaluation") is not None:
        evaluation = _validated(EvaluationConfig, mapping["evaluation"], "evaluation", problems)
    problems += _all_reference_problems(mapping)
    problems += base_problems(mapping.get("base_model"), folder)
    if problems:
        raise RecipeError(source, problems)
    assert isinstance(head, RecipeHead)
    assert evaluation is None or isinstance(evaluation, EvaluationConfig)
    return Recipe(head, data, stages, evaluation, folder, source)


def _validated(
    model: type[StrictModel], value: Any, key: str, problems: list[str], elsewhere: set[str] | None = None
) -> StrictModel | None:
    if not isinstance(value, Mapping):
        problems.append(f"{key}: a mapping is wanted, found {value!r}")
        return None
    try:
        return model.model_validate(dict(value))
    except ValidationError as error:
        found = validation_problems(error, model, key)
        if elsewhere:
            allowed = ", ".join(sorted(elsewhere))
            found = [f"{text}, {allowed}" if ": unknown key" in text else text for text in found]
        problems += found
        return None


def _data(value: Any, folder: Path, problems: list[str]) -> dict[str, DataEntry]:
    if not isinstance(value, Mapping):
        problems.append(f"data: a mapping of names to entries is wanted, found {value!r}")
        return {}
    entries: dict[str, DataEntry] = {}
    for name, entry in value.items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
            problems.append(f"data.{name}: a data entry's name is letters, digits, -, _ and dots inside")
        mapping = {"path": entry} if isinstance(entry, str) else entry
        if not isinstance(mapping, Mapping):
            problems.append(f"data.{name}: a path or a mapping is wanted, found {entry!r}")
            continue
        model: type[StrictModel] = (
            GeneratedData if "testbed" in mapping else ImportedData if "import" in mapping else FileData
        )
        made = _validated(model, mapping, f"data.{name}", problems)
        if isinstance(made, FileData | ImportedData) and not (folder / made.path).is_file():
            problems.append(f"data.{name}.path: no such file: {folder / made.path}")
        if made is not None:
            entries[str(name)] = made  # type: ignore[assignment]
    return entries


def _stages(value: Any, problems: list[str]) -> dict[str, StrictModel]:
    if not isinstance(value, Mapping) or not value:
        problems.append("stages: a mapping of names to stages is wanted, with at least one")
        return {}
    stages = {}
    for name, mapping in value.items():
        key = f"stages.{name}"
        kind = _kind_of(mapping)
        if name == "base" or not isinstance(name, str) or not name.replace("-", "_").isidentifier():
            problems.append(f"{key}: a stage's name is letters, digits, - and _, and not `base`")
        elif not isinstance(mapping, Mapping):
            problems.append(f"{key}: a mapping is wanted, found {mapping!r}")
        elif "kind" not in mapping:
            others = [str(other) for other in value if other != name]
            hint = did_you_mean(name, others)
            problems.append(f"{key}.kind: required, but missing{hint}; one of {', '.join(STAGE_KINDS)}")
        elif kind is None:
            given = str(mapping.get("kind"))
            hint = did_you_mean(given, STAGE_KINDS)
            problems.append(f'{key}.kind: "{given}" unknown{hint}; one of {", ".join(STAGE_KINDS)}')
        else:
            made = _validated(STAGE_KINDS[kind].load_config_class(), mapping, key, problems)
            if made is not None:
                stages[name] = made
    return stages


def _all_reference_problems(mapping: Mapping[str, Any]) -> list[str]:
    """References of every stage of a known kind (though other keys of it may be wrong) and the evaluation."""
    problems = []
    written = mapping.get("stages")
    stages = written if isinstance(written, Mapping) else {}
    data = mapping.get("data")
    data_names = [str(name) for name in data] if isinstance(data, Mapping) else []
    stage_names = [str(name) for name in stages]
    kinds = {str(name): kind for name, stage in stages.items() if (kind := _kind_of(stage)) is not None}
    for name, stage in stages.items():
        if (kind := _kind_of(stage)) is not None:
            found = references_in_mapping(STAGE_KINDS[kind].load_config_class(), stage)
            problems += _reference_problems(
                found, f"stages.{name}", data_names, stage_names, kinds, before=str(name)
            )
    evaluation = mapping.get("evaluation")
    if isinstance(evaluation, Mapping):
        found = references_in_mapping(EvaluationConfig, evaluation)
        problems += _reference_problems(found, "evaluation", data_names, stage_names, kinds, before=None)
    return problems


def _kind_of(stage: Any) -> str | None:
    """The kind in a stage's mapping, if it is a known one."""
    kind = stage.get("kind") if isinstance(stage, Mapping) else None
    return kind if isinstance(kind, str) and kind in STAGE_KINDS else None


def _reference_problems(
    found: Iterable[Referring],
    key: str,
    data: Sequence[str],
    stages: Sequence[str],
    kinds: Mapping[str, str],
    *,
    before: str | None,
) -> list[str]:
    """References to what is missing, comes later or is of the wrong sort."""
    problems = []
    earlier = list(stages) if before is None else list(stages)[: list(stages).index(before)]
    for referring in found:
        place = f"{key}.{referring.field}"
        for name in referring.names:
            if referring.kind == "data":
                if name not in data:
                    problems.append(
                        f'{place}: no data entry "{name}"{did_you_mean(name, data)}; there are {", ".join(data)}'
                    )
                continue
            fitting = [s for s in earlier if kinds.get(s) is None or _produces(kinds[s]) == referring.kind]
            known = [*(["base"] if referring.kind == "policy" else []), *fitting]
            if name in known:
                continue
            wanted = "reward model" if referring.kind == "reward_model" else "policy"
            why = (
                "comes later" if name in stages and name not in earlier
                else f"is not a {wanted}" if name in earlier or name == "base"
                else "is no stage"
            )  # fmt: skip
            allowed = ", ".join(known) or "none"
            problems.append(f'{place}: "{name}" {why}{did_you_mean(name, known)}; allowed here: {allowed}')
    return problems


def _produces(kind: str) -> str:
    return STAGE_KINDS[kind].produces


def base_problems(base: Any, folder: Path) -> list[str]:
    """A local base model must be there; `owner/name` may be a hub id. What is no text is reported elsewhere."""
    source = {"path": base} if isinstance(base, str) else base if isinstance(base, Mapping) else {}
    path, file = source.get("path"), source.get("gguf_file")
    if not isinstance(path, str):
        return []
    local = folder / path
    if local.is_dir():
        if isinstance(file, str) and not (local / file).is_file():
            return [f"base_model.gguf_file: no such file: {local / file}"]
        return []
    looks_like_hub = path.count("/") == 1 and not path.startswith((".", "/", "~"))
    return [] if looks_like_hub else [f"base_model.path: no such folder: {local}"]
