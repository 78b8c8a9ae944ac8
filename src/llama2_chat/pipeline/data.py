"""Preparing a recipe's data entries: files as they are, imports and generated rows into `RUN/data/`."""

from __future__ import annotations

import inspect
import sys
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from llama2_chat.errors import UserInputError
from llama2_chat.files import read_json, sha256_of, write_json
from llama2_chat.jsonl import count_rows, write_rows
from llama2_chat.pipeline.data_entries import DataEntry, FileData, GeneratedData, ImportedData
from llama2_chat.settings import RunSettings
from llama2_chat.stage import EventLog


class DataSource(Protocol):
    """Where data entries stand: a recipe, or the configuration of one stage."""

    @property
    def data(self) -> Mapping[str, DataEntry]:
        """The entries by name."""
        ...

    @property
    def folder(self) -> Path:
        """What relative paths start from."""
        ...

    @property
    def settings(self) -> RunSettings:
        """The seed is among them."""
        ...


def prepare_data(source: DataSource, name: str, run: Path, events: EventLog) -> Path:
    """The JSONL file of a data entry; made if it is not there yet or its entry has changed.

    `RUN/data/NAME.json` records what it was made from, its hash and its rows.

    Raises:
        UserInputError: an import leaves no row.
    """
    entry = source.data[name]
    record_file = run / "data" / f"{name}.json"
    if (there := prepared(source, name, run)) is not None:
        if isinstance(entry, FileData) and _digest(record_file) != (digest := sha256_of(there)):
            write_json(
                record_file,
                {"made_from": entry.model_dump(mode="json"), "rows": count_rows(there), "sha256": digest},
            )
        return there
    file = run / "data" / f"{name}.jsonl"
    made_from = _made_from(source, name, entry)
    report: dict[str, Any] = {}
    if isinstance(entry, GeneratedData):
        rows = write_rows(file, _generated(entry, made_from["seed"], report))
    else:
        assert isinstance(entry, ImportedData)  # a file is always there
        rows = write_rows(file, _imported(name, entry, source.folder / entry.path, report))
    record = {"made_from": made_from, "rows": rows, "report": report, "sha256": sha256_of(file)}
    write_json(record_file, record)
    events.write("data_prepared", data=name, rows=rows, sha256=record["sha256"], report=report)
    return file


def prepared(source: DataSource, name: str, run: Path) -> Path | None:
    """The JSONL file of a data entry if nothing has to be made for it, else None."""
    entry = source.data[name]
    if isinstance(entry, FileData):
        return (source.folder / entry.path).resolve()
    file, record_file = run / "data" / f"{name}.jsonl", run / "data" / f"{name}.json"
    if not (file.exists() and record_file.exists()):
        return None
    return file if read_json(record_file)["made_from"] == _made_from(source, name, entry) else None


def _digest(record_file: Path) -> str | None:
    return read_json(record_file).get("sha256") if record_file.exists() else None


def data_seed(seed: int, name: str) -> int:
    """Seed of a generated entry: a function of the recipe's seed and the entry's name."""
    return zlib.crc32(f"{seed}/{name}".encode())


def _made_from(source: DataSource, name: str, entry: DataEntry) -> dict[str, Any]:
    made_from = entry.model_dump(mode="json", by_alias=True)
    if isinstance(entry, GeneratedData):
        made_from["seed"] = data_seed(source.settings.seed, name)
    else:
        made_from["sha256"] = sha256_of(source.folder / entry.path)
    return made_from


def _generated(entry: GeneratedData, seed: int, report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    from llama2_chat.testbed.generators import GENERATORS, AnnotationCounts

    generator = GENERATORS[entry.testbed]
    options = dict(entry.options)
    counted = "counts" in inspect.signature(generator).parameters
    if counted:
        options["counts"] = AnnotationCounts()
    yield from generator(rows=entry.rows, seed=seed, split=entry.split, **options)
    if counted:
        report |= asdict(options["counts"])


def _imported(name: str, entry: ImportedData, file: Path, report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    from llama2_chat.data_import import ImportReport, import_rows

    counts = ImportReport()
    rows = import_rows(
        entry.format,
        file,
        kind=entry.kind,
        domain=entry.domain,
        label=entry.label,
        split=entry.split,
        held_out_share=entry.held_out_share,
        report=counts,
    )
    end = None if entry.limit is None else entry.offset + entry.limit
    taken = 0
    for row in islice(rows, entry.offset, end):
        taken += 1
        yield row.to_row()
    if not taken:
        usable = f"{counts.imported} of {counts.read} {counts.unit} read are usable"
        part = f", {counts.in_split} of them in the part {entry.split}" if entry.split else ""
        raise UserInputError(f"data.{name}: no row is left of {file}; {usable}{part}")
    report |= counts.to_row()
    if counts.imported < counts.read:
        print(f"{file}: {counts}", file=sys.stderr, flush=True)
