"""One stage's standalone configuration: its own mapping plus the recipe-level keys, with paths for references.

The pipeline writes this file for every stage and runs it from there; `llama2-chat sft CONFIG` reads the same.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama2_chat.errors import RecipeError, did_you_mean
from llama2_chat.files import write_text
from llama2_chat.pipeline.custom_rewards import anchored, custom_reward_problems
from llama2_chat.pipeline.data import prepare_data
from llama2_chat.pipeline.data_entries import DataEntry, FileData, validated_entries
from llama2_chat.pipeline.problems import validated
from llama2_chat.pipeline.recipe import RecipeHead
from llama2_chat.pipeline.reference_checks import base_problems, model_problems
from llama2_chat.pipeline.references import Referring, references, resolve
from llama2_chat.pipeline.sampling_backends import sampling_problems
from llama2_chat.pipeline.yaml_files import apply_overrides, dump, read_mapping
from llama2_chat.settings import RunSettings, StrictModel
from llama2_chat.stage import StageDirectory, stage_kind

_OWN_MODEL = "model"
"""What `base_model` says in the configuration of a stage that makes the base: its own result."""


def write_stage_config(
    file: Path, config: StrictModel, settings: RunSettings, *, inside: Path, paths: Mapping[str, str]
) -> None:
    """Write the standalone configuration of a stage whose references are names.

    Args:
        inside: Paths under this folder are written relative to the file, so that the folder can be moved.
        paths: Absolute path of each model or data name (`model:sft`, `data:prompts`).
    """

    def written(path: str) -> str:
        return os.path.relpath(path, file.parent) if Path(path).is_relative_to(inside) else path

    def path_of(referring: Referring, name: str) -> str:
        return written(paths[f"{'data' if referring.kind == 'data' else 'model'}:{name}"])

    resolved = resolve(config, path_of)
    named = {name: written(paths[f"model:{name}"]) for name in settings.models}
    _write(file, settings.with_paths(written(paths["model:base"]), named), resolved)


def write_resolved_config(file: Path, config: StrictModel, settings: RunSettings) -> None:
    """Write the standalone configuration of a stage whose references are paths, which become relative to it."""

    def relative(path: str) -> str:
        return os.path.relpath(path, file.parent) if Path(path).is_absolute() else path

    resolved = resolve(config, lambda _, path: relative(path))
    named = {name: relative(source.path) for name, source in settings.models.items()}
    _write(file, settings.with_paths(relative(settings.base_model.path), named), resolved)


def _write(file: Path, settings: RunSettings, config: StrictModel) -> None:
    write_text(file, dump(settings.model_dump(mode="json") | config.model_dump(mode="json")))


def load_stage_config(
    file: Path, kind: str, overrides: Sequence[str] = (), *, made_data: Path | None = None
) -> tuple[StrictModel, RunSettings]:
    """Read a standalone configuration; references and the base model come back as absolute paths.

    Its `data`, if it has one, holds entries as a recipe's does, and references may name them.

    Args:
        made_data: Folder where `prepare_stage_data` puts imported and generated rows; default `data` beside the file.

    Raises:
        RecipeError: with everything that is wrong.
    """
    mapping = apply_overrides(read_mapping(file), overrides)
    folder = file.parent.resolve()
    problems: list[str] = []
    entries = validated_entries(mapping.pop("data", None) or {}, folder, problems)
    stage = stage_kind(kind)
    if mapping.get("kind", kind) != kind:
        problems.append(f'kind: this command runs "{kind}", the file says {mapping.pop("kind")!r}')
    if stage.makes_base:
        mapping["base_model"] = _OWN_MODEL
    names = sorted(RunSettings.model_fields)
    settings = _settings({k: v for k, v in mapping.items() if k in names}, problems)
    rest = {k: v for k, v in mapping.items() if k not in names}
    config = validated(stage.load_config_class(), rest, "", problems, elsewhere=["data", *names])
    if not stage.makes_base:
        problems += base_problems(mapping, folder)
    problems += model_problems(mapping, folder)
    if config is not None:
        config = anchored(config, folder)
        models = [] if settings is None else list(settings.models)
        problems += _missing(config, folder, entries, models)
        problems += [*custom_reward_problems(config, ""), *sampling_problems(config, "")]
    if problems or config is None or settings is None:
        raise RecipeError(file, problems)
    named = {name: _absolute(source.path, folder) for name, source in settings.models.items()}
    base = _absolute(settings.base_model.path, folder)
    settings = settings.with_paths(base, named)
    made = (folder / "data" if made_data is None else made_data).resolve()

    def path_of(referring: Referring, name: str) -> str:
        entry = entries.get(name) if referring.kind == "data" else None
        if isinstance(entry, FileData):
            return _absolute(entry.path, folder)
        if entry is not None:
            return str(made / f"{name}.jsonl")
        if referring.kind == "policy" and name == "base":
            return base
        known = named.get(name) if referring.kind != "data" else None
        return known or _absolute(name, folder)

    return resolve(config, path_of), settings


@dataclass(frozen=True)
class StageData:
    """The data entries of a standalone configuration."""

    data: Mapping[str, DataEntry]
    folder: Path
    settings: RunSettings


def prepare_stage_data(
    file: Path,
    overrides: Sequence[str],
    config: StrictModel,
    settings: RunSettings,
    directory: StageDirectory,
) -> None:
    """Make the imported and generated rows that `config`, as `load_stage_config` returned it, refers to.

    Raises:
        UserInputError: an import leaves no row, or a file to import is not of its format.
    """
    folder = file.parent.resolve()
    mapping = apply_overrides(read_mapping(file), overrides)
    entries = validated_entries(mapping.get("data") or {}, folder, [])
    source = StageData(entries, folder, settings)
    wanted = {
        path for referring in references(config) if referring.kind == "data" for path in referring.names
    }
    for name in entries:
        if str(directory.path / "data" / f"{name}.jsonl") in wanted:
            prepare_data(source, name, directory.path, directory.events)


def _settings(mapping: dict[str, Any], problems: list[str]) -> RunSettings | None:
    head = validated(RecipeHead, {"name": "stage", **mapping}, "", problems)
    if head is None:
        return None
    return RunSettings(**{name: getattr(head, name) for name in RunSettings.model_fields})


def _missing(
    config: StrictModel, folder: Path, entries: Mapping[str, DataEntry], models: Sequence[str]
) -> list[str]:
    """References whose file or folder is not there; a name of `entries` is no file yet."""
    problems = []
    for referring in references(config):
        for name in referring.names:
            there = {"policy": ("base", *models), "reward_model": models, "data": entries}
            if name in there[referring.kind]:
                continue
            path = folder / name
            if referring.kind == "data" and not path.is_file():
                problems.append(f"{referring.field}: no such file: {path}{did_you_mean(name, entries)}")
            if referring.kind != "data" and not path.is_dir():
                problems.append(
                    f"{referring.field}: no such model folder: {path}{did_you_mean(name, models)}"
                )
    return problems


def _absolute(path: str, folder: Path) -> str:
    """A path relative to the configuration's folder; what is not there is left alone (it may be a hub id)."""
    local = folder / path
    return os.path.normpath(local) if local.exists() else path
