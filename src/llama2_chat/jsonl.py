"""Reading and writing JSONL files (docs/data.md), gzip by suffix.

Readers stream: one line is in memory at a time. Every problem is a `UserInputError` that names file and
line. `scan` goes on after a bad line and hands the error over in its place; `read_…` stop at the first.
"""

from __future__ import annotations

import errno
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar, cast

from llama2_chat.dialogue import Dialogue, Preference, Prompt, Row, Sample
from llama2_chat.errors import (
    ChatTagError,
    DataFormatError,
    MissingFileError,
    OutputFolderError,
    UserInputError,
)
from llama2_chat.files import atomic_path

_T = TypeVar("_T")
_UNWRITABLE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG),
}


def read_rows(path: Path | str) -> Iterator[tuple[int, Row]]:
    """The objects of a JSONL file with their line numbers (from 1); blank lines are skipped.

    Raises:
        MissingFileError: there is no such file.
        DataFormatError: a line is not a JSON object in UTF-8, the gzip data is broken, or there is no row.
    """
    return _stop_at_errors(_scan_lines(Path(path)))


def read_dialogues(path: Path | str) -> Iterator[Dialogue]:
    """The dialogues of a file; raises UserInputError with file and line at the first bad row."""
    return read_as(path, Dialogue.from_row)


def read_preferences(path: Path | str) -> Iterator[Preference]:
    """The preferences of a file; raises UserInputError with file and line at the first bad row."""
    return read_as(path, Preference.from_row)


def read_prompts(path: Path | str) -> Iterator[Prompt]:
    """The prompts of a file; raises UserInputError with file and line at the first bad row."""
    return read_as(path, Prompt.from_row)


def read_samples(path: Path | str) -> Iterator[Sample]:
    """The samples of a file; raises UserInputError with file and line at the first bad row."""
    return read_as(path, Sample.from_row)


def read_as(path: Path | str, from_row: Callable[[Row], _T]) -> Iterator[_T]:
    """The values that `from_row` makes of a file's rows; a ValueError that it raises gets file and line."""
    numbered = _stop_at_errors((line, value) for line, _, value in scan(path, from_row))
    return (value for _, value in numbered)


def scan(
    path: Path | str, from_row: Callable[[Row], _T]
) -> Iterator[tuple[int, Row | None, _T | UserInputError]]:
    """Every row of a file as (line, the JSON object if the line is one, value or error); goes on after errors.

    A missing or unreadable file raises; a broken gzip stream is the last error that is yielded.
    """
    path = Path(path)
    for line, row in _scan_lines(path):
        if isinstance(row, UserInputError):
            yield line, None, row
            continue
        try:
            yield line, row, from_row(row)
        except ChatTagError as error:
            yield line, row, ChatTagError(f"{path}:{line}: {error}")
        except ValueError as error:
            yield line, row, DataFormatError(path, line, str(error))


def write_rows(path: Path | str, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write one JSON object a line, atomically, gzip by suffix; returns the number of rows.

    The bytes are a function of the rows alone: gzip's header carries neither time nor name.

    Raises:
        OutputFolderError: nothing can be written at `path`.
    """
    path = Path(path)
    count = 0
    with _output(path) as raw:
        compress = path.suffix == ".gz"
        packed = gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) if compress else None
        stream = cast("IO[bytes]", packed or raw)
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")
            count += 1
        if packed is not None:
            packed.close()
    return count


def count_rows(path: Path | str) -> int:
    """The number of rows (lines that are not blank), without parsing them; 0 for an empty file."""
    return sum(bool(line.strip()) for line in read_lines(path))


def read_lines(path: Path | str) -> Iterator[bytes]:
    """The lines of a file as they are, unpacked if its name ends in `.gz`.

    Raises:
        MissingFileError: there is no such file.
        DataFormatError: the gzip data is broken.
    """
    for _, line in _lines(Path(path)):
        if isinstance(line, UserInputError):
            raise line
        yield line


def _stop_at_errors(scanned: Iterable[tuple[int, _T | UserInputError]]) -> Iterator[tuple[int, _T]]:
    for line, value in scanned:
        if isinstance(value, UserInputError):
            raise value
        yield line, value


def _scan_lines(path: Path) -> Iterator[tuple[int, Row | UserInputError]]:
    """Each line's JSON object, or the error in its place; a file without any row is an error too."""
    number = 0
    empty = True
    for number, line in _lines(path):
        if isinstance(line, UserInputError):
            empty = False
            yield number, line
        elif line.strip():
            empty = False
            yield number, _parse(path, number, line)
    if empty:
        yield number, DataFormatError(path, None, "holds no rows; expected one JSON object a line")


def _parse(path: Path, number: int, line: bytes) -> Row | UserInputError:
    try:
        # Some editors put a byte-order mark before the first line.
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        row = json.loads(text.rstrip())  # a line end would count as another line in an error's column
    except UnicodeDecodeError as error:
        return DataFormatError(
            path,
            number,
            f"not UTF-8 (byte 0x{line[error.start]:02X} at column {error.start + 1}); convert it",
        )
    except json.JSONDecodeError as error:
        return DataFormatError(path, number, f"not valid JSON: {error.msg} at column {error.colno}")
    except (RecursionError, ValueError) as error:
        # Lists nested too deeply, or an integer with more digits than Python converts.
        return DataFormatError(path, number, f"not usable JSON: {error}")
    if not isinstance(row, dict):
        return DataFormatError(path, number, f"a row must be a JSON object, found {type(row).__name__}")
    return row


def _lines(path: Path) -> Iterator[tuple[int, bytes | UserInputError]]:
    """Numbered lines; broken gzip data ends them with an error in the place of a line."""
    number = 0
    try:
        with _open(path) as stream:
            for number, line in enumerate(stream, start=1):
                yield number, line
    except EOFError:
        yield (
            number + 1,
            DataFormatError(
                path, number + 1, "the gzip data ends too early; copy or download the file again"
            ),
        )
    except (gzip.BadGzipFile, zlib.error) as error:
        yield (
            number + 1,
            DataFormatError(path, number + 1, f"not valid gzip data ({error}); only *.gz is unpacked"),
        )


@contextmanager
def _output(path: Path) -> Iterator[IO[bytes]]:
    if path.is_dir():
        raise OutputFolderError(f"{path}: is a folder; name a file")
    try:
        with atomic_path(path) as temporary, temporary.open("wb") as stream:
            yield stream
    except OSError as error:
        # Anything else (a full disk) is not the user's mistake.
        if error.errno in _UNWRITABLE:
            raise OutputFolderError(
                f"{path}: cannot be written ({error.strerror}); choose another place"
            ) from error
        raise


def _open(path: Path) -> IO[bytes]:
    if path.is_dir():
        raise DataFormatError(path, None, "is a folder; a file is expected")
    try:
        return cast("IO[bytes]", gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")
    except (FileNotFoundError, NotADirectoryError):
        raise MissingFileError(f"{path}: no such file; check the path") from None
    except PermissionError:
        raise UserInputError(f"{path}: may not be read; check the file's permissions") from None
