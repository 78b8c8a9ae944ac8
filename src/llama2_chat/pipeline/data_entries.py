"""What an entry of a recipe's `data` may be: a file, an import, or rows from the testbed's generators."""

from __future__ import annotations

import inspect
from typing import Any, Literal, get_type_hints

from pydantic import ConfigDict, Field, create_model, field_validator

from llama2_chat.dialogue import Domain
from llama2_chat.errors import did_you_mean
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
