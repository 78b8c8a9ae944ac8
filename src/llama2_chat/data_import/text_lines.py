"""Reading plain text: lines with their numbers, decoded strictly, gzip by suffix."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from llama2_chat.errors import DataFormatError
from llama2_chat.jsonl import read_lines


def decoded_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file with their numbers (from 1), line ends kept, a byte-order mark left out.

    Raises:
        MissingFileError: there is no such file.
        DataFormatError: a line is not UTF-8, or the gzip data is broken.
    """
    for number, line in enumerate(read_lines(path), start=1):
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            byte = f"byte 0x{line[error.start]:02X} at column {error.start + 1}"
            raise DataFormatError(path, number, f"not UTF-8 ({byte}); convert it") from None
