"""An output file that grows in chunks beside its final place, so that a killed command continues.

`OUT.part` holds the rows that are done, never packed, and `OUT.part.json` what they were made from. When all are
there the part becomes the output; a packed output is packed then, in one go. So the output's bytes do not tell
whether the command was interrupted.
"""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from llama2_chat.errors import OutputFolderError
from llama2_chat.files import atomic_path, read_json, remove, write_json


class PartFile:
    """The part of one output; made by `opened`."""

    def __init__(self, output: Path, stream: IO[bytes], rows_done: int, *, started_anew: bool) -> None:
        self.output = output
        self.rows_done = rows_done
        """Rows of an earlier call that stay."""
        self.started_anew = started_anew
        """Rows of an earlier call, made from something else, were thrown away."""
        self._stream = stream

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write one chunk of rows; they are on the disk when this returns."""
        lines = [json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n" for row in rows]
        self._stream.writelines(lines)
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def finish(self) -> None:
        """Put the whole file in its place, packed if its name ends in .gz; nothing else stays."""
        part, marker = part_of(self.output), marker_of(self.output)
        if self.output.suffix == ".gz":
            self._stream.seek(0)
            with (
                atomic_path(self.output) as temporary,
                temporary.open("wb") as raw,
                gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as packed,
            ):
                shutil.copyfileobj(self._stream, packed)
            remove(part)
        else:
            part.replace(self.output)
        remove(marker)


def part_of(output: Path) -> Path:
    """Where the rows are while they are being made."""
    return output.with_name(output.name + ".part")


def marker_of(output: Path) -> Path:
    """What the rows of the part are made from."""
    return output.with_name(output.name + ".part.json")


@contextmanager
def opened(output: Path, made_from: Mapping[str, Any], *, rows_per_chunk: int) -> Iterator[PartFile]:
    """The part of `output`, cut after its last whole chunk, or a new one where `made_from` is not what it was.

    Args:
        output: The file that is to be made.
        made_from: Everything that its bytes depend on, as JSON.
        rows_per_chunk: Rows of every chunk but the last.

    Raises:
        OutputFolderError: `output` is a folder, or another process is making it.
    """
    if output.is_dir():
        raise OutputFolderError(f"{output}: is a folder; name a file")
    marker = marker_of(output)
    made_from = {**made_from, "rows_per_chunk": rows_per_chunk}
    with part_of(output).open("a+b") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputFolderError(f"{output}: another process is making this file; wait for it") from error
        if not _is_at(stream, part_of(output)):
            raise OutputFolderError(f"{output}: another process has just made this file; look at it")
        if not marker.exists() and stream.seek(0, os.SEEK_END) > 0:
            raise OutputFolderError(
                f"{part_of(output)}: is not ours, {marker.name} is not beside it; move it away or name another output"
            )
        same = marker.is_file() and _stored(marker) == made_from
        rows, length = _whole_chunks(stream, rows_per_chunk) if same else (0, 0)
        started_anew = not same and stream.seek(0, os.SEEK_END) > 0
        stream.truncate(length)
        if not same:
            # Only now: a marker never stands beside rows of something else.
            write_json(marker, made_from)
        yield PartFile(output, stream, rows, started_anew=started_anew)


def _is_at(stream: IO[bytes], path: Path) -> bool:
    """Whether the open file is still the one at `path`: it may have been put in its place before it was locked."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _stored(marker: Path) -> Any:
    try:
        return read_json(marker)
    except ValueError:
        return None


def _whole_chunks(stream: IO[bytes], rows_per_chunk: int) -> tuple[int, int]:
    """Rows and bytes of the whole chunks; a line without its end is torn."""
    rows = length = position = 0
    stream.seek(0)
    for number, line in enumerate(stream, start=1):
        if not line.endswith(b"\n"):
            break
        position += len(line)
        if number % rows_per_chunk == 0:
            rows, length = number, position
    return rows, length
