"""What a configuration names beside models and data: custom rewards (a Python function or a URL) and annotators."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from llama2_chat.callables import callable_problem, source_digest
from llama2_chat.preferences.config import FileAnnotator
from llama2_chat.settings import CallableSource, StrictModel, UrlSource

Config = TypeVar("Config", bound=StrictModel)


def custom_rewards(config: StrictModel) -> Iterator[tuple[str, CallableSource | UrlSource]]:
    """Field and source of every custom reward of a configuration, and of an annotator that is a function."""
    for field in type(config).model_fields:
        value = getattr(config, field)
        if isinstance(value, CallableSource | UrlSource):
            yield field, value


def custom_reward_names(values: Mapping[Any, Any]) -> list[str]:
    """What a stage's mapping, as it is written, names as functions, URLs and files of annotations."""
    sources = [value for value in values.values() if isinstance(value, Mapping)]
    names = [source.get("callable", source.get("url", source.get("file"))) for source in sources]
    return list(dict.fromkeys(name for name in names if isinstance(name, str)))


def anchored(config: Config, folder: Path) -> Config:
    """The same configuration; the folder that modules are looked for in and a file of annotations as absolute paths.

    Args:
        folder: Of the file that the configuration stands in; a function without a `folder` is looked for there.
    """
    update: dict[str, Any] = {
        field: source.model_copy(update={"folder": str((folder / (source.folder or ".")).resolve())})
        for field, source in custom_rewards(config)
        if isinstance(source, CallableSource)
    }
    update |= {
        field: source.model_copy(update={"file": str((folder / source.file).resolve())})
        for field, source in _annotation_files(config)
    }
    return config.model_copy(update=update)


def custom_reward_problems(config: StrictModel, key: str) -> list[str]:
    """Functions that cannot be found; no code of the user's is run for it."""
    prefix = f"{key}." if key else ""
    return [
        f"{prefix}{field}.callable: {problem}"
        for field, source in custom_rewards(config)
        if isinstance(source, CallableSource) and (problem := callable_problem(source)) is not None
    ]


def identities(config: StrictModel) -> dict[str, Any]:
    """What each custom reward is, for the fingerprint: a function's name and its module's contents, or the URL.

    How long a server is waited for changes nothing in what it says, nor does the place of a module. Of a file of
    annotations the name counts: people add to it while the stage waits for them.
    """
    files = {field: {"file": Path(source.file).name} for field, source in _annotation_files(config)}
    return files | {
        field: {"callable": source.callable, "sha256": source_digest(source)}
        if isinstance(source, CallableSource)
        else {"url": source.url}
        for field, source in custom_rewards(config)
    }


def _annotation_files(config: StrictModel) -> Iterator[tuple[str, FileAnnotator]]:
    for field in type(config).model_fields:
        value = getattr(config, field)
        if isinstance(value, FileAnnotator):
            yield field, value
