"""What an entry of a recipe's `data` may be: a file, an import, or rows from the testbed's generators."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_type_hints

from pydantic import ConfigDict, Field, create_model, field_validator, model_validator

from llama2_chat.data_import import DEFAULT_HELD_OUT_SHARE, FormatName, Kind, Label, Split, check_makes
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

    format: FormatName = Field(alias="import")
    path: str
    kind: Kind
    domain: Domain | None = None
    label: Label | None = Field(None, description="Only the rows that a labelled set calls so")
    split: Split | None = Field(
        None, description="Only the rows of this part; the parts share no first user message"
    )
    held_out_share: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="About what share of the first user messages is held out; "
        f"{DEFAULT_HELD_OUT_SHARE} where it is not given",
    )
    offset: int = Field(0, ge=0, description="Skip this many usable rows of the part that is taken")
    limit: int | None = Field(None, ge=1, description="Take at most this many usable rows")

    @model_validator(mode="after")
    def _format_makes(self) -> ImportedData:
        check_makes(self.format, self.kind, self.label)
        return self

    @model_validator(mode="after")
    def _share_of_a_split(self) -> ImportedData:
        if self.held_out_share is not None and self.split is None:
            raise ValueError(
                "held_out_share has no effect without split; add split: train or split: held_out"
            )
        return self

    @property
    def held_out(self) -> float:
        """The share that is held out where the file is split."""
        return DEFAULT_HELD_OUT_SHARE if self.held_out_share is None else self.held_out_share

    @property
    def part(self) -> float:
        """About what share of the usable rows is in the part that is taken."""
        return {None: 1.0, "train": 1.0 - self.held_out, "held_out": self.held_out}[self.split]


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
    problems += _unequal_shares(entries, folder)
    return entries


def _unequal_shares(entries: Mapping[str, DataEntry], folder: Path) -> Iterator[str]:
    """Entries that split one file at different shares: what one trains on, another could hold out."""
    first: dict[Path, tuple[str, float]] = {}
    for name, entry in entries.items():
        if not isinstance(entry, ImportedData) or entry.split is None:
            continue
        other, share = first.setdefault((folder / entry.path).resolve(), (name, entry.held_out))
        if share != entry.held_out:
            yield (
                f"data.{name}.held_out_share: {entry.held_out:g}, but data.{other} splits the same file at "
                f"{share:g}, so one row could be in both parts; give both the same share"
            )
