"""Rows of several JSONL files by number, in any order, none of their text held in memory."""

from __future__ import annotations

import json
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, TypeVar, cast

from llama2_chat.dialogue import Row
from llama2_chat.errors import UserInputError
from llama2_chat.jsonl import read_lines, scan

_T = TypeVar("_T")


class RowsByPlace:
    """`rows[place]` is one row; places count the lines of all files, one file after the other.

    A context manager: the files stay open inside its block. Those that end in .gz are unpacked into a temporary file.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)
        self._streams: list[IO[bytes]] = []
        self._first_places = [0]
        self._starts = array("q")
        self._held = ExitStack()

    def __enter__(self) -> RowsByPlace:
        with self._held as held:
            for file in self.files:
                stream = held.enter_context(_plain(file))
                start = 0
                for line in stream:
                    self._starts.append(start)
                    start += len(line)
                self._streams.append(stream)
                self._first_places.append(len(self._starts))
            self._held = held.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def read(self, number: int, from_row: Callable[[Row], _T]) -> Iterator[tuple[int, _T]]:
        """Every row of file `number` with its place, as `from_row` makes it; blank lines have a place and no row.

        Raises:
            UserInputError: a line is no JSON object or `from_row` raised ValueError; with file and line.
        """
        for line, _, value in scan(self.files[number], from_row):
            if isinstance(value, UserInputError):
                raise value
            yield self._first_places[number] + line - 1, value

    def __getitem__(self, place: int) -> Row:
        """The row at a place that `read` gave."""
        number = bisect_right(self._first_places, place) - 1
        stream = self._streams[number]
        stream.seek(self._starts[place])
        line = stream.readline()
        return cast("Row", json.loads(line.decode("utf-8-sig" if self._starts[place] == 0 else "utf-8")))


@contextmanager
def _plain(file: Path) -> Iterator[IO[bytes]]:
    """The file open for reading at any position."""
    if file.suffix != ".gz":
        with file.open("rb") as stream:
            yield stream
        return
    with TemporaryFile() as unpacked:
        unpacked.writelines(read_lines(file))
        unpacked.seek(0)
        yield unpacked
