"""One stage's standalone configuration: its own mapping plus the recipe-level keys, with paths for references.

The pipeline writes this file for every stage and runs it from there; `llama2-chat sft CONFIG` reads the same.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama2_chat.errors import RecipeError
from llama2_chat.files import write_text
from llama2_chat.pipeline.problems import validated
from llama2_chat.pipeline.recipe import RecipeHead
from llama2_chat.pipeline.reference_checks import base_problems
from llama2_chat.pipeline.references import Referring, references, resolve
from llama2_chat.pipeline.yaml_files import apply_overrides, dump, read_mapping
from llama2_chat.settings import RunSettings, StrictModel
from llama2_chat.stage import stage_kind

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
    mapping = settings.model_dump(mode="json") | resolved.model_dump(mode="json")
    mapping["base_model"]["path"] = written(paths["model:base"])
    write_text(file, dump(mapping))


def write_resolved_config(file: Path, config: StrictModel, settings: RunSettings) -> None:
    """Write the standalone configuration of a stage whose references are paths, which become relative to it."""

    def relative(path: str) -> str:
        return os.path.relpath(path, file.parent) if Path(path).is_absolute() else path

    resolved = resolve(config, lambda _, path: relative(path))
    mapping = settings.model_dump(mode="json") | resolved.model_dump(mode="json")
    mapping["base_model"]["path"] = relative(settings.base_model.path)
    write_text(file, dump(mapping))


def load_stage_config(
    file: Path, kind: str, overrides: Sequence[str] = ()
) -> tuple[StrictModel, RunSettings]:
    """Read a standalone configuration; references and the base model come back as absolute paths.

    Raises:
        RecipeError: with everything that is wrong.
    """
    mapping = apply_overrides(read_mapping(file), overrides)
    problems: list[str] = []
    stage = stage_kind(kind)
    if mapping.get("kind", kind) != kind:
        problems.append(f'kind: this command runs "{kind}", the file says {mapping.pop("kind")!r}')
    if stage.makes_base:
        mapping["base_model"] = _OWN_MODEL
    names = sorted(RunSettings.model_fields)
    settings = _settings({k: v for k, v in mapping.items() if k in names}, problems)
    rest = {k: v for k, v in mapping.items() if k not in names}
    config = validated(stage.load_config_class(), rest, "", problems, elsewhere=names)
    folder = file.parent.resolve()
    if not stage.makes_base:
        problems += base_problems(mapping, folder)
    if config is not None:
        problems += _missing(config, folder)
    if problems or config is None or settings is None:
        raise RecipeError(file, problems)
    base = _absolute(settings.base_model.path, folder)
    source = settings.base_model.model_copy(update={"path": base})
    settings = settings.model_copy(update={"base_model": source})

    def path_of(referring: Referring, name: str) -> str:
        return base if name == "base" and referring.kind == "policy" else _absolute(name, folder)

    return resolve(config, path_of), settings


def _settings(mapping: dict[str, Any], problems: list[str]) -> RunSettings | None:
    head = validated(RecipeHead, {"name": "stage", **mapping}, "", problems)
    if head is None:
        return None
    return RunSettings(**{name: getattr(head, name) for name in RunSettings.model_fields})


def _missing(config: StrictModel, folder: Path) -> list[str]:
    """References whose file or folder is not there."""
    problems = []
    for referring in references(config):
        for name in referring.names:
            if referring.kind == "policy" and name == "base":
                continue
            path = folder / name
            if referring.kind == "data" and not path.is_file():
                problems.append(f"{referring.field}: no such file: {path}")
            if referring.kind != "data" and not path.is_dir():
                problems.append(f"{referring.field}: no such model folder: {path}")
    return problems


def _absolute(path: str, folder: Path) -> str:
    """A path relative to the configuration's folder; what is not there is left alone (it may be a hub id)."""
    local = folder / path
    return os.path.normpath(local) if local.exists() else path
