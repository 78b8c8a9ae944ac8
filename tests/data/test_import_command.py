"""`llama2-chat data import`: every format, wrong files, one part of a file."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any, get_args

import pytest

from llama2_chat.cli.main import run_command
from llama2_chat.data_check import check_file
from llama2_chat.data_import import FORMATS, KINDS, FormatName
from llama2_chat.jsonl import read_prompts, read_rows, write_rows


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = run_command(["data", *map(str, arguments)])
    output = capsys.readouterr()
    assert "Traceback" not in output.err
    return code, output.out, output.err


PAIRS = [
    {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant:"},
]


def test_import(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(tmp_path / "pairs.jsonl.gz", PAIRS)
    output = tmp_path / "new" / "prompts.jsonl"
    arguments = ("hh-rlhf", tmp_path / "pairs.jsonl.gz", output, "--kind", "prompts", "--domain", "safety")
    code, printed, _ = run(capsys, "import", *arguments)
    assert code == 0
    assert printed == (
        f"{output}: 2 rows read, 1 imported as safety data, 1 dropped (an empty last answer: 1)\n"
    )
    (prompt,) = read_prompts(output)
    assert prompt.is_safety
    assert prompt.messages[0].content == "a"


def test_a_failed_import_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = tmp_path / "pairs.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps(PAIRS[0]) + "\n{\n")
    code, _, errors = run(capsys, "import", "hh-rlhf", source, output, "--kind", "prompts")
    assert code == 2
    assert errors.startswith(f"error: {source}:2: not valid JSON")
    assert sorted(tmp_path.iterdir()) == [source]


def test_import_to_places_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "pairs.jsonl"
    write_rows(source, PAIRS)
    before = source.read_bytes()
    for output, problem in (
        (source / "out.jsonl", "cannot be written"),
        (tmp_path, "is a folder; name a file"),
        (source, "is the input file too; name another output"),
    ):
        code, _, errors = run(capsys, "import", "hh-rlhf", source, output, "--kind", "prompts")
        assert code == 2
        assert errors.startswith(f"error: {output}: {problem}")
    assert source.read_bytes() == before


def judgment(votes: tuple[int, int, int] = (1, 1, 1), **fields: Any) -> dict[str, Any]:
    annotators = {f"annotator{number}": vote for number, vote in enumerate(votes, 1)}
    return {"instruction": "a", "input": "", "response1": "b", "response2": "c", **annotators, **fields}


TREE = {
    "message_tree_id": "t",
    "tree_state": "ready_for_export",
    "prompt": {
        **{"message_id": "t", "role": "prompter", "text": "a", "review_result": True},
        "replies": [
            {"message_id": answer, "role": "assistant", "text": answer, "rank": rank, "review_result": True}
            for rank, answer in enumerate("bc")
        ],
    },
}
FILES: dict[str, bytes] = {
    "hh-rlhf": json.dumps(PAIRS[0]).encode(),
    "pandalm": json.dumps([judgment()], indent=4).encode(),
    "oasst": json.dumps(TREE).encode(),
    "xstest": b"id,prompt,type,label\n1,a,homonyms,safe\n",
    "truthfulqa": b"Category,Question,Best Answer,Incorrect Answers\nx,a,b,c\n",
    "toxigen": b"- a\n",
    "bold": json.dumps({"group": {"page": ["a "]}}).encode(),
    "diasafety": json.dumps(
        [{"context": "a", "response": "b", "category": "x", "label": "Safe"}], indent=0
    ).encode(),
}


def pack(file: Path, content: bytes) -> Path:
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)
    return file


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("format_", FILES)
def test_every_format_is_read_packed_or_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], format_: str, suffix: str
) -> None:
    assert tuple(FILES) == tuple(FORMATS) == get_args(FormatName)
    source, output = pack(tmp_path / f"source.json{suffix}", FILES[format_]), tmp_path / f"out.jsonl{suffix}"
    kinds = FORMATS[format_].kinds
    for kind in KINDS:
        code, _, errors = run(capsys, "import", format_, source, output, "--kind", kind)
        assert code == (0 if kind in kinds else 2)
        if kind in kinds:
            assert check_file(output, kind).rows == 1
        else:
            assert errors.startswith(f"error: {format_} holds no {kind}; kind is one of {kinds[0]}")
    (found,) = run_and_read(capsys, format_, source, output, "prompts")
    question = "- a" if format_ == "toxigen" else "a"
    assert found["prompt"] == [{"role": "user", "content": question}]
    assert found["source"].partition("/")[0] == format_
    if "preferences" not in kinds:
        return
    (found,) = run_and_read(capsys, format_, source, output, "preferences")
    assert found["prompt"] == [{"role": "user", "content": "a"}]
    assert [found[side][0]["content"] for side in ("chosen", "rejected")] == ["b", "c"]


def run_and_read(
    capsys: pytest.CaptureFixture[str], format_: str, source: Path, output: Path, kind: str, *options: object
) -> list[dict[str, Any]]:
    code, _, errors = run(capsys, "import", format_, source, output, "--kind", kind, *options)
    assert code == 0, errors
    return [row for _, row in read_rows(output)]


@pytest.mark.parametrize("format_", FILES)
def test_a_file_of_another_format_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], format_: str
) -> None:
    """Each format against the files of the others, against no JSON, no rows, no UTF-8 and cut gzip data."""
    expected = {
        "hh-rlhf": 'a row of HH-RLHF holds two texts, "chosen" and "rejected"',
        "pandalm": "PandaLM's human judgments are one JSON array of objects with instruction, input, response1",
        "oasst": "OpenAssistant's trees are JSONL, one tree a line",
        "xstest": "XSTest's prompts are CSV with a header that names at least prompt, type, label",
        "truthfulqa": "TruthfulQA is CSV with a header that names at least Category, Question, Best Answer",
        "toxigen": 'ToxiGen\'s prompts are text, one prompt a line, which begins with "- "',
        "bold": "BOLD's prompts are one JSON object",
        "diasafety": "DiaSafety is one JSON array of objects with context, response, category, label",
    }
    wrong = [content for name, content in FILES.items() if name != format_]
    wrong += [b"chosen,rejected\n", b"", b"[]", b"{}", b"[1]", b'[{"idx": 1}]', b'{"prompt": {}}', b"\xff"]
    wrong += [json.dumps([[[]]]).encode(), b"[" * 100_000, b'"' + b"a" * 9]
    for number, content in enumerate(wrong):
        source = pack(tmp_path / f"source{number}.json", content)
        code, printed, errors = run(capsys, "import", format_, source, tmp_path / "out", "--kind", "prompts")
        assert (code, printed) == (2, "")
        assert errors.startswith(f"error: {source}:"), content[:20]
        assert expected[format_] in errors
        assert not (tmp_path / "out").exists()
    cut = tmp_path / "cut.json.gz"
    cut.write_bytes(gzip.compress(FILES[format_])[:-9])
    _, _, errors = run(capsys, "import", format_, cut, tmp_path / "out", "--kind", "prompts")
    assert f"{cut}:" in errors
    assert "the gzip data ends too early" in errors
    _, _, errors = run(capsys, "import", format_, tmp_path, tmp_path / "out", "--kind", "prompts")
    assert errors.startswith(f"error: {tmp_path}: is a folder")
    _, _, errors = run(capsys, "import", format_, tmp_path / "no", tmp_path / "out", "--kind", "prompts")
    assert errors == f"error: {tmp_path / 'no'}: no such file; check the path\n"


def test_an_import_of_which_nothing_is_left_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = pack(tmp_path / "source.json", json.dumps([judgment((0, 0, 0))]).encode())
    code, _, errors = run(capsys, "import", "pandalm", source, tmp_path / "out", "--kind", "prompts")
    assert code == 2
    assert errors == (
        f"error: {source}: nothing to write is left: 1 rows read, 0 imported as helpfulness data, 1 dropped "
        "(the annotators prefer neither answer: 1)\n"
    )
    assert not (tmp_path / "out").exists()


def test_import_of_one_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # SHA-256 as a fraction: "abc" 0.728, "a" 0.792 (published test vectors ba7816bf..., ca978112...).
    rows = [judgment(instruction=text) for text in ("abc", "a", " abc\n")]
    source, output = pack(tmp_path / "source.json", json.dumps(rows).encode()), tmp_path / "out.jsonl"
    options = ("--held-out-share", 0.75, "--split")
    held_out = run_and_read(capsys, "pandalm", source, output, "prompts", *options, "held_out")
    assert [row["prompt"][0]["content"] for row in held_out] == ["abc", "abc"]
    code, printed, _ = run(
        capsys, "import", "pandalm", source, output, "--kind", "prompts", *options, "train"
    )
    assert (code, printed) == (
        0,
        f"{output}: 3 rows read, 3 usable as helpfulness data, 0 dropped; split train (held-out share 0.75): 1\n",
    )
    assert len(run_and_read(capsys, "pandalm", source, output, "prompts", "--split", "train")) == 3


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--held-out-share", "0.3"], "a held-out share without a split has no effect; name the split"),
        (["--split", "train", "--held-out-share", "1"], "the held-out share is 1.0; it lies between 0 and 1"),
        (
            ["--split", "train", "--held-out-share", "nan"],
            "the held-out share is nan; it lies between 0 and 1",
        ),
        (["--split", "held_out", "--held-out-share", "0.0"], "the held-out share is 0.0; it lies between"),
    ],
)
def test_shares_that_split_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], problem: str
) -> None:
    source = pack(tmp_path / "source.json", FILES["pandalm"])
    code, _, errors = run(
        capsys, "import", "pandalm", source, tmp_path / "out", "--kind", "prompts", *options
    )
    assert code == 2
    assert errors.startswith(f"error: {problem}")
    assert not (tmp_path / "out").exists()
