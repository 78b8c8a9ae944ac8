"""Reading a CSV file with a header as objects, gzip by suffix; quoted fields may hold commas and line breaks."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path

from llama2_chat.data_import.text_lines import decoded_lines
from llama2_chat.dialogue import Row
from llama2_chat.errors import DataFormatError

_CUT_OFF = "unexpected end of data"


def csv_reader(*columns: str) -> Callable[[Path], Iterator[tuple[int, Row]]]:
    """A reader of CSV files whose header names at least `columns`; it gives rows with the lines that they begin on.

    It raises MissingFileError, and DataFormatError where the file is not such a CSV file or holds no row.
    """

    def read(path: Path) -> Iterator[tuple[int, Row]]:
        records = _records(path)
        line, header = next(records, (1, []))
        if missing := [name for name in columns if name not in header]:
            found = ", ".join(header) or "nothing"
            raise DataFormatError(path, line, f"the header lacks {', '.join(missing)}; found {found}")
        if twice := [name for name in columns if header.count(name) > 1]:
            raise DataFormatError(
                path, line, f"the header names {', '.join(twice)} twice; name each column once"
            )
        empty = True
        for line, record in records:
            if len(record) != len(header):
                problem = f"{len(record)} fields, but the header names {len(header)}; check commas and quotes"
                raise DataFormatError(path, line, problem)
            empty = False
            yield line, dict(zip(header, record, strict=True))
        if empty:
            raise DataFormatError(path, None, "holds no rows below its header")

    return read


def _records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Each record that is not a blank line, with the number of its first line."""
    reader = csv.reader((line for _, line in decoded_lines(path)), strict=True)
    while True:
        first = reader.line_num + 1
        try:
            record = next(reader, None)
        except csv.Error as error:
            problem = "a quote is not closed" if str(error) == _CUT_OFF else str(error)
            raise DataFormatError(path, first, f"not valid CSV: {problem}") from None
        if record is None:
            return
        if record:
            yield first, record
