"""Reading a file that is one JSON text or one array of objects, gzip by suffix; held in memory as a whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from llama2_chat.dialogue import Row
from llama2_chat.errors import DataFormatError
from llama2_chat.fields import json_type
from llama2_chat.jsonl import read_lines


def read_array(path: Path | str) -> Iterator[tuple[int, Row]]:
    """The objects of an array with their numbers (from 1).

    Raises:
        MissingFileError: there is no such file.
        DataFormatError: the file is not a JSON array of objects in UTF-8, the gzip data is broken, or there is
            no row.
    """
    path = Path(path)
    for number, row in enumerate(_array(path), start=1):
        if not isinstance(row, dict):
            problem = f"must be a JSON object, found {json_type(row)}"
            raise DataFormatError(f"{path}: row {number}", None, problem)
        yield number, row


def read_json_text(path: Path) -> object:
    """The value of a file that is one JSON text.

    Raises:
        MissingFileError: there is no such file.
        DataFormatError: the file is not JSON in UTF-8, or the gzip data is broken.
    """
    content = b"".join(read_lines(path))
    try:
        value: object = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = f"byte 0x{content[error.start]:02X}"
        raise DataFormatError(path, line, f"not UTF-8 ({byte}); convert it") from None
    except json.JSONDecodeError as error:
        problem = f"not valid JSON: {error.msg} at column {error.colno}"
        raise DataFormatError(path, error.lineno, problem) from None
    except (RecursionError, ValueError) as error:
        # Lists nested too deeply, or an integer with more digits than Python converts.
        raise DataFormatError(path, None, f"not usable JSON: {error}") from None
    return value


def _array(path: Path) -> list[object]:
    rows = read_json_text(path)
    if not isinstance(rows, list):
        raise DataFormatError(path, None, f"must be one JSON array, found {json_type(rows)}")
    if not rows:
        raise DataFormatError(path, None, "holds no rows")
    return rows
