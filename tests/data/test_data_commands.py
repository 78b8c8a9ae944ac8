"""`llama2-chat data check | show | import`, as a user calls them: exit code, what is printed, what is written."""

from __future__ import annotations

import gzip
import json
import re
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any, get_args

import pytest

from llama2_chat.cli.main import run_command
from llama2_chat.data_check import check_file
from llama2_chat.data_import import FORMATS, KINDS, FormatName
from llama2_chat.jsonl import read_dialogues, read_prompts, read_rows, write_rows

USER = {"role": "user", "content": "Once"}
ANSWER = {"role": "assistant", "content": "upon"}
EMPTY = {"role": "assistant", "content": " "}
SYSTEM = {"role": "system", "content": "a time"}


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = run_command(["data", *map(str, arguments)])
    output = capsys.readouterr()
    assert "Traceback" not in output.err
    return code, output.out, output.err


def pair(**fields: Any) -> dict[str, Any]:
    return {"prompt": [USER], "chosen": [ANSWER], "rejected": [EMPTY], **fields}


def test_check_counts_preferences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "pairs.jsonl"
    rows = [
        pair(rating="better", chosen_safe=True, rejected_safe=False, domain="safety", source="ours"),
        pair(rating="better", chosen_safe=True, rejected_safe=False, domain="safety", source="ours"),
        pair(rating="negligibly_better", rejected=[ANSWER], chosen_safe=False, rejected_safe=True),
        pair(prompt=[SYSTEM, USER, ANSWER, USER], ratings="better"),
    ]
    write_rows(file, rows)
    code, output, errors = run(capsys, "check", file, "--kind", "preferences")
    assert (code, errors) == (0, "")
    assert output.splitlines() == [
        "rows: 4",
        "user turns: 5",
        "rows with a system message: 1",
        "rows with an empty content: 3",
        "rows with identical answers: 1",
        "rows that prefer the unsafe answer (reward models are not trained on them): 1",
        "rating significantly_better: 0",
        "rating better: 2",
        "rating slightly_better: 0",
        "rating negligibly_better: 1",
        "rows without rating (margin 0): 1",
        "chosen not labelled, rejected not labelled: 1",
        "chosen safe, rejected unsafe: 2",
        "chosen unsafe, rejected safe: 1",
        "domain not named: 2",
        "domain safety: 2",
        "source not named: 2",
        "source ours: 2",
        'field "ratings" is not used (did you mean "rating"?): 1',
    ]


def test_check_warns_where_no_row_is_rated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(tmp_path / "pairs.jsonl", [pair(), pair()])
    code, output, _ = run(capsys, "check", tmp_path / "pairs.jsonl", "--kind", "preferences")
    assert code == 0
    assert "rows without rating (margin 0): 2\nwarning: no row has a rating, so a margin table" in output


def test_check_counts_dialogues_and_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl.gz"
    write_rows(file, [{"messages": [USER, ANSWER], "is_safety": True}, {"messages": [USER, ANSWER, USER]}])
    assert run(capsys, "check", file, "--kind", "dialogues") == (
        0,
        "rows: 2\nuser turns: 3\nrows with a system message: 0\nrows with an empty content: 0\n"
        "rows that end with the user: 1\nis_safety false: 1\nis_safety true: 1\nsource not named: 2\n",
        "",
    )
    write_rows(file, [{"prompt": [USER], "is_safety": True, "risk_category": "illicit"}])
    assert run(capsys, "check", file, "--kind", "prompts") == (
        0,
        "rows: 1\nuser turns: 1\nrows with a system message: 0\nrows with an empty content: 0\n"
        "is_safety true: 1\nrisk category illicit: 1\nsource not named: 1\n",
        "",
    )


def test_check_names_every_bad_row_up_to_a_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "pairs.jsonl"
    lines = [json.dumps(pair(rating="2")), "{", json.dumps(pair()), json.dumps({}), json.dumps([])]
    file.write_text("\n".join(lines))
    code, output, errors = run(capsys, "check", file, "--kind", "preferences", "--max-errors", 3)
    assert code == 2
    assert output.startswith("rows: 1\n")
    first, *problems, more = errors.splitlines()
    assert first == f"error: 4 rows of {file} cannot be used:"
    assert problems == [
        f'{file}:1: rating "2" unknown; one of significantly_better, better, slightly_better, '
        "negligibly_better",
        f"{file}:2: not valid JSON: Expecting property name enclosed in double quotes at column 2",
        f'{file}:4: "prompt" is missing; found no fields',
    ]
    assert more == "and 1 more; --max-errors shows more of them"
    summary = check_file(file, "preferences")
    assert (summary.rows, summary.unusable, len(summary.problems)) == (1, 4, 4)


@pytest.mark.parametrize("arguments", [("check", "--kind", "prompts"), ("show", "--tokenizer", "none")])
def test_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    file = tmp_path / "none.jsonl"
    code, output, errors = run(capsys, arguments[0], file, *arguments[1:])
    assert (code, output, errors) == (2, "", f"error: {file}: no such file; check the path\n")


def test_an_empty_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "empty.jsonl"
    file.touch()
    for arguments in (["check", file, "--kind", "prompts"], ["show", file, "--tokenizer", "none"]):
        code, _, errors = run(capsys, *arguments)
        assert code == 2
        assert f"{file}: holds no rows; expected one JSON object a line" in errors


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["check", "x", "--kind", "pairs"], "'pairs' is not one of 'dialogues', 'preferences', 'prompts'"),
        (["check", "x"], "Missing option '--kind'"),
        (["show", "x", "--tokenizer", "t", "--loss-policy", "none"], "'none' is not one of 'all_answers'"),
        (["show", "x", "--tokenizer", "t", "--chat-format", "chatml"], "'chatml' is not one of 'llama2'"),
        (
            ["import", "alpaca", "x", "y", "--kind", "prompts"],
            "'alpaca' is not one of 'hh-rlhf', 'pandalm', 'oasst'",
        ),
        (["import", "oasst", "x", "y", "--kind", "prompts", "--split", "test"], "one of 'train', 'held_out'"),
        (["import", "hh-rlhf", "x", "y", "--kind", "prompts", "--domain", "safe"], "'safe' is not one of"),
    ],
)
def test_wrong_arguments(capsys: pytest.CaptureFixture[str], arguments: list[str], problem: str) -> None:
    code, _, errors = run(capsys, *arguments)
    assert code == 2
    assert problem in " ".join(errors.replace("│", " ").split())


@pytest.fixture
def dialogues(tmp_path: Path) -> Path:
    rows = [{"messages": [USER, ANSWER, USER, ANSWER]}, {"messages": [SYSTEM, USER]}]
    write_rows(tmp_path / "dialogues.jsonl", rows)
    return tmp_path / "dialogues.jsonl"


def shown(output: str) -> list[tuple[list[int], list[int]]]:
    rows = [json.loads(line) for line in output.splitlines()]
    assert all(row.keys() == {"input_ids", "loss_mask"} for row in rows)
    return [(row["input_ids"], row["loss_mask"]) for row in rows]


def test_show_as_json(dialogues: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tokenizers import Tokenizer

    folder = data_folder / "stories260K"
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    question = [1, *raw.encode("[INST] Once [/INST]", add_special_tokens=False).ids]
    turn = [1, *raw.encode("[INST] Once [/INST] upon ", add_special_tokens=False).ids, 2]
    asked, answered = [0] * len(question), [1] * (len(turn) - len(question))
    system = "[INST] <<SYS>>\na time\n<</SYS>>\n\nOnce [/INST]"
    prompt = [1, *raw.encode(system, add_special_tokens=False).ids]

    code, output, _ = run(capsys, "show", dialogues, "--tokenizer", folder, "--json")
    assert code == 0
    assert shown(output) == [
        (turn + turn, (asked + answered) * 2),
        (prompt, [0] * len(prompt)),
    ]
    arguments = ("--tokenizer", folder, "--json", "--loss-policy", "last_answer", "--limit", 1)
    code, output, _ = run(capsys, "show", dialogues, *arguments)
    assert code == 0
    assert shown(output) == [(turn + turn, asked + [0] * len(answered) + asked + answered)]


def test_show_in_words(dialogues: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, output, _ = run(capsys, "show", dialogues, "--tokenizer", data_folder / "stories260K")
    assert code == 0
    lines = output.splitlines()
    assert lines[0].startswith("dialogue 1: ")
    assert lines[0].endswith(" trained")
    # Without colours the trained tokens stand in brackets.
    assert lines[1] == "<s> [INST] Once [/INST]⟦ upon </s>⟧<s> [INST] Once [/INST]⟦ upon </s>⟧"
    assert lines[2].endswith(" tokens, 0 trained")
    assert lines[3:] == ["<s> [INST] <<SYS>>", "a time", "<</SYS>>", "", "Once [/INST]"]


def test_show_in_colour(
    dialogues: Path,
    data_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    arguments = ("--tokenizer", data_folder / "stories260K", "--limit", 1)
    _, output, _ = run(capsys, "show", dialogues, *arguments)
    green = [part.split("\x1b[0m")[0] for part in output.split("\x1b[32m")[1:]]
    assert green == [" upon </s>", " upon </s>"]
    assert "⟦" not in output


def test_show_masks_real_dialogues(
    data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """HH-RLHF as `--json` and in words: what the mask selects, decoded by the bare tokenizer, is the answers."""
    from tokenizers import Tokenizer

    folder = data_folder / "stories260K"
    source, file = data_folder / "hh-rlhf" / "helpful-base.jsonl.gz", tmp_path / "helpful.jsonl"
    assert run(capsys, "import", "hh-rlhf", source, file, "--kind", "dialogues")[0] == 0
    decode = Tokenizer.from_file(str(folder / "tokenizer.json")).decode
    arguments = ("show", file, "--tokenizer", folder, "--limit", 25)
    code, output, _ = run(capsys, *arguments, "--json")
    assert code == 0
    found = shown(output)
    dialogues = list(islice(read_dialogues(file), 25))
    assert len(found) == len(dialogues) == 25
    turns = 0
    for (ids, mask), dialogue in zip(found, dialogues, strict=True):
        tokens = zip(ids, mask, strict=True)
        runs = [(trained, [token for token, _ in run]) for trained, run in groupby(tokens, itemgetter(1))]
        assert [trained for trained, _ in runs] == [0, 1] * (len(dialogue.messages) // 2)
        for (trained, run_ids), message in zip(runs, dialogue.messages, strict=True):
            text = message.content if trained else f"[INST] {message.content} [/INST]"
            assert decode(run_ids).strip() == text
            assert run_ids[-1] == 2 if trained else run_ids[0] == 1
            assert (run_ids.count(1), run_ids.count(2)) == ((0, 1) if trained else (1, 0))
            turns += trained
    assert turns > 50
    _, words, _ = run(capsys, *arguments)
    heads = [
        line for line in words.splitlines() if re.fullmatch(r"dialogue \d+: \d+ tokens, \d+ trained", line)
    ]
    assert heads == [
        f"dialogue {number}: {len(ids)} tokens, {sum(mask)} trained"
        for number, (ids, mask) in enumerate(found, 1)
    ]
    assert words.count("⟦") == words.count("⟧") == turns


def test_show_needs_a_template_for_the_tokenizers_format(
    dialogues: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = data_folder / "stories260K"
    code, _, errors = run(capsys, "show", dialogues, "--tokenizer", folder, "--chat-format", "tokenizer")
    assert code == 2
    assert "has no chat template of its own; choose chat_format: llama2" in errors


@pytest.mark.parametrize("name", ["none", "/none/such", "../none"])
def test_show_without_a_tokenizer(dialogues: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    code, _, errors = run(capsys, "show", dialogues, "--tokenizer", name)
    assert (code, errors) == (2, f"error: {name}: no such model folder\n")


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
    for kind in KINDS:
        assert run(capsys, "import", format_, source, output, "--kind", kind)[0] == 0
        assert check_file(output, kind).rows == 1
    (found,) = run_and_read(capsys, format_, source, output, "preferences")
    assert (found["prompt"], found["source"]) == ([{"role": "user", "content": "a"}], format_)
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
    """Each format against the files of the two others, against no JSON, no rows, no UTF-8 and cut gzip data."""
    expected = {
        "hh-rlhf": 'a row of HH-RLHF holds two texts, "chosen" and "rejected"',
        "pandalm": "PandaLM's human judgments are one JSON array of objects with instruction, input, response1",
        "oasst": "OpenAssistant's trees are JSONL, one tree a line",
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
