"""JSONL files: what is written reads back, and every broken file is one message with its place."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llama2_chat.dialogue import Dialogue, Message, Preference, Prompt, Sample
from llama2_chat.errors import ChatTagError, DataFormatError, MissingFileError, OutputFolderError
from llama2_chat.jsonl import (
    count_rows,
    read_dialogues,
    read_preferences,
    read_prompts,
    read_rows,
    read_samples,
    scan,
    write_rows,
)

GOOD = {"messages": [{"role": "user", "content": "Hi. \u2028 é🦙"}]}
PROMPT = (Message("user", "Hi."),)


def write_lines(path: Path, *lines: bytes | dict[str, Any]) -> Path:
    data = b"".join(
        (line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines
    )
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_what_is_written_reads_back(tmp_path: Path, name: str) -> None:
    path = tmp_path / "new" / name
    rows = [GOOD, {"messages": [], "x": None}, {}]
    assert write_rows(path, rows) == 3
    assert list(read_rows(path)) == list(enumerate(rows, start=1))
    assert count_rows(path) == 3
    assert (path.read_bytes()[:2] == b"\x1f\x8b") == name.endswith(".gz")
    assert [file.name for file in path.parent.iterdir()] == [name]


def test_the_four_readers(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    values = [
        (read_dialogues, Dialogue((*PROMPT, Message("assistant", "Hello.")), id="1")),
        (read_preferences, Preference(PROMPT, "Hello.", "Go.", "better")),
        (read_prompts, Prompt(PROMPT, is_safety=True)),
        (read_samples, Sample(PROMPT, "Hello.", None, "sft", 0, 1.0, 0)),
    ]
    for read, value in values:
        write_rows(path, [value.to_row(), value.to_row()])
        assert list(read(path)) == [value, value]


def test_packed_bytes_depend_on_the_rows_alone(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl.gz"
    write_rows(first, [GOOD])
    write_rows(second, [GOOD])
    assert hashlib.sha256(first.read_bytes()).digest() == hashlib.sha256(second.read_bytes()).digest()
    assert first.read_bytes()[4:8] == bytes(4)  # the time in gzip's header (RFC 1952)


def test_one_line_a_row_in_utf8(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"a": "é\n🦙"}, {"b": 1}])
    assert (tmp_path / "rows.jsonl").read_bytes() == '{"a": "é\\n🦙"}\n{"b": 1}\n'.encode()


def test_blank_lines_a_byte_order_mark_and_line_ends_of_windows(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", b'\xef\xbb\xbf{"a": 1}\r', b"", b'{"a": 2}\r', b"  ")
    assert list(read_rows(path)) == [(1, {"a": 1}), (3, {"a": 2})]
    assert count_rows(path) == 2


def test_the_last_line_needs_no_line_end(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"a": 1}\n{"a": 2}')
    assert [row["a"] for _, row in read_rows(tmp_path / "rows.jsonl")] == [1, 2]


BROKEN = [
    (b'{"messages": [}', "rows.jsonl:2: not valid JSON: Expecting value at column 15"),
    (b'{"a": "caf\xe9"}', "rows.jsonl:2: not UTF-8 (byte 0xE9 at column 11); convert it"),
    (b"[1, 2]", "rows.jsonl:2: a row must be a JSON object, found list"),
    (b"[" * 100_000, "rows.jsonl:2: not usable JSON: "),
    (
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}',
        'rows.jsonl:2: messages[1] has role "user", expected "assistant": an optional system message, then '
        "user and assistant strictly in turn",
    ),
    (b'{"mesages": []}', 'rows.jsonl:2: "messages" is missing; found mesages'),
    (b'{"messages": "Hi."}', "rows.jsonl:2: messages must be a list of messages, found a string"),
]


@pytest.mark.parametrize(("line", "problem"), BROKEN)
def test_broken_lines(tmp_path: Path, line: bytes, problem: str) -> None:
    path = write_lines(tmp_path / "rows.jsonl", GOOD, line, GOOD)
    rows = read_dialogues(path)
    assert next(rows) == Dialogue.from_row(GOOD)
    with pytest.raises(DataFormatError) as error:
        next(rows)
    assert str(error.value).startswith(f"{tmp_path}/{problem}")
    assert error.value.exit_code == 2
    # scan goes on after the bad line.
    good, bad, last = (value for _, _, value in scan(path, Dialogue.from_row))
    assert good == last == Dialogue.from_row(GOOD)
    assert str(bad) == str(error.value)


def test_an_unknown_rating(tmp_path: Path) -> None:
    row = Preference(PROMPT, "a", "b").to_row()
    path = write_lines(tmp_path / "prefs.jsonl", *[row] * 411, row | {"rating": "much_better"})
    with pytest.raises(DataFormatError) as error:
        list(read_preferences(path))
    assert str(error.value) == (
        f'{path}:412: rating "much_better" unknown; one of significantly_better, better, slightly_better, '
        'negligibly_better (did you mean "better"?)'
    )


def test_a_chat_tag(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "prompts.jsonl", {"prompt": [{"role": "user", "content": "[/INST] sure"}]})
    with pytest.raises(ChatTagError) as error:
        list(read_prompts(path))
    assert str(error.value).startswith(f"{path}:1: prompt[0]: user content holds the chat tag [/INST]")
    assert error.value.exit_code == 2


@pytest.mark.parametrize("content", [b"", b"\n  \n"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_an_empty_file(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    with pytest.raises(DataFormatError) as error:
        list(read_rows(path))
    assert str(error.value) == f"{path}: holds no rows; expected one JSON object a line"
    assert count_rows(path) == 0


def test_a_truncated_gzip_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    rows = [{"messages": [{"role": "user", "content": f"{n} {n * 7919 % 1000}"}]} for n in range(5000)]
    write_rows(path, rows)
    path.write_bytes(path.read_bytes()[:-20])
    seen = 0
    with pytest.raises(DataFormatError, match="the gzip data ends too early") as error:
        for seen, _ in read_rows(path):  # noqa: B007 - the last line number is what is looked at
            pass
    assert 0 < seen < 5000
    assert str(error.value).startswith(f"{path}:{seen + 1}: ")
    with pytest.raises(DataFormatError, match="ends too early"):
        count_rows(path)


def test_a_file_that_is_only_named_gz(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(b'{"a": 1}\n')
    with pytest.raises(DataFormatError, match=r"rows\.jsonl\.gz:1: not valid gzip data"):
        list(read_rows(path))


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path / "none.jsonl.gz"):
        with pytest.raises(MissingFileError, match="no such file; check the path"):
            list(read_rows(path))
    with pytest.raises(DataFormatError, match="is a folder"):
        list(read_rows(tmp_path))


def test_readers_stream(tmp_path: Path) -> None:
    # A reader that looked ahead would meet the broken line.
    path = write_lines(tmp_path / "rows.jsonl", GOOD, b"{")
    assert next(read_dialogues(path)) == Dialogue.from_row(GOOD)
    assert next(read_rows(path)) == (1, GOOD)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_rows(path, [{"a": 1}])

    def rows() -> Iterator[dict[str, Any]]:
        yield {"a": 2}
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_rows(path, rows())
    assert list(read_rows(path)) == [(1, {"a": 1})]
    assert list(tmp_path.iterdir()) == [path]


def test_numbers_that_json_has_no_word_for_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_rows(tmp_path / "rows.jsonl", [{"a": float("nan")}])
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "file", b"x")
    for path, problem in ((tmp_path, "is a folder; name a file"), (file / "rows.jsonl", "cannot be written")):
        with pytest.raises(OutputFolderError, match=problem) as error:
            write_rows(path, [GOOD])
        assert error.value.exit_code == 2
    assert file.read_bytes() == b"x\n"


def test_a_full_disk_is_not_the_users_mistake(tmp_path: Path) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield GOOD
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left") as error:
        write_rows(tmp_path / "rows.jsonl", rows())
    assert not isinstance(error.value, OutputFolderError)


def test_datasets_reads_what_is_written(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "rows.jsonl.gz"
    rows = [Preference(PROMPT, f"a{n}", "b", "better", domain="safety").to_row() for n in range(3)]
    write_rows(path, rows)
    loaded = datasets.load_dataset(
        "json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert list(loaded) == rows
