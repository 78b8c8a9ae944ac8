"""Preparing a recipe's data entries: files as they are, imports and generated rows into `RUN/data/`."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from llama2_chat.files import read_json, sha256_of, write_json
from llama2_chat.jsonl import write_rows
from llama2_chat.pipeline.data_entries import DataEntry, FileData, GeneratedData, ImportedData
from llama2_chat.pipeline.recipe import Recipe
from llama2_chat.stage import EventLog


def prepare_data(recipe: Recipe, name: str, run: Path, events: EventLog) -> Path:
    """The JSONL file of a data entry; made if it is not there yet or its entry has changed."""
    entry = recipe.data[name]
    if (there := prepared(recipe, name, run)) is not None or isinstance(entry, FileData):
        assert there is not None
        return there
    file, record_file = run / "data" / f"{name}.jsonl", run / "data" / f"{name}.json"
    made_from = _made_from(recipe, name, entry)
    record: dict[str, Any] = {"made_from": made_from}
    if isinstance(entry, GeneratedData):
        write_rows(file, _generated(entry, made_from["seed"]))
    else:
        write_rows(file, _imported(entry, recipe.folder / entry.path, record))
    record["sha256"] = sha256_of(file)
    write_json(record_file, record)
    events.write("data_prepared", data=name, **{k: v for k, v in record.items() if k != "made_from"})
    return file


def prepared(recipe: Recipe, name: str, run: Path) -> Path | None:
    """The JSONL file of a data entry if nothing has to be done for it, else None."""
    entry = recipe.data[name]
    if isinstance(entry, FileData):
        return (recipe.folder / entry.path).resolve()
    file, record_file = run / "data" / f"{name}.jsonl", run / "data" / f"{name}.json"
    if not (file.exists() and record_file.exists()):
        return None
    return file if read_json(record_file)["made_from"] == _made_from(recipe, name, entry) else None


def data_seed(seed: int, name: str) -> int:
    """Seed of a generated entry: a function of the recipe's seed and the entry's name."""
    return zlib.crc32(f"{seed}/{name}".encode())


def _made_from(recipe: Recipe, name: str, entry: DataEntry) -> dict[str, Any]:
    made_from = entry.model_dump(mode="json", by_alias=True)
    if isinstance(entry, GeneratedData):
        made_from["seed"] = data_seed(recipe.head.seed, name)
    else:
        made_from["sha256"] = sha256_of(recipe.folder / entry.path)
    return made_from


def _generated(entry: GeneratedData, seed: int) -> Iterator[dict[str, Any]]:
    from llama2_chat.testbed.generators import GENERATORS

    rows: Iterator[dict[str, Any]] = GENERATORS[entry.testbed](
        rows=entry.rows, seed=seed, split=entry.split, **entry.options
    )
    return rows


def _imported(entry: ImportedData, source: Path, record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    from llama2_chat.data_import import ImportReport, import_hh_rlhf

    report = ImportReport()
    rows = import_hh_rlhf(source, kind=entry.kind, domain=entry.domain, report=report)
    end = None if entry.limit is None else entry.offset + entry.limit
    for row in islice(rows, entry.offset, end):
        yield row.to_row()
    record["report"] = report.to_row()
