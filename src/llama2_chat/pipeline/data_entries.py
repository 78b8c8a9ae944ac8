"""What an entry of a recipe's `data` may be: a file, an import, or rows from the testbed's generators."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_type_hints

from pydantic import ConfigDict, Field, create_model, field_validator

from llama2_chat.dialogue import Domain
from llama2_chat.errors import did_you_mean
from llama2_chat.pipeline.problems import validated
from llama2_chat.settings import StrictModel


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
    options: dict[str, Any] = Field(default_factory=dict, description="The generator's own options")

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


def entry_class(mapping: Any) -> type[FileData | ImportedData | GeneratedData]:
    """Which of the three a mapping is, by the key that only one of them has."""
    return GeneratedData if "testbed" in mapping else ImportedData if "import" in mapping else FileData


def options_class(generator: str) -> type[StrictModel]:
    """The options of a generator as a model: its keyword-only arguments.

    `counts` is left out: through it the generator tells how many rows it drew and dropped.
    """
    from llama2_chat.testbed.generators import GENERATORS

    function = GENERATORS[generator]
    # The generators name these types for type checkers only, to stay free of other imports.
    types = get_type_hints(function, localns={"Domain": Domain})
    fields: dict[str, Any] = {
        name: (types[name], parameter.default)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name != "counts"
    }
    return create_model(f"{generator}_options", __base__=StrictModel, **fields)


def validated_entries(value: Any, folder: Path, problems: list[str]) -> dict[str, DataEntry]:
    """The entries of a `data` mapping by name; what is wrong with them is added to `problems`.

    Args:
        folder: What relative paths start from; files must be there.
    """
    if not isinstance(value, Mapping):
        problems.append(f"data: a mapping of names to entries is wanted, found {value!r}")
        return {}
    entries: dict[str, DataEntry] = {}
    for name, entry in value.items():
        key = f"data.{name}"
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
            problems.append(f"{key}: a data entry's name is letters, digits, -, _ and dots inside")
        mapping = {"path": entry} if isinstance(entry, str) else entry
        if not isinstance(mapping, Mapping):
            problems.append(f"{key}: a path or a mapping is wanted, found {entry!r}")
            continue
        made = validated(entry_class(mapping), mapping, key, problems)
        if isinstance(made, FileData | ImportedData) and not (folder / made.path).is_file():
            problems.append(f"{key}.path: no such file: {folder / made.path}")
        if isinstance(made, GeneratedData):
            validated(options_class(made.testbed), made.options, f"{key}.options", problems)
        if made is not None:
            entries[str(name)] = made
    return entries
